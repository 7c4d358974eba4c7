"""From tokens to what a reader sees: characters whole, whatever script, however many tokens they are made of.

A tokeniser of bytes cuts an emoji or a Chinese character into several tokens, and an emoji of a family is several
characters. Tokens are therefore joined until what they stand for begins and ends between two characters as readers
count them (grapheme clusters, Unicode Standard Annex 29; the rules for scripts that need a dictionary are left out).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Unit", "shown_text", "text_direction", "text_units"]

_JOINER = "\u200d"
_NON_JOINER = "\u200c"
_VIRAMA = 9  # the combining class of the signs that tie consonants together
# Characters that would be invisible, as pictures of themselves.
_PICTURES: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(32)},
    0x7F: "\u2421",
    ord("\t"): "\u21e5",
    ord("\n"): "\u21b5",
    # Those that turn the order of what follows would act on the rest of the page.
    **{code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
}


class Unit(NamedTuple):
    """Tokens that are shown together.

    Attributes:
        first: the first token.
        last: one more than the last token.
        text: what they stand for; empty for a token that stands for no text.
    """

    first: int
    last: int
    text: str


def text_units(text: str, spans: Sequence[tuple[int, int]]) -> list[Unit]:
    """Join tokens until no character is cut.

    Args:
        text: the text.
        spans: first character, and one more than the last, of each token, in the order of the text.

    Returns:
        The units, which cover all tokens and, joined, the whole text: what no token stands for goes with the next.

    Example:
        >>> text_units("ab\N{COMBINING ACUTE ACCENT}", [(0, 1), (1, 2), (2, 3), (2, 3)])
        [Unit(first=0, last=1, text='a'), Unit(first=1, last=4, text='b\u0301')]
    """
    found: list[Unit] = []
    first, begin, end = 0, 0, 0
    for token, span in enumerate(spans):
        is_last = token + 1 == len(spans)
        end = len(text) if is_last else max(end, span[1])
        # A token that stands for no text is where the text before it ends, wherever its span says.
        begins = end if is_last or spans[token + 1][0] == spans[token + 1][1] else spans[token + 1][0]
        if begins >= end and _is_boundary(text, end):
            found.append(Unit(first, token + 1, text[begin:end]))
            first, begin = token + 1, end
    return found


def shown_text(text: str) -> str:
    """Text with pictures for control characters, which would be invisible or act on the page."""
    return text.translate(_PICTURES)


def text_direction(text: str) -> str:
    """Direction of a text, that of its first letter that has one, as HTML's ``dir="auto"`` finds it.

    Args:
        text: the whole text; a part of it may begin with a word of the other direction.

    Returns:
        "ltr" or "rtl".

    Example:
        >>> text_direction("1. tea, \u05e9\u05dc\u05d5\u05dd"), text_direction("\u05e9\u05dc\u05d5\u05dd, tea")
        ('ltr', 'rtl')
    """
    strong = (unicodedata.bidirectional(character) for character in text)
    return "rtl" if next((kind for kind in strong if kind in ("L", "R", "AL")), "L") != "L" else "ltr"


def _is_boundary(text: str, place: int) -> bool:
    """Return True where a reader sees a new character begin."""
    if place <= 0 or place >= len(text):
        return True
    before, after = text[place - 1], text[place]
    if before == "\r" and after == "\n":
        return False
    if unicodedata.category(before) == "Cc" or unicodedata.category(after) == "Cc":
        return True
    if after in (_JOINER, _NON_JOINER) or unicodedata.category(after).startswith("M"):
        return False
    code = ord(after)
    if 0x1F3FB <= code <= 0x1F3FF or 0xE0020 <= code <= 0xE007F or 0x1160 <= code <= 0x11FF:
        return False  # tones of skin, tags of flags, vowels and finals of Hangul syllables
    if before == _JOINER and unicodedata.category(after) == "So":
        return False
    if unicodedata.combining(before) == _VIRAMA and unicodedata.category(after) == "Lo":
        return False
    return not (_is_regional(after) and _regional_before(text, place) % 2)


def _is_regional(character: str) -> bool:
    """Return True for the letters that make flags in pairs."""
    return 0x1F1E6 <= ord(character) <= 0x1F1FF


def _regional_before(text: str, place: int) -> int:
    count = 0
    while count < place and _is_regional(text[place - 1 - count]):
        count += 1
    return count
