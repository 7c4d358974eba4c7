"""Corruptions of characters and of embeddings, and the loss of a model under each of them.

Noise on the embeddings is normal, of a fixed size or in proportion to the model's own root mean square of the
embeddings; adjacent characters are swapped; characters are replaced by others. The targets stay the true characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.studies.robustness.training import stream
from probattn.models.corpus import Windows
from probattn.models.gpt import CharacterGPT

__all__ = ["CLEAN", "FAMILIES", "Array", "evaluate", "label", "substitute_characters", "swap_characters"]

Array = NDArray[np.float64]

CLEAN = "clean"
#: Levels of every family of corruptions.
FAMILIES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "absolute noise": (0.1, 0.3, 0.5),
        "relative noise": (0.1, 0.2, 0.4),
        "swaps": (0.02, 0.05, 0.1),
        "substitutions": (0.02, 0.05, 0.1),
    }
)
_CHUNK = 128  # windows in one pass


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
    if not 0 <= rate <= 1:
        raise InputError(f"rate is {rate}; a share of characters must lie in [0, 1].")
    if int((frequency > 0).sum()) < 2:
        raise InputError("the training text has a single character and no other to replace it; give another text.")
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    old = tokens.cpu()[chosen]
    weights = frequency.double().repeat(len(old), 1).scatter(1, old.unsqueeze(1), 0.0)
    changed = tokens.cpu().clone()
    if len(old):
        changed[chosen] = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    return changed.to(tokens.device)


@torch.no_grad()
def evaluate(model: CharacterGPT, windows: Windows, frequency: Tensor, seed: int) -> dict[str, Array]:
    """Measure the loss of every window under every corruption.

    Args:
        model: model, on the device of the windows.
        windows: held-out text, (W, T).
        frequency: count of every character in the training text, (V,).
        seed: random seed; the draws of a corruption depend on it and on the corruption alone.

    Returns:
        Bits per character, (W,) each, by "clean" and :func:`label`.
    """
    clean = model.embed(windows.inputs)
    spread = float(clean.square().mean().sqrt())
    losses = {CLEAN: _bits(model, clean, windows.targets)}
    for family, levels in FAMILIES.items():
        for level in levels:
            generator = torch.Generator().manual_seed(stream(family, level, seed))
            if family == "swaps":
                u = model.embed(swap_characters(windows.inputs, level, generator))
            elif family == "substitutions":
                u = model.embed(substitute_characters(windows.inputs, level, frequency, generator))
            else:
                size = level * spread if family == "relative noise" else level
                u = clean + size * torch.randn(clean.shape, generator=generator).to(clean.device)
            losses[label(family, level)] = _bits(model, u, windows.targets)
    return losses


def _bits(model: CharacterGPT, u: Tensor, targets: Tensor) -> Array:
    """Return the mean cross-entropy of each window in bits per character, (W,)."""
    found = []
    for own, goal in zip(u.split(_CHUNK), targets.split(_CHUNK), strict=True):
        loss = F.cross_entropy(model(u=own).transpose(1, 2), goal, reduction="none")
        found.append(loss.mean(1).double() / math.log(2))
    bits: Array = torch.cat(found).cpu().numpy()
    return bits
