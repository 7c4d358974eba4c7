"""Failures with a name and a remedy, and the two checks that every public function makes on its input."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "InputError",
    "NoSolutionError",
    "NonFinitePenaltyError",
    "SeveralSolutionsError",
    "SeveralSolutionsWarning",
    "require_finite",
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
