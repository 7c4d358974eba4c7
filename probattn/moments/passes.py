"""Moments of the past in up to three passes: all rows at once, those that lost digits again, the rest one by one.

The first pass measures from the first token. Where rows lost digits by that, a second one measures from the token that
the first of these rows attends to most: later rows see that token too. What is left is computed row by row, as in
:mod:`probattn.moments.refine`. The way of a row, and so its value to the last bit, does not depend on later tokens. The
backward pass goes the same ways.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probattn.moments import blocked, cpu
from probattn.moments.problem import Problem
from probattn.moments.refine import Rows, lost_rows

__all__ = ["backward", "forward"]

_FIRST, _SECOND, _ALONE = range(3)  # passes by which a row may be computed

Three = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor | None, Tensor | None]


def forward(problem: Problem, gain: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Covariance, offset, log-sum and origin of :class:`probattn.moments.operators.OriginMoments`, and the passes.

    Args:
        problem: rows and tokens.
        gain: size of what the covariance will be multiplied by, (B or 1, K or 1, 1, 1); None: 1.

    Returns:
        The four tensors, and the pass by which each row was computed, (B, K, P, g), 8-bit integers.
    """
    way = torch.zeros(problem.query.shape[:-1], dtype=torch.int8, device=problem.query.device)
    if problem.cannot_lose(gain):
        return *_first_pass(problem), way
    shown, reached = problem.until_overflow()
    results = _first_pass(shown)
    lost = lost_rows(shown, *results[:3], gain)
    if bool(lost.any()):
        lost = _second_pass(shown, gain, lost, results, way)
    way.masked_fill_(lost | reached, _ALONE)
    for rows in Rows.of(problem, way == _ALONE):
        for whole, part in zip(results, (rows.covariance(), rows.offset, rows.log_sum, rows.origin), strict=True):
            whole[rows.place] = part
    return *results, way


def _first_pass(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Moments measured from the first token, and that token as the origin of the rows that see any."""
    covariance, offset, log_sum = _pass(problem)
    if not problem.key.shape[2]:
        return covariance, offset, log_sum, torch.zeros_like(offset)
    point = _point(problem, problem.value[:, :, :1, None], problem.key[:, :, :1, None])
    return covariance, offset, log_sum, torch.where(log_sum.isneginf().unsqueeze(-1), 0.0, point)


def _second_pass(
    problem: Problem, gain: Tensor | None, lost: Tensor, results: tuple[Tensor, ...], way: Tensor
) -> Tensor:
    """Compute lost rows from another origin, in place; return those that lost digits again."""
    units, rows = lost.flatten(2), lost[0, 0].numel()
    begin = int(units.any(1).any(0).nonzero()[0]) // lost.shape[3]  # the first position with a lost row
    first = torch.nn.functional.one_hot(units.int().argmax(-1), rows).bool() & units  # one row of each unit, or none
    points = results[3].new_zeros(*lost.shape[:2], results[3].shape[-1])
    for row in Rows.of(problem, first.view(lost.shape)):
        points[row.place[:2]] = row.origin
    late = problem.since(begin)
    moved = late.measured_from(points)
    found = _pass(moved)
    again = lost_rows(moved, *found, gain)
    kept = lost[:, :, begin:] & ~again
    sizes = (problem.value.shape[-1], problem.key.shape[-1])
    origin = _point(problem, *points[:, :, None, None].split(sizes, -1)).expand(found[1].shape)
    for whole, part in zip(results, (*found, origin), strict=True):
        whole[:, :, begin:][kept] = part[kept]
    way[:, :, begin:].masked_fill_(kept, _SECOND)
    lost = lost.clone()
    lost[:, :, begin:] &= ~kept
    return lost


def backward(gradients: Gradients, problem: Problem, origin: Tensor, way: Tensor) -> Three:
    """Gradients of query, key and value.

    Args:
        gradients: those of covariance, offset and log-sum; None: zero.
        problem: rows and tokens.
        origin: as returned by :func:`forward`.
        way: likewise.
    """
    if not bool(way.any()):
        return _pass_backward(gradients, problem)
    results = _pass_backward(*_only(gradients, problem.until_overflow()[0], way == _FIRST))
    second = way == _SECOND
    if bool(second.any()):
        units = second.flatten(2)
        row = units.int().argmax(-1)[..., None, None].expand(-1, -1, 1, origin.shape[-1])
        points = origin.flatten(2, 3).gather(2, row).squeeze(2)
        begin = int(units.any(1).any(0).nonzero()[0]) // second.shape[3]
        late = tuple(None if part is None else part[:, :, begin:] for part in gradients)
        chosen = _only(late, problem.until_overflow()[0].since(begin), second[:, :, begin:])  # type: ignore[arg-type]
        found = _pass_backward(chosen[0], chosen[1].measured_from(points))
        results[0][:, :, begin:] += found[0]
        for whole, part in zip(results[1:], found[1:], strict=True):
            whole += part[:, :, 1:]
    for rows in Rows.of(problem, way == _ALONE):
        gradient, on_mean, on_log = (None if part is None else part[rows.place] for part in gradients)
        on_mean = rows.offset.new_zeros(rows.offset.shape) if on_mean is None else on_mean
        to_query, *to_tokens = rows.backward(gradient, on_mean, on_log)
        results[0][rows.place] = to_query
        for whole, part in zip(results[1:], to_tokens, strict=True):
            whole[:, :, : part.shape[1]].index_put_(rows.place[:2], part, accumulate=True)
    return results


def _point(problem: Problem, value: Tensor, key: Tensor) -> Tensor:
    """The origin of means and log-sums at a token: under a cap, that of the keys is zero."""
    return torch.cat([value, torch.zeros_like(key) if problem.softcap else key], -1)


def _only(gradients: Gradients, problem: Problem, rows: Tensor) -> tuple[Gradients, Problem]:
    """The same with zeros in all other rows, which then take no part, not even as NaN."""
    kept = (
        None if part is None else part.where(rows.view(*rows.shape, *[1] * (part.dim() - 4)), 0.0) for part in gradients
    )
    return tuple(kept), problem._replace(query=problem.query.where(rows.unsqueeze(-1), 0.0))  # type: ignore[return-value]


def _pass(problem: Problem) -> Three:
    """Covariance, offset and log-sum of all rows, measured from the first token."""
    query, key, value, first, limit, mask, scale, softcap = problem
    if cpu.takes_moments(query, value, mask, softcap):
        return cpu.moments(query, key, value, first, limit, scale)
    if query.is_cuda:
        from probattn.moments import cuda  # it imports Triton, which only a GPU needs

        if cuda.supports(query, key, value, mask, softcap):
            return cuda.forward(query, key, value, first, limit, scale)
    return blocked.forward(problem)


def _pass_backward(gradients: Gradients, problem: Problem) -> Three:
    query, key, value, first, limit, mask, scale, softcap = problem
    if cpu.takes_moments(query, value, mask, softcap):
        return cpu.moments_backward(gradients, query, key, value, first, limit, scale)
    if query.is_cuda:
        from probattn.moments import cuda

        if cuda.supports(query, key, value, mask, softcap):
            return cuda.backward(gradients, query, key, value, first, limit, scale)
    return blocked.backward(gradients, problem)
