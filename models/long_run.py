r"""Long runs of many sequences at once, for the growth of their spread: one root a token, no search for others.

The root that is taken is the one that damped Newton steps reach from :math:`u = \epsilon`, as a numerical user of the
implicit equation would take it. Where the residual map does not fold it is the only one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.distributions import noise_distribution
from probattn.errors import InputError

__all__ = ["LongRun", "follow_root", "long_run"]

_ITERATIONS = 200
_HALVINGS = 6


class LongRun(NamedTuple):
    """Spread of the tokens so far, at chosen lengths.

    Attributes:
        lengths: n, (K,).
        mean: of the tokens u_1..n, (K, *batch, N, p).
        covariance: of the tokens u_1..n about their mean (about zero in a symmetric run), (K, *batch, N, p, p); inf
            for a sequence that has escaped.
        escape: the first n at which the trace of the covariance exceeds the limit, inf where it does not,
            (*batch, N).
        unsolved: share of tokens for which no root was reached.
    """

    lengths: Tensor
    mean: Tensor
    covariance: Tensor
    escape: Tensor
    unsolved: float


@torch.no_grad()
def long_run(
    attention: CausalAttention,
    noise_scale: float | Tensor,
    lengths: list[int],
    sequences: int,
    *,
    seed: int = 0,
    symmetric: bool = False,
    limit: Tensor | float = torch.inf,
) -> LongRun:
    r"""Run N sequences for each attention of a batch and record the covariance of the tokens at some lengths.

    O(H T^2 p^2) a sequence and a few Newton steps a token; memory O(H T p).

    Args:
        attention: batch axes (*batch,), strict or inclusive mask.
        noise_scale: sigma, a number or (p,).
        lengths: n at which to record, increasing.
        sequences: N.
        seed: of the noise, which every attention of the batch shares; the global random state is left as it was.
        symmetric: every token enters the past together with its negative, which holds the mean of the past at zero.
        limit: a sequence whose covariance has a larger trace has escaped and is not run further, (*batch,).

    Raises:
        InputError: lengths that do not increase from at least 1, or no sequences.

    Example:
        >>> from probattn.models.scalar import scalar_attention
        >>> run = long_run(scalar_attention(0.05), 1.0, [50, 100], sequences=20)
        >>> run.covariance.shape, run.unsolved
        (torch.Size([2, 20, 1, 1]), 0.0)
    """
    if not lengths or min(lengths) < 1 or sorted(set(lengths)) != list(lengths):
        raise InputError(f"lengths is {lengths}; it must increase strictly from at least 1.")
    if sequences < 1:
        raise InputError(f"sequences is {sequences}; it must be at least 1.")
    dim, heads, last = attention.dim, attention.query.shape[-3], lengths[-1]
    like = attention.query
    batch = (*attention.batch_shape, sequences)
    flat = torch.Size(batch).numel()  # all attentions and sequences side by side, B of them
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        noise = noise_distribution(noise_scale, last, dim, like=like).sample((sequences,))  # (N, T, p)
    noise = noise.expand(*batch, last, dim).reshape(flat, last, dim)
    ov_matrix, qk_matrix = (_side_by_side(part, batch, 3) for part in (attention.ov_matrix, attention.qk_matrix))
    start = _side_by_side(attention.start, batch, 1)
    limits = torch.as_tensor(limit, dtype=like.dtype).unsqueeze(-1).expand(batch).reshape(flat)
    inclusive, copies = attention.mask == "inclusive", 2 if symmetric else 1
    moved = like.new_zeros(flat, heads, copies * last, dim)
    pulled = torch.zeros_like(moved)
    total, squares = like.new_zeros(flat, dim), like.new_zeros(flat, dim, dim)
    escape = like.new_full((flat,), torch.inf)
    alive = torch.arange(flat)  # the sequences that have not escaped; the arrays above but escape hold these alone
    means, covariances, solved, unsolved = [], [], 0, 0
    for n in range(1, last + 1):
        if len(alive):
            eps = noise[:, n - 1]
            if n == 1 and not inclusive:
                u = eps + start
            else:
                filled = copies * (n - 1)
                own = (ov_matrix, qk_matrix) if inclusive else None
                u, missed = follow_root(moved[..., :filled, :], pulled[..., :filled, :], eps, own)
                unsolved += missed
            solved += len(alive)
            row = u.unsqueeze(-2).unsqueeze(-2)  # (B, 1, 1, p)
            for copy in range(copies):
                place = copies * (n - 1) + copy
                moved[..., place, :] = (1 - 2 * copy) * (row @ ov_matrix.mT).squeeze(-2)
                pulled[..., place, :] = (1 - 2 * copy) * (row @ qk_matrix).squeeze(-2)
            total, squares = total + u, squares + u.unsqueeze(-1) * u.unsqueeze(-2)
        centre = torch.zeros_like(total) if symmetric else total / n
        covariance = squares / n - centre.unsqueeze(-1) * centre.unsqueeze(-2)
        gone = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) > limits
        if bool(gone.any()):
            escape[alive[gone]] = n
            stay = ~gone
            noise, ov_matrix, qk_matrix, start, limits, moved, pulled, total, squares, alive, covariance = (
                part[stay]
                for part in (
                    noise,
                    ov_matrix,
                    qk_matrix,
                    start,
                    limits,
                    moved,
                    pulled,
                    total,
                    squares,
                    alive,
                    covariance,
                )
            )
        if n in lengths:
            mean, spread = like.new_full((flat, dim), torch.inf), like.new_full((flat, dim, dim), torch.inf)
            mean[alive], spread[alive] = total / n, covariance
            means.append(mean.view(*batch, dim))
            covariances.append(spread.view(*batch, dim, dim))
    return LongRun(
        torch.tensor(lengths), torch.stack(means), torch.stack(covariances), escape.view(batch), unsolved / solved
    )


def _side_by_side(part: Tensor, batch: tuple[int, ...], event: int) -> Tensor:
    """A parameter with ``event`` axes of its own, once for each attention and sequence, (B, *event)."""
    own = part.shape[part.dim() - event :]
    return part.view(*part.shape[: part.dim() - event], 1, *own).expand(*batch, *own).reshape(-1, *own)


def _mean_and_slope(
    moved: Tensor, pulled: Tensor, u: Tensor, own: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Attention mean, (B, p), and its derivative, (B, p, p)."""
    query = u.unsqueeze(-2).unsqueeze(-1)  # (B, 1, p, 1)
    row = u.unsqueeze(-2).unsqueeze(-2)  # (B, 1, 1, p)
    if own is not None:
        ov_matrix, qk_matrix = own
        moved = torch.cat([moved, row @ ov_matrix.mT], dim=-2)
        pulled = torch.cat([pulled, row @ qk_matrix], dim=-2)
    weights = torch.softmax((pulled @ query).squeeze(-1), dim=-1).unsqueeze(-2)  # (B, H, 1, n)
    average = weights @ moved  # (B, H, 1, p)
    key = weights @ pulled
    slope = (weights * moved.mT) @ pulled - average.mT * key  # Cov(o, g), (B, H, p, p)
    if own is not None:
        attraction = row @ own[1].mT
        slope = slope + weights[..., -1:] * (own[0] + (moved[..., -1:, :] - average).mT @ attraction)
    return average.squeeze(-2).sum(-2), slope.sum(-3)


def follow_root(moved: Tensor, pulled: Tensor, eps: Tensor, own: tuple[Tensor, Tensor] | None) -> tuple[Tensor, int]:
    """The root that damped Newton steps reach from u = eps, (B, p), and how many of the B reached none."""
    solution = eps.clone()
    index = torch.arange(len(eps), device=eps.device)  # those still to solve
    u, (mean, slope) = eps, _mean_and_slope(moved, pulled, eps, own)
    identity = torch.eye(eps.shape[-1], dtype=eps.dtype, device=eps.device)
    for _ in range(_ITERATIONS):
        residual = u - mean - eps
        norm = torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        active = (norm > _tolerance(u)).squeeze(-1)
        if not bool(active.all()):
            solution[index] = u
            index = index[active]
            if not len(index):
                return solution, 0
            moved, pulled, eps, u, residual, norm, slope = (
                part[active] for part in (moved, pulled, eps, u, residual, norm, slope)
            )
            own = None if own is None else (own[0][active], own[1][active])
        step, _ = torch.linalg.solve_ex(identity - slope, residual.unsqueeze(-1))
        step = torch.where(torch.isfinite(step.squeeze(-1)), step.squeeze(-1), residual)
        size = torch.ones_like(norm)
        for _ in range(_HALVINGS):
            trial = u - size * step
            mean, slope = _mean_and_slope(moved, pulled, trial, own)
            worse = ~(torch.linalg.vector_norm(trial - mean - eps, dim=-1, keepdim=True) < norm)
            if not bool(worse.any()):
                break
            size = torch.where(worse, size / 2, size)
        else:
            # No step of Newton's helps there, at a fold: one plain step of the iteration u <- mu(u) + eps.
            trial = torch.where(worse, u - residual, trial)
            mean, slope = _mean_and_slope(moved, pulled, trial, own)
        u = trial
    solution[index] = u
    return solution, len(index)


def _tolerance(u: Tensor) -> Tensor:
    size: Tensor = 1 + torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    return 1e4 * torch.finfo(u.dtype).eps * size
