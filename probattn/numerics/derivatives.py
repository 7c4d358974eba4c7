"""Derivatives that autograd does not offer: forward mode from two reverse passes, refusals of a second derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["first_order_only", "pushforward"]


def pushforward(
    function: Callable[..., tuple[Tensor, ...]], primals: Sequence[Tensor], tangents: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    r"""Derivative of a function along a direction, from its pullback, which is linear: f' t = (g -> f'^T g)^T t.

    Forward mode cannot be nested in itself, and this can be used inside of it.

    Args:
        function: of tensors, a tuple of tensors.
        primals: where.
        tangents: the direction, one for each primal; None: zero.

    Returns:
        As the function. Twice the cost of a reverse pass.

    Example:
        >>> x, t = torch.tensor(3.0), torch.tensor(2.0)
        >>> pushforward(lambda x: (x**2,), [x], [t])
        (tensor(12.),)
    """
    results, pullback = torch.func.vjp(function, *primals)[:2]
    transposed = torch.func.vjp(lambda *g: pullback(g), *(torch.zeros_like(part) for part in results))[1]
    there = zip(primals, tangents, strict=True)
    moved: tuple[Tensor, ...] = transposed(
        tuple(torch.zeros_like(primal) if tangent is None else tangent for primal, tangent in there)
    )
    return moved


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
