"""Tokens joined to characters as readers see them, in many scripts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from probattn.inference.reports.support.pieces import shown_text, text_units

FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"


def bytes_of(text):
    """Spans of a tokeniser with one token per byte."""
    return [(k, k + 1) for k, character in enumerate(text) for _ in character.encode()]


def texts(text, spans=None):
    return [unit.text for unit in text_units(text, bytes_of(text) if spans is None else spans)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ab", ["a", "b"]),
        ("猫が", ["猫", "が"]),
        (f"x{FAMILY}y", ["x", FAMILY, "y"]),
        ("👍🏽!", ["👍🏽", "!"]),
        ("🇩🇪🇫🇷", ["🇩🇪", "🇫🇷"]),
        ("1️⃣❤️‍🔥", ["1️⃣", "❤️‍🔥"]),
        ("e\u0301a", ["e\u0301", "a"]),
        ("क्षत्रिय", ["क्ष", "त्रि", "य"]),
        ("مرحبا", list("مرحبا")),
        ("می\u200cخ", ["م", "ی\u200c", "خ"]),
        ("\u1112\u1161\u11ab", ["\u1112\u1161\u11ab"]),
        ("a\r\nb", ["a", "\r\n", "b"]),
        ("\n\u0301", ["\n", "\u0301"]),
    ],
)
def test_characters_stay_whole(text, expected):
    assert texts(text) == expected


def test_control_cut_by_bytes_alone_breaks_them():
    """Without the rule a token is what is shown, and most bytes of an emoji are no character."""
    pieces = [bytes([byte]).decode(errors="replace") for byte in FAMILY.encode()]
    assert "".join(pieces) != FAMILY
    assert len(text_units(FAMILY, bytes_of(FAMILY))) == 1 < len(pieces)


def test_tokens_without_text_stand_alone():
    units = text_units("ab", [(0, 0), (0, 1), (1, 2), (0, 0)])
    assert [unit.text for unit in units] == ["", "a", "b", ""]
    assert [(unit.first, unit.last) for unit in units] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_text_without_tokens_goes_with_the_next():
    assert texts("  a  b ", [(2, 3), (5, 6)]) == ["  a", "  b "]


@given(st.text(max_size=30), st.lists(st.integers(1, 4), max_size=40))
def test_units_cover_all_tokens_and_the_whole_text(text, sizes):
    spans, place = [], 0
    for size in sizes:
        spans.append((place, min(len(text), place + size)))
        place = spans[-1][1]
    units = text_units(text, spans)
    assert [token for unit in units for token in range(unit.first, unit.last)] == list(range(len(spans)))
    assert "".join(unit.text for unit in units) == (text if spans else "")


def test_what_is_invisible_or_turns_the_text_is_shown():
    assert shown_text("a\tb\n\x07\x7f") == "a⇥b↵␇␡"
    assert shown_text("a\u202eb\u2067") == "a[U+202E]b[U+2067]"
    assert shown_text("مرحبا 猫 é\u200c") == "مرحبا 猫 é\u200c"
