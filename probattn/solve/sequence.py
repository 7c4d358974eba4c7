r"""Solving u_i = mu_i(u_<i, u_i) + eps_i for a whole sequence: many tokens at once, then one by one.

:mod:`probattn.solve.parallel` goes up to the first position where the solution is not known to be unique;
:mod:`probattn.solve.token` goes on from there. Both give the same sequence.
"""

from __future__ import annotations

import math
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

from probattn.errors import InputError, SeveralSolutionsWarning, require_finite
from probattn.interface import Attention
from probattn.solve.context import context_of
from probattn.solve.implicit import with_gradient
from probattn.solve.parallel import unique_prefix
from probattn.solve.selection import Selection, require_selection
from probattn.solve.token import solve_token

__all__ = ["Method", "find_sequence", "solve_sequence"]

Method = Literal["parallel", "sequential"]


def solve_sequence(
    attention: Attention, e: Tensor, *, selection: Selection = "unique", method: Method = "parallel"
) -> Tensor:
    r"""The sequence u with u - mu(u) = e.

    Args:
        attention: the attention.
        e: noise, ``(*batch, T, p)``.
        selection: the rule where several solutions exist, see :mod:`probattn.solve.selection`: "unique" raises, the
            others choose and warn with the number of draws and the positions. On a line all solutions are known. In
            several dimensions they are those that a search from a score of places finds, which can miss one; where a
            contraction certifies there is none.
        method: "parallel" solves for many tokens at once for as long as each has one solution; "sequential" solves
            token by token from the beginning. Same sequence, to tolerance, and same failures.

    Returns:
        u, the broadcast of the batch axes with (T, p). Differentiable once in e and in every parameter, by the
        implicit-function theorem (:mod:`probattn.solve.implicit`).
        Time O(H T^2 p) and a few p x p solves per token; memory linear in T, with the gradient too. The back
        substitution of the gradient is sequential in T.

    Raises:
        InputError: noise that does not fit or is not finite, an unknown selection or method.
        NoSolutionError: Newton's method did not reach tolerance (1000 machine epsilons, relative).
        SeveralSolutionsError: several solutions, under selection "unique".

    Example:
        >>> from probattn import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.5]]))
        >>> u = solve_sequence(attention, torch.tensor([[1.0], [-1.0], [0.3]]))
        >>> bool(torch.allclose(attention.residual(u), torch.tensor([[1.0], [-1.0], [0.3]]), atol=1e-5))
        True
    """
    if e.dim() < 2 or e.shape[-1] != attention.dim or e.dtype != attention.like.dtype:
        raise InputError(
            f"the noise has shape {tuple(e.shape)} and is {e.dtype}; it must be (*batch, T, {attention.dim}) and "
            f"{attention.like.dtype}, like the attention."
        )
    require_finite("the noise", e.detach())
    solution, several = find_sequence(attention.detach(), e.detach(), selection, method)
    if bool(several.any()):
        _warn(several, selection)
    return with_gradient(attention, e, solution) if torch.is_grad_enabled() else solution


@torch.no_grad()
def find_sequence(
    attention: Attention, e: Tensor, selection: Selection, method: Method = "parallel"
) -> tuple[Tensor, Tensor]:
    """The sequence and where it was one of several, without a gradient and without a warning.

    Args:
        attention: the attention.
        e: noise, ``(*batch, T, p)``.
        selection: see :func:`solve_sequence`.
        method: see :func:`solve_sequence`.

    Returns:
        u, the broadcast of the batch axes with (T, p), and the positions with more than one solution, ``(*batch, T)``.

    Raises:
        InputError, NoSolutionError, SeveralSolutionsError: see :func:`solve_sequence`.
    """
    require_selection(selection)
    if method not in get_args(Method):
        raise InputError(f"method is {method!r}; use one of {', '.join(map(repr, get_args(Method)))}.")
    batch = torch.broadcast_shapes(attention.batch_shape, e.shape[:-2])
    e = e.expand(*batch, *e.shape[-2:])
    context, u = context_of(attention, e[..., :0, :]), e[..., :0, :]
    if method == "parallel":
        context, u = unique_prefix(context, e)
    tokens, folded = [u], [torch.zeros(u.shape[:-1], dtype=torch.bool, device=u.device)]
    for i in range(context.length, e.shape[-2]):
        token, several = solve_token(context, e[..., i, :], selection, i)
        tokens.append(token.unsqueeze(-2))
        folded.append(several.unsqueeze(-1))
        context = context.extend(token)
    return torch.cat(tokens, dim=-2), torch.cat(folded, dim=-1)


def _warn(several: Tensor, selection: Selection) -> None:
    positions = sorted({int(i) for i in several.nonzero()[:, -1]})
    draws, total = int(several.any(-1).sum()), math.prod(several.shape[:-1])
    shown = ", ".join(map(str, positions[:8])) + (", ..." if len(positions) > 8 else "")
    warnings.warn(
        f"{draws} of {total} sequences had several solutions, at positions {shown}; one was taken by the rule "
        f"{selection!r}. The distribution of these draws is not the density that log_prob gives.",
        SeveralSolutionsWarning,
        stacklevel=3,
    )
