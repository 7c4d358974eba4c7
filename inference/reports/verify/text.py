"""Held-out text in the colours of its margins, on one scale for all texts and models, and its support tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LEVELS",
    "SUPPORT",
    "Cell",
    "SupportToken",
    "character_in_words",
    "colour_rules",
    "coloured_rows",
    "level_of",
    "support_positions",
]

SUPPORT = 5  # in each window
LEVELS = 26
_TOWARD = 20  # levels from the boundary, margin 0, to no attention, margin 1; those above go on to 2
_AROUND = 14  # characters on either side of a support token in the list
_SIGNS = {" ": " ", "\n": "\u21b5", "\t": "\u21e5"}
_NAMES = {" ": "space", "\n": "newline", "\t": "tab"}

_Colour = tuple[float, float, float]
# What attention leaves alone is grey, orange leads to the boundary, blue away from it, as on the support page.
_LIGHT: tuple[list[_Colour], list[_Colour]] = (
    [(150, 50, 0), (236, 126, 30), (252, 205, 135), (242, 242, 239)],
    [(242, 242, 239), (178, 210, 232), (86, 150, 205), (20, 80, 160)],
)
_DARK: tuple[list[_Colour], list[_Colour]] = (
    [(255, 176, 74), (196, 108, 22), (104, 66, 24), (38, 43, 50)],
    [(38, 43, 50), (36, 72, 104), (58, 122, 175), (150, 203, 245)],
)


@dataclass(frozen=True)
class Cell:
    """One character of the coloured text: sign, level of its colour, whether it is a support token, and a note."""

    character: str
    level: int
    support: bool
    note: str


@dataclass(frozen=True)
class SupportToken:
    """A support token in its context: its name, the text before, its sign, the text after, and its margin."""

    name: str
    before: str
    sign: str
    after: str
    margin: float


def character_in_words(character: str) -> str:
    r"""Name a character; one that can be seen names itself.

    Args:
        character: one character.

    Returns:
        Its name.

    Example:
        >>> character_in_words("a"), character_in_words(" "), character_in_words("\n")
        ('a', 'space', 'newline')
    """
    return _NAMES.get(character, character)


def support_positions(characters: Sequence[str], margins: NDArray[np.float64], count: int = SUPPORT) -> list[int]:
    """Find the characters nearest to the boundary among those that could be anywhere.

    The first two characters are left out, since a past of fewer than two has no covariance, and so is white space,
    which is mostly indentation.

    Args:
        characters: characters of a window, T of them.
        margins: smallest singular values of their blocks, (T,).
        count: number of support tokens at most.

    Returns:
        Positions, nearest first.

    Example:
        >>> support_positions("ab cd", np.array([0.1, 0.2, 0.3, 0.9, 0.4]), 2)
        [4, 3]
    """
    order = np.argsort(margins, kind="stable").tolist()
    return [place for place in order if place > 1 and not characters[place].isspace()][:count]


def coloured_rows(
    windows: Sequence[Sequence[str]], margins: NDArray[np.float64], listed: int = 10
) -> tuple[list[list[Cell]], list[SupportToken], dict[str, Any]]:
    """Colour the characters of some windows.

    Args:
        windows: characters of each window, N times T.
        margins: smallest singular values of their blocks, (N, T).
        listed: number of support tokens in the list.

    Returns:
        Rows of cells; the support tokens nearest to the boundary in all windows; ``frequent`` (characters in words with
        their numbers), ``blank`` (how many would be white space if that were not left out) and ``total``.
    """
    rows, found, blank, total = [], [], 0, 0
    counts: Counter[str] = Counter()
    for text, row in zip(windows, margins, strict=True):
        chosen = support_positions(text, row)
        blank += sum(text[place].isspace() for place in np.argsort(row, kind="stable").tolist()[:SUPPORT])
        total += len(chosen)
        counts.update(character_in_words(text[place]) for place in chosen)
        found += [_in_context(text, place, float(row[place])) for place in chosen]
        rows.append(
            [
                Cell(
                    _SIGNS.get(character, character),
                    level_of(float(margin)),
                    place in chosen,
                    f"{character_in_words(character)}: margin {margin:.3f}",
                )
                for place, (character, margin) in enumerate(zip(text, row, strict=True))
            ]
        )
    found.sort(key=lambda one: one.margin)
    return rows, found[:listed], {"frequent": counts.most_common(8), "blank": blank, "total": total}


def level_of(margin: float) -> int:
    """Number of the colour of a margin: 0 at the boundary, 20 where attention does nothing, 25 from 2 on.

    Args:
        margin: smallest singular value of a block.

    Returns:
        A whole number below ``LEVELS``.
    """
    if margin <= 1:
        return round(_TOWARD * max(0.0, margin))
    return _TOWARD + round((LEVELS - 1 - _TOWARD) * min(1.0, margin - 1))


def colour_rules(dark: bool) -> str:
    """Write the style sheet of the levels: a background and an ink that can be read on it.

    Args:
        dark: whether for dark surroundings.

    Returns:
        Rules of CSS, one per level.
    """
    toward, away = _DARK if dark else _LIGHT
    rules = []
    for level in range(LEVELS):
        if level <= _TOWARD:
            colour = _between(toward, level / _TOWARD)
        else:
            colour = _between(away, (level - _TOWARD) / (LEVELS - 1 - _TOWARD))
        red, green, blue = (round(part) for part in colour)
        rules.append(f".m{level}{{background:rgb({red},{green},{blue});color:{_ink(colour)}}}")
    return "\n".join(rules)


def _between(stops: Sequence[_Colour], place: float) -> _Colour:
    scaled = place * (len(stops) - 1)
    k = min(int(scaled), len(stops) - 2)
    low, high = stops[k], stops[k + 1]
    red, green, blue = (a + (scaled - k) * (b - a) for a, b in zip(low, high, strict=True))
    return red, green, blue


def _ink(colour: _Colour) -> str:
    """Black or white, whichever has the larger contrast by WCAG 2, which is then at least 4.5."""
    parts = [part / 255 for part in colour]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return "#000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179 else "#fff"


def _in_context(text: Sequence[str], place: int, margin: float) -> SupportToken:
    before, after = text[max(0, place - _AROUND) : place], text[place + 1 : place + 1 + _AROUND]
    return SupportToken(
        character_in_words(text[place]),
        "".join(_SIGNS.get(one, one) for one in before),
        _SIGNS.get(text[place], text[place]),
        "".join(_SIGNS.get(one, one) for one in after),
        margin,
    )
