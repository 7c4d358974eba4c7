"""Options as plain dataclasses: types and ranges stand beside the fields, and every constructor checks them.

The command line reads the same annotations, so that a flag, a YAML key and a keyword argument obey one rule.
"""

from __future__ import annotations

import math
import numbers
import os
import types
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from probattn.errors import InputError, require_choice

__all__ = ["Device", "Dtype", "Range", "Seed", "as_plain", "check_options", "field_types"]

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "float64"]


@dataclass(frozen=True)
class Range:
    """The range of a number, written beside its type: ``steps: Annotated[int, Range(least=1)]``.

    Infinity and NaN are in no range.

    Attributes:
        least: smallest value allowed.
        above: bound that values must exceed.
        most: largest value allowed.
        below: bound that values must stay under.

    Example:
        >>> str(Range(above=0, most=1)), 0.0 in Range(above=0), float("nan") in Range(least=0)
        ('above 0 and at most 1', False, False)
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))  # an integer may be too large for a float
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least} to {self.most}"
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None) or "finite"


Seed = Annotated[int, Range(least=0, most=2**31 - 1)]


@cache
def field_types(options: Any) -> dict[str, Any]:
    """The annotations of a dataclass by field, ranges included.

    Args:
        options: a dataclass.
    """
    return get_type_hints(options, include_extras=True)


def check_options(options: Any) -> None:
    """Refuse fields of the wrong type or out of range; call it first in ``__post_init__``.

    What is only written differently becomes the type of its field: a list becomes a tuple, a string a path, an integer
    a float, NumPy's numbers Python's.

    Args:
        options: an instance of a dataclass, frozen or not.

    Raises:
        InputError: with the field, its value and the values allowed.

    Example:
        >>> @dataclass(frozen=True)
        ... class Options:
        ...     steps: Annotated[int, Range(least=1)] = 10
        ...
        ...     def __post_init__(self):
        ...         check_options(self)
        >>> Options(steps=0)
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: steps is 0; it must be at least 1.
    """
    kind: Any = type(options)
    hints = field_types(kind)
    for field in fields(options):
        if field.init:
            value = _fit(field.name, getattr(options, field.name), hints[field.name])
            object.__setattr__(options, field.name, value)


def as_plain(options: Any) -> Any:
    """Options as plain JSON values, nested ones included.

    Args:
        options: an instance of a dataclass, or a value of one of its fields.

    Example:
        >>> as_plain(Range(least=1)), as_plain((Path("runs"), None))
        ({'least': 1, 'above': None, 'most': None, 'below': None}, ['runs', None])
    """
    if is_dataclass(options):
        return {field.name: as_plain(getattr(options, field.name)) for field in fields(options)}
    if isinstance(options, (list, tuple)):
        return [as_plain(part) for part in options]
    return str(options) if isinstance(options, Path) else options


def _fit(name: str, value: Any, hint: Any) -> Any:
    """The value as its field holds it."""
    if get_origin(hint) is Annotated:
        hint, *notes = get_args(hint)
        value = _fit(name, value, hint)
        for note in notes:
            if isinstance(note, Range) and value is not None and value not in note:
                raise InputError(f"{name} is {_shown(value)}; it must be {note}.")
        return value
    if get_origin(hint) in (Union, types.UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        if value is None and len(options) < len(get_args(hint)):
            return None
        if len(options) == 1:
            return _fit(name, value, options[0])
        hint = tuple(options)
    elif get_origin(hint) is Literal:
        if not isinstance(value, str):
            raise InputError(f"{name} is {_shown(value)}; use one of {', '.join(map(repr, get_args(hint)))}.")
        require_choice(name, value, get_args(hint))
        return value
    elif get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise InputError(f"{name} is {_shown(value)}; it must be a list.")
        return tuple(_fit(name, part, get_args(hint)[0]) for part in value)
    if isinstance(value, (str, Path)) and "\0" in str(value):
        raise InputError(f"{name} is {_shown(value)}; a NUL character is in no name of a file.")
    for kind, accepted, words in _KINDS:
        if hint is kind:
            if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
                raise InputError(f"{name} is {_shown(value)}; it must be {words}.")
            if kind is int and not -(2**63) <= value < 2**63:
                raise InputError(f"{name} is {_shown(value)}; it must be an integer below 2^63.")
            try:
                return kind(value)
            except OverflowError:
                raise InputError(f"{name} is {_shown(value)}; it must be {words} below 1e308.") from None
    if not isinstance(value, hint):
        allowed = [option.__name__ for option in (hint if isinstance(hint, tuple) else (hint,))]
        raise InputError(f"{name} is {_shown(value)}; it must be of type {' or '.join(allowed)}.")
    return value


_KINDS: tuple[tuple[type, Any, str], ...] = (
    (bool, bool, "True or False"),
    (int, numbers.Integral, "an integer"),
    (float, numbers.Real, "a number"),
    (str, str, "text"),
    (Path, (str, os.PathLike), "a path"),
)


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return "an integer of thousands of digits"
    # An array's repr is no part of a line.
    if len(text) <= 60 and "\n" not in text and not is_dataclass(value):
        return text
    return f"a {type(value).__name__}"
