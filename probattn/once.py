"""Functions that can be differentiated once and say so when asked for more."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["first_order_only"]


def first_order_only(gradient: Tensor, origin: Tensor, name: str) -> Tensor:
    """Return a gradient that raises when it is differentiated again, instead of passing for a constant.

    Torch's own ``once_differentiable`` does not notice a second derivative when the incoming gradient is a constant,
    which is the usual case.

    Args:
        gradient: the gradient, computed without a graph.
        origin: a tensor that the gradient depends on.
        name: what cannot be differentiated twice, for the message.
    """
    result: Tensor = _FirstOrderOnly.apply(gradient, origin, name)  # type: ignore[no-untyped-call]
    return result


class _FirstOrderOnly(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, origin: Tensor, name: str) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.name = inputs[2]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise RuntimeError(f"{ctx.name} is differentiable once; its second derivative was asked for.")
