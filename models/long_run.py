r"""Long runs of many sequences at once, for the growth of their spread: the process itself, by the package's solver."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.distributions import noise_distribution
from probattn.errors import InputError, require_at_least
from probattn.numerics.random import isolated_seed
from probattn.solve.context import Context
from probattn.solve.selection import Selection
from probattn.solve.token import find_token

__all__ = ["LongRun", "long_run"]


class LongRun(NamedTuple):
    """Mean and spread of the tokens so far, at chosen lengths.

    Attributes:
        lengths: n, (K,).
        mean: mean of the tokens u_1..n, ``(K, *batch, N, p)``; inf for a sequence that has escaped.
        covariance: covariance of the tokens u_1..n about their mean (about zero in a symmetric run),
            ``(K, *batch, N, p, p)``; inf for a sequence that has escaped.
        escape: the first n at which the trace of the covariance exceeds the limit, inf where it does not,
            ``(*batch, N)``.
        unsolved: share of tokens for which no solution was reached.
        several: share of tokens with more than one known solution.
    """

    lengths: Tensor
    mean: Tensor
    covariance: Tensor
    escape: Tensor
    unsolved: float
    several: float


@torch.no_grad()
def long_run(
    attention: CausalAttention,
    noise_scale: float | Tensor,
    lengths: list[int],
    sequences: int,
    *,
    seed: int = 0,
    selection: Selection = "smallest_step",
    symmetric: bool = False,
    limit: Tensor | float = torch.inf,
) -> LongRun:
    r"""Run N sequences for each attention of a batch and record the covariance of the tokens at some lengths.

    The tokens are those of :class:`~probattn.process.AttentionProcess` with the same rule, solved side by side. Time
    O(H T^2 p^2) per sequence and a few Newton steps per token; memory O(H T p).

    Args:
        attention: batch axes ``(*batch,)``, strict or inclusive mask.
        noise_scale: sigma, a number or (p,).
        lengths: n at which to record, increasing.
        sequences: N.
        seed: random seed of the noise, which every attention of the batch shares; the global random state is left as
            it was.
        selection: rule where several solutions exist; "unique" takes what "smallest_step" does.
        symmetric: whether every token enters the past together with its negative, which holds the mean of the past at
            zero.
        limit: trace of the covariance above which a sequence has escaped and is not run further, ``(*batch,)``.

    Raises:
        InputError: lengths that do not increase from at least 1, or no sequences.

    Example:
        >>> from probattn.models.scalar import scalar_attention
        >>> run = long_run(scalar_attention(0.05), 1.0, [50, 100], sequences=20)
        >>> run.covariance.shape, run.unsolved, run.several
        (torch.Size([2, 20, 1, 1]), 0.0, 0.0)
    """
    if not lengths or min(lengths) < 1 or sorted(set(lengths)) != list(lengths):
        raise InputError(f"lengths is {lengths}; it must increase strictly from at least 1.")
    require_at_least("sequences", sequences)
    batch, last, dim, like = (*attention.batch_shape, sequences), lengths[-1], attention.dim, attention.query
    flat = torch.Size(batch).numel()  # all attentions and sequences side by side, B of them
    with isolated_seed(seed):
        noise = noise_distribution(noise_scale, last, dim, like=like).sample((sequences,))  # (N, T, p)
        uniform = torch.rand(sequences, last, dtype=like.dtype).to(like)
    noise, uniform = (
        noise.expand(*batch, last, dim).reshape(flat, last, dim),
        uniform.expand(*batch, last).reshape(flat, last),
    )
    limits = torch.as_tensor(limit, dtype=like.dtype, device=like.device).unsqueeze(-1).expand(batch).reshape(flat)
    context = Context.of(_one_per_sequence(attention, sequences), noise[:, :0])
    total, squares = like.new_zeros(flat, dim), like.new_zeros(flat, dim, dim)
    escape = like.new_full((flat,), torch.inf)
    alive = torch.arange(flat, device=like.device)  # the sequences that have not escaped: the rows of what follows
    means, covariances, count, unsolved, several = [], [], 0, 0, 0
    for n in range(1, last + 1):
        if len(alive):
            found = find_token(context, noise[alive, n - 1], selection, uniform[alive, n - 1])
            count, unsolved = count + len(alive), unsolved + int((~found.solved).sum())
            several += int(found.several.sum())
            context = context.extend(found.u)
            if symmetric:
                context = context.extend(-found.u)
            total, squares = total + found.u, squares + found.u.unsqueeze(-1) * found.u.unsqueeze(-2)
        centre = torch.zeros_like(total) if symmetric else total / n
        covariance = squares / n - centre.unsqueeze(-1) * centre.unsqueeze(-2)
        gone = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) > limits[alive]
        if bool(gone.any()):
            escape[alive[gone]] = n
            stay = (~gone).nonzero().squeeze(-1)
            context = context.select((stay,), context.batch_shape)
            total, squares, alive, covariance = total[stay], squares[stay], alive[stay], covariance[stay]
        if n in lengths:
            mean, spread = like.new_full((flat, dim), torch.inf), like.new_full((flat, dim, dim), torch.inf)
            mean[alive], spread[alive] = total / n, covariance
            means.append(mean.view(*batch, dim))
            covariances.append(spread.view(*batch, dim, dim))
    shares = unsolved / count, several / count
    return LongRun(torch.tensor(lengths), torch.stack(means), torch.stack(covariances), escape.view(batch), *shares)


def _one_per_sequence(attention: CausalAttention, sequences: int) -> CausalAttention:
    """The attention of each sequence, with a batch axis of all attentions times N."""
    if not attention.batch_shape:
        return attention.expand((sequences,))
    count = attention.batch_shape.numel() * sequences
    index = torch.arange(count, device=attention.query.device) // sequences
    return attention.expand(attention.batch_shape).select(torch.unravel_index(index, attention.batch_shape))
