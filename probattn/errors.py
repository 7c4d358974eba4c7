"""Failures with a name and a remedy, and the checks that public functions make on their input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "InputError",
    "NoSolutionError",
    "NonFinitePenaltyError",
    "SeveralSolutionsError",
    "SeveralSolutionsWarning",
    "require_at_least",
    "require_axes",
    "require_choice",
    "require_finite",
    "require_positive",
    "require_share",
    "require_tensor",
]


class InputError(ValueError):
    """An argument, file or flag that cannot be used; the message says which, why, and what to do instead."""


class NoSolutionError(ArithmeticError):
    """The implicit equation u_i = mu_i(u_<i, u_i) + eps_i was not solved to tolerance."""


class NonFinitePenaltyError(ArithmeticError):
    """A penalty became infinite or NaN in training; the message says at which layer, head and position."""


class SeveralSolutionsError(ArithmeticError):
    """The implicit equation has more than one solution and no rule to choose among them was given."""


class SeveralSolutionsWarning(UserWarning):
    """The implicit equation has more than one solution; the rule that the caller named has chosen one."""


def require_tensor(name: str, value: object) -> None:
    """Raise unless a value is a tensor, naming what it is and how to make a tensor of it.

    Args:
        name: name of the value in the message.
        value: anything.

    Raises:
        InputError: with the type of the value, and its shape or length where it has one.

    Example:
        >>> require_tensor("u", [0.0, 1.0])
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: u is a list of length 2; it must be a tensor, made by torch.as_tensor(u).
    """
    if isinstance(value, Tensor):
        return
    kind = (
        type(value).__name__
        if type(value).__module__ == "builtins"
        else f"{type(value).__module__}.{type(value).__name__}"
    )
    article = "an" if kind[0] in "aeiou" else "a"
    size = ""
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        size = f" of shape {shape}"
    elif isinstance(value, Sequence) and not isinstance(value, str):
        size = f" of length {len(value)}"
    raise InputError(f"{name} is {article} {kind}{size}; it must be a tensor, made by torch.as_tensor({name}).")


def require_axes(name: str, tensor: Tensor, axes: dict[str, int]) -> None:
    """Raise unless the last axes of a tensor have the sizes that are known from elsewhere.

    Args:
        name: name of the tensor in the message.
        tensor: any shape.
        axes: names and sizes of the last axes, in their order.

    Raises:
        InputError: with the first axis that differs, its size and the one expected.

    Example:
        >>> require_axes("key", torch.zeros(1, 5), {"rank": 1, "features": 4})
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: key has 5 in its features axis (-1) where 4 is expected; its shape is (1, 5), ...
    """
    if tensor.dim() < len(axes):
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; its last axes must be {axes}.")
    for position, (axis, size) in enumerate(axes.items(), start=-len(axes)):
        if tensor.shape[position] != size:
            raise InputError(
                f"{name} has {tensor.shape[position]} in its {axis} axis ({position}) where {size} is expected; "
                f"its shape is {tuple(tensor.shape)}, its last axes must be {axes}."
            )


def require_finite(name: str, tensor: Tensor) -> None:
    """Raise where a tensor holds NaN or infinity, naming the first such position.

    Args:
        name: what the tensor is called in the message.
        tensor: any shape.

    Raises:
        InputError: with the index and the value of the first non-finite entry.

    Example:
        >>> require_finite("u", torch.tensor([0.0, float("nan")]))
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: u is not finite: nan at index (1,); 1 of 2 entries; remove or impute them first.
    """
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    index = tuple(int(i) for i in bad[0])
    entry = float(tensor[index])
    raise InputError(
        f"{name} is not finite: {entry} at index {index}; {len(bad)} of {tensor.numel()} entries; remove or impute "
        "them first."
    )


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise unless a value is one of the choices.

    Args:
        name: name of the argument or flag in the message.
        value: value given.
        choices: allowed values, such as ``typing.get_args`` of a ``Literal``.

    Raises:
        InputError: with the value and all choices.

    Example:
        >>> require_choice("kind", "sharp", ("hard", "soft"))
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: kind is 'sharp'; use one of 'hard', 'soft'.
    """
    if value not in choices:
        raise InputError(f"{name} is {value!r}; use one of {', '.join(map(repr, choices))}.")


def require_at_least(name: str, value: float, least: float = 1) -> None:
    """Raise unless a number is finite and not below a bound.

    Args:
        name: name of the argument or flag in the message.
        value: value given; NaN and infinity are refused.
        least: smallest value allowed.

    Raises:
        InputError: with the value and the bound.

    Example:
        >>> require_at_least("steps", 0)
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: steps is 0; it must be at least 1.
    """
    if not least <= value < math.inf:
        finite = "" if isinstance(value, int) else "finite and "
        raise InputError(f"{name} is {value}; it must be {finite}at least {least}.")


def require_positive(name: str, value: float) -> None:
    """Raise unless a number is positive and finite.

    Args:
        name: name of the argument or flag in the message.
        value: value given; NaN and infinity are refused.

    Raises:
        InputError: with the value.

    Example:
        >>> require_positive("learning_rate", float("nan"))
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: learning_rate is nan; it must be positive and finite.
    """
    if not 0 < value < math.inf:
        raise InputError(f"{name} is {value}; it must be positive and finite.")


def require_share(name: str, value: float) -> None:
    """Raise unless a number is a share above 0, at most 1.

    Args:
        name: name of the argument or flag in the message.
        value: value given; NaN is refused.

    Raises:
        InputError: with the value.

    Example:
        >>> require_share("positions", 1.5)
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: positions is 1.5; a share must lie in (0, 1].
    """
    if not 0 < value <= 1:
        raise InputError(f"{name} is {value}; a share must lie in (0, 1].")
