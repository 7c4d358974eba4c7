"""Corruptions of the characters of a window.

Adjacent characters are swapped; characters are replaced by others, by their neighbours on a keyboard, or lost. The
targets stay the true characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from probattn.errors import InputError, require_share

__all__ = [
    "CLEAN",
    "FAMILIES",
    "delete_characters",
    "keyboard_neighbours",
    "label",
    "mistype_characters",
    "substitute_characters",
    "swap_characters",
]

CLEAN = "clean"
#: Levels of every family of corruptions.
FAMILIES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "absolute noise": (0.1, 0.3),
        "relative noise": (0.1, 0.2, 0.4),
        "embedding attack": (0.02, 0.05),
        "character attack": (1, 2, 4),
        "swaps": (0.05, 0.1),
        "substitutions": (0.05, 0.1),
        "typos": (0.05, 0.1),
        "deletions": (0.02, 0.05),
    }
)
_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def label(family: str, level: float) -> str:
    """Name a corruption as records do, such as "swaps 0.05".

    Args:
        family: name of a family of :data:`FAMILIES`.
        level: strength of the corruption.
    """
    return f"{family} {level:g}"


def swap_characters(tokens: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Swap characters with their right neighbours; no character moves twice.

    Args:
        tokens: indices of the characters, (N, T).
        rate: probability that a swap begins at a position, the same at each of the first T - 1; at most 0.5.
        generator: random generator on the CPU.

    Returns:
        Indices, (N, T).

    Raises:
        InputError: a rate outside [0, 0.5].
    """
    if not 0 <= rate <= 0.5:
        raise InputError(f"rate is {rate}; a share of swaps must lie in [0, 0.5], as each takes two characters.")
    length = tokens.shape[1]
    order = torch.arange(length).repeat(len(tokens), 1)
    chance = torch.rand(len(tokens), length, generator=generator)
    begun = torch.zeros(len(tokens), dtype=torch.bool)
    for i in range(length - 1):
        # No swap may begin inside another, so that the others must begin more often: rate = x (1 - rate).
        begun = ~begun & (chance[:, i] < (rate if i == 0 else rate / (1 - rate)))
        order[:, i] += begun.long()
        order[:, i + 1] -= begun.long()
    return tokens.gather(1, order.to(tokens.device))


def substitute_characters(tokens: Tensor, rate: float, frequency: Tensor, generator: torch.Generator) -> Tensor:
    """Replace characters by others, drawn in proportion to their frequency in the training text.

    Args:
        tokens: indices of the characters, (N, T).
        rate: probability that a character is replaced, always by another one.
        frequency: count of every character in the training text, (V,).
        generator: random generator on the CPU.

    Returns:
        Indices, (N, T).

    Raises:
        InputError: a rate outside [0, 1], or a single character in the text.
    """
    _require_rate(rate)
    if int((frequency > 0).sum()) < 2:
        raise InputError("the training text has a single character and no other to replace it; give another text.")
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    old = tokens.cpu()[chosen]
    weights = frequency.double().repeat(len(old), 1).scatter(1, old.unsqueeze(1), 0.0)
    changed = tokens.cpu().clone()
    if len(old):
        changed[chosen] = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    return changed.to(tokens.device)


def keyboard_neighbours(vocabulary: Sequence[str]) -> Tensor:
    """List the neighbours of every letter on a keyboard with the letters QWERTY.

    Args:
        vocabulary: characters by index.

    Returns:
        Indices of the neighbours of the same case, ``(V, 8)``, those of a letter repeated until the row is full; -1
        for what is no letter or has no neighbour in the vocabulary.

    Example:
        >>> keyboard_neighbours(("a", "q", "Q"))[:, 0].tolist()
        [1, 0, -1]
    """
    index = {character: k for k, character in enumerate(vocabulary)}
    place = {letter: (row, column) for row, letters in enumerate(_ROWS) for column, letter in enumerate(letters)}
    table = torch.full((len(vocabulary), 8), -1)
    for character, k in index.items():
        if character.lower() not in place or len(character) != 1:
            continue
        row, column = place[character.lower()]
        # Each row of keys lies half a key to the right of the one above.
        near = [(0, -1), (0, 1), (-1, 0), (-1, 1), (1, -1), (1, 0)]
        letters = [other for other, found in place.items() if (found[0] - row, found[1] - column) in near]
        cased = (letter.upper() if character.isupper() else letter for letter in letters)
        known = [index[letter] for letter in cased if letter in index]
        if known:
            table[k] = torch.tensor([known[j % len(known)] for j in range(8)])
    return table


def mistype_characters(tokens: Tensor, rate: float, neighbours: Tensor, generator: torch.Generator) -> Tensor:
    """Replace letters by neighbours on the keyboard.

    Args:
        tokens: indices of the characters, (N, T).
        rate: probability that a letter is replaced; other characters stay.
        neighbours: table of :func:`keyboard_neighbours`, (V, 8).
        generator: random generator on the CPU.

    Returns:
        Indices, (N, T).

    Raises:
        InputError: a rate outside [0, 1].
    """
    _require_rate(rate)
    own = tokens.cpu()
    chosen = torch.rand(own.shape, generator=generator) < rate
    which = torch.randint(neighbours.shape[1], own.shape, generator=generator)
    found = neighbours[own].gather(-1, which.unsqueeze(-1)).squeeze(-1)
    return torch.where(chosen & (found >= 0), found, own).to(tokens.device)


def delete_characters(
    tokens: Tensor, targets: Tensor, rate: float, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Lose characters: those behind them move up, each with its own true successor as its target.

    Args:
        tokens: indices of the characters, (N, T).
        targets: their successors, (N, T).
        rate: probability that a character is lost; the first of a window never is.
        generator: random generator on the CPU.

    Returns:
        Indices, targets, and True where a character is left, (N, T) each. The lost ones stand at the end, where no
        character that is left sees them.

    Raises:
        InputError: a rate outside [0, 1].
    """
    _require_rate(rate)
    lost = torch.rand(tokens.shape, generator=generator) < rate
    lost[:, 0] = False
    order = lost.long().argsort(dim=1, stable=True)
    kept = (~lost).gather(1, order).to(tokens.device)
    order = order.to(tokens.device)
    return tokens.gather(1, order), targets.gather(1, order), kept


def _require_rate(rate: float) -> None:
    if rate != 0:
        require_share("rate", rate)
