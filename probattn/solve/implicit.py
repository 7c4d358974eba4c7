r"""The derivative of a solution of u - mu(u) = e, by the implicit-function theorem.

With w = (de/du)^{-T} g from one back substitution through the block-triangular Jacobian,

.. math:: \frac{dL}{de} = w, \qquad \frac{dL}{d\theta} = w \cdot \frac{\partial \mu}{\partial \theta},

so that no step of the solver is kept in the graph (Krantz and Parks 2013; Blondel et al. 2022, arXiv:2105.15183).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probattn.interface import Attention
from probattn.numerics import linalg
from probattn.numerics.derivatives import first_order_only
from probattn.solve.context import Context, context_of

__all__ = ["with_gradient"]


def with_gradient(attention: Attention, e: Tensor, solution: Tensor) -> Tensor:
    """The solution as a function of the noise and of the attention's parameters, differentiable once.

    Args:
        attention: the attention, with the graph of its parameters.
        e: noise, ``(*batch, T, p)``, with its graph.
        solution: u with u - mu(u) = e, without a graph.

    Returns:
        The same numbers as ``solution``. Backward: time O(H T^2 p), memory O(H T p), sequential in T.
    """
    noise = e + attention.mean(solution)  # carries the graph of e and of the parameters; its value is the solution
    if not noise.requires_grad:
        return solution
    result: Tensor = _ImplicitSolution.apply(noise, solution, attention.detach())  # type: ignore[no-untyped-call]
    return result


class _ImplicitSolution(torch.autograd.Function):
    """The solution as a function of z = e + mu(u*): the identity forward, (de/du)^{-T} backward."""

    @staticmethod
    def forward(ctx: Any, noise: Tensor, solution: Tensor, attention: Attention) -> Tensor:
        ctx.save_for_backward(noise, solution)
        ctx.attention = attention
        return solution.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        noise, u = ctx.saved_tensors
        with torch.no_grad():
            result = _back_substitute(context_of(ctx.attention, u), u, gradient)
        return first_order_only(result, noise, "the solution of u - mu(u) = e"), None, None


def _back_substitute(context: Context, u: Tensor, gradient: Tensor) -> Tensor:
    """Solve (de/du)^T w = g for w, ``(*batch, T, p)``, last token first."""
    remaining = gradient.clone()
    result = torch.empty_like(remaining)
    for i in reversed(range(u.shape[-2])):
        past, token = context.first(i), u[..., i, :]
        w = linalg.solve(past.mean_and_jacobian(token)[1].mT, remaining[..., i, :, None]).squeeze(-1)  # (*batch, p)
        result[..., i, :] = w
        if i:
            remaining[..., :i, :] += past.pull_back(token, w)
    return result
