r"""Solving u_i = mu_i(u_<i, u_i) + eps_i for a whole sequence, and differentiating through the solution.

The solution is found token by token, with a cache of the past, or for many tokens at once: :mod:`probattn.solve.parallel` does
this up to the first position with several solutions, and both give the same sequence.
"""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from probattn.attention import CausalAttention
from probattn.errors import InputError, SeveralSolutionsWarning, require_finite
from probattn.moments.dense import attention_weights
from probattn.numerics.derivatives import first_order_only
from probattn.solve.context import Context
from probattn.solve.parallel import unique_prefix
from probattn.solve.rows import Tokens
from probattn.solve.search import Selection, require_selection, solve_token

__all__ = [
    "Method",
    "faster_method",
    "find_sequence",
    "solve_sequence",
]

Method = Literal["auto", "sequential", "parallel"]

_WEIGHTS = 1 << 21  # attention weights that the graph of the mean may hold at a time


def solve_sequence(
    attention: CausalAttention, e: Tensor, *, selection: Selection = "unique", method: Method = "auto"
) -> Tensor:
    r"""The sequence u with u - mu(u) = e.

    Each token is found by Newton's method with a line search on \|e_i(u) - e_i\|, or many at once by the sweeps of
    :mod:`probattn.solve.parallel`, as far as the same search finds one solution for each; both give the same sequence, to
    tolerance, and the same failures. The gradient is that of the solution, by the implicit-function theorem: with
    w = (de/du)^{-T} g from one back substitution through the block-triangular Jacobian, dL/de = w and
    dL/dtheta = w . dmu/dtheta, so no solver step is kept in the graph.

    Args:
        attention: the attention.
        e: noise, (*batch, T, p).
        selection: "unique" raises where a second solution is found. The search starts from a score of places and can
            miss one; where a contraction certifies there is none, and for one past in one dimension ``NextToken.roots``
            lists them all. The others choose among those found and warn with the number of
            draws and the positions: "uniform" at random, "smallest_step" the one with the smallest \|mu_i\| = \|u_i -
            eps_i\|, "nearest_mean" the one nearest to the plain mean of what the past carries.
        method: "sequential", "parallel", or "auto": the faster one, see :func:`faster_method`.

    Returns:
        u, the broadcast of the batch axes with (T, p). Differentiable once in e and in every parameter.
        Time O(H T^2 p) and a few p x p solves a token; memory linear in T, with the gradient too. The back substitution
        of the gradient is sequential in T.

    Raises:
        InputError: noise that does not fit or is not finite, an unknown selection or method.
        NoSolutionError: Newton's method did not reach tolerance (1000 machine epsilons, relative).
        SeveralSolutionsError: several solutions, under selection "unique".

    Example:
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.5]]))
        >>> u = solve_sequence(attention, torch.tensor([[1.0], [-1.0], [0.3]]))
        >>> bool(torch.allclose(attention.residual(u), torch.tensor([[1.0], [-1.0], [0.3]]), atol=1e-5))
        True
    """
    if e.dim() < 2 or e.shape[-1] != attention.dim or e.dtype != attention.query.dtype:
        raise InputError(
            f"the noise has shape {tuple(e.shape)} and is {e.dtype}; it must be (*batch, T, {attention.dim}) and "
            f"{attention.query.dtype}, like the attention."
        )
    require_finite("the noise", e.detach())
    solution = _solve(attention.detach(), e.detach(), selection, method)
    if not torch.is_grad_enabled():
        return solution
    noise = e + _mean(attention, solution)  # carries the graph of e and of the parameters; its value is the solution
    if not noise.requires_grad:
        return solution
    result: Tensor = _ImplicitSolution.apply(noise, solution, attention.detach())  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def find_sequence(
    attention: CausalAttention, e: Tensor, selection: Selection, method: Method = "auto"
) -> tuple[Tensor, Tensor]:
    """The sequence and where it was one of several, without a gradient and without a warning.

    Args:
        attention: the attention.
        e: noise, (*batch, T, p).
        selection: see :func:`solve_sequence`.
        method: see :func:`solve_sequence`.

    Returns:
        u, the broadcast of the batch axes with (T, p), and the positions with more than one solution, (*batch, T).

    Raises:
        InputError, NoSolutionError, SeveralSolutionsError: see :func:`solve_sequence`.
    """
    batch = torch.broadcast_shapes(attention.batch_shape, e.shape[:-2])
    e = e.expand(*batch, *e.shape[-2:])
    require_selection(selection)
    if method not in get_args(Method):
        raise InputError(f"method is {method!r}; use one of {', '.join(map(repr, get_args(Method)))}.")
    if method == "auto":
        method = faster_method(e.shape[-2])
    # Nothing is known beforehand, or as much as sweeps find: the search goes on from there.
    known = e if method == "parallel" else e[..., :0, :]
    past, u = unique_prefix(attention, known)
    tokens, folded = [u], [torch.zeros(u.shape[:-1], dtype=torch.bool, device=u.device)]
    for i in range(past.length, e.shape[-2]):
        token, several = solve_token(past, e[..., i, :], selection, i)
        tokens.append(token.unsqueeze(-2))
        folded.append(several.unsqueeze(-1))
        past = past.extend(token)
    return torch.cat(tokens, dim=-2), torch.cat(folded, dim=-1)


def faster_method(length: int) -> Literal["sequential", "parallel"]:
    """The method that "auto" stands for: sweeps, wherever there is more than one token.

    Seconds token by token and, after the slash, by sweeps (one thread of an AMD EPYC, float32, minima; A of independent
    normal entries of scale 0.4 / sqrt(p), noise of scale 0.5; after some twenty tokens nothing is certified and every
    position is searched):

    ======= ======= ============= ============= ============= ==============
    p       batch   T = 8         T = 32        T = 128       T = 512
    ======= ======= ============= ============= ============= ==============
    1       1       0.007 / 0.003 0.029 / 0.006 0.227 / 0.034
    4       1       0.007 / 0.002 0.041 / 0.009 0.252 / 0.031 1.306 / 0.162
    4       8       0.007 / 0.003 0.054 / 0.016 0.342 / 0.116 1.318 / 0.443
    4       64      0.009 / 0.004 0.095 / 0.056 0.614 / 0.555 5.576 / 4.730
    16      1       0.009 / 0.006 0.059 / 0.020 0.251 / 0.049
    16      64      not measured  0.318 / 0.401
    ======= ======= ============= ============= ============= ==============

    The crossover is not in T but in the work of a token: where the weights of a search for four tokens no longer fit
    the cache (batch x heads x tokens seen above some 30 000), searching for one token at a time is as fast, and the
    sweeps themselves hand over to it.

    Args:
        length: T.
    """
    return "parallel" if length > 1 else "sequential"


def _solve(attention: CausalAttention, e: Tensor, selection: Selection, method: Method) -> Tensor:
    solution, several = find_sequence(attention, e, selection, method)
    if bool(several.any()):
        positions = sorted({int(i) for i in several.nonzero()[:, -1]})
        draws, total = int(several.any(-1).sum()), math.prod(several.shape[:-1])
        shown = ", ".join(map(str, positions[:8])) + (", ..." if len(positions) > 8 else "")
        warnings.warn(
            f"{draws} of {total} sequences had several solutions, at positions {shown}; one was taken by the rule "
            f"{selection!r}. The law of these draws is not the density that log_prob gives.",
            SeveralSolutionsWarning,
            stacklevel=4,
        )
    return solution


def _mean(attention: CausalAttention, u: Tensor) -> Tensor:
    """``attention.mean(u)`` by blocks of rows whose weights are computed again for the gradient: memory linear in T."""
    length = u.shape[-2]
    rows = max(1, _WEIGHTS // max(1, attention.heads * length * math.prod(u.shape[:-2])))
    ends = [*range(rows, length, rows), length]
    blocks = [attention.mean(u[..., : ends[0], :])]
    for begin, end in itertools.pairwise(ends):
        blocks.append(checkpoint(_later_rows, attention, u, begin, end, use_reentrant=False))
    return torch.cat(blocks, dim=-2)


def _later_rows(attention: CausalAttention, u: Tensor, begin: int, end: int) -> Tensor:
    """Rows begin..end-1 of the mean, begin >= 1."""
    seen = u[..., :end, :]
    tokens = seen.unsqueeze(-3)
    diagonal = begin - 1 if attention.mask == "strict" else begin
    visible = torch.ones(end - begin, end, dtype=torch.bool, device=u.device).tril(diagonal)
    return Tokens(tokens @ attention.ov_matrix.mT, tokens @ attention.qk_matrix).mean(seen[..., begin:, :], visible)


class _ImplicitSolution(torch.autograd.Function):
    """The solution as a function of z = e + mu(u*): the identity forward, (de/du)^{-T} backward."""

    @staticmethod
    def forward(ctx: Any, noise: Tensor, solution: Tensor, attention: CausalAttention) -> Tensor:
        ctx.save_for_backward(noise, solution)
        ctx.attention = attention
        return solution.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        noise, u = ctx.saved_tensors
        with torch.no_grad():
            result = _back_substitute(ctx.attention, u, gradient)
        return first_order_only(result, noise, "the solution of u - mu(u) = e"), None, None


def _back_substitute(attention: CausalAttention, u: Tensor, gradient: Tensor) -> Tensor:
    r"""W with (de/du)^T w = g, last token first.

    The block (i, s), s < i, of de/du is :math:`-\sum_h \alpha_{is} [C + (o_s - \bar o_i)(A u_i)^T]`. The weights of a
    row exist while it is at work. Time O(H T^2 p), memory O(H T p). Derived here.
    """
    tokens = u.unsqueeze(-3)  # (*batch, 1, T, p)
    moved, pulled = tokens @ attention.ov_matrix.mT, tokens @ attention.qk_matrix  # o and g, (*batch, H, T, p)
    attraction = tokens @ attention.qk_matrix.mT  # A u_i
    nothing = moved.new_zeros(moved.shape[:-2])  # the diameters of a past are not asked for
    own = 1 if attention.mask == "inclusive" else 0
    remaining = gradient.clone()
    result = torch.empty_like(remaining)
    for i in reversed(range(u.shape[-2])):
        past = Context(attention, moved[..., :i, :], pulled[..., :i, :], (nothing, nothing), nothing[..., 0])
        _, jacobian = past.mean_and_jacobian(u[..., i, :])
        w = torch.linalg.solve(jacobian.mT, remaining[..., i, :])  # (*batch, p)
        result[..., i, :] = w
        if i == 0:
            break
        seen = i + own
        weights = attention_weights(tokens[..., i : i + 1, :], pulled[..., :seen, :])  # (*batch, H, 1, seen)
        average = weights @ moved[..., :seen, :]
        column = w[..., None, :, None]  # (*batch, 1, p, 1)
        carried = (attention.ov_matrix.mT @ column).mT  # C^T w, (*batch, H, 1, p)
        reach = (moved[..., :i, :] - average) @ column  # (o_s - obar_i) . w, (*batch, H, i, 1)
        pull = carried + reach * attraction[..., i : i + 1, :]  # (*batch, H, i, p)
        remaining[..., :i, :] += (weights[..., :i].mT * pull).sum(-3)
    return result
