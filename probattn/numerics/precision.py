"""Computation in the precision of the parameters, whatever torch.autocast would choose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["in_own_precision"]


class _OnDevice(Protocol):
    @property
    def like(self) -> Tensor: ...


Method = TypeVar("Method", bound=Callable[..., Any])


def in_own_precision(method: Method) -> Method:
    """Run a method with autocast switched off on the device of the object, which it takes from ``like``.

    A log-determinant is a difference of logarithms, and a covariance a difference of products: the three digits of
    bfloat16 would leave nothing of them.
    """

    @functools.wraps(method)
    def wrapped(self: _OnDevice, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.like.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(Method, wrapped)
