"""Moments of the past with torch alone, one block of rows at a time: for all that the compiled kernels do not cover.

The formulas are those of :mod:`probattn.moments.operators`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from probattn.moments.dense import past_weights
from probattn.moments.problem import Problem

__all__ = ["backward", "forward"]

# Numbers that a block may hold, of weights and of products v (x) k: small enough for the cache of a CPU.
_WEIGHTS, _PRODUCTS = 1 << 20, 1 << 20
_ROWS, _TOKENS = 128, 32  # rows in a block, and the fewest tokens whose products are formed together


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance, offset and log-sum of all rows, measured from the first token."""
    query, value = problem.query, problem.value
    size, rank = value.shape[-1], query.shape[-1]
    covariance = query.new_zeros(*query.shape[:-1], size, rank)
    offset = query.new_zeros(*query.shape[:-1], size + rank)
    log_sum = query.new_full(query.shape[:-1], -torch.inf)
    for block in _blocks(problem):
        parts = block.moments()
        for whole, part in zip((covariance, offset, log_sum), parts, strict=True):
            whole[block.batch, :, block.rows] = part.view(*block.shape, *whole.shape[4:])
    return covariance, offset, log_sum


def backward(gradients: tuple[Tensor, Tensor | None, Tensor | None], problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from those of the three, None for zero; contiguous."""
    to_query, to_key, to_value = (torch.zeros_like(part, memory_format=torch.contiguous_format) for part in problem[:3])
    for block in _blocks(problem):
        # (b, K, R, dv, r), (b, K, R, dv + r) and (b, K, R)
        coming, on_mean, on_log = (
            None if part is None else part[block.batch, :, block.rows].flatten(2, 3) for part in gradients
        )
        assert coming is not None
        q, k, v = block.backward(coming, on_mean, on_log)
        to_query[block.batch, :, block.rows] = q.view(*block.shape, q.shape[-1])
        to_key[block.batch, :, : k.shape[2]] += k
        to_value[block.batch, :, : v.shape[2]] += v
    return to_query, to_key, to_value


def _blocks(problem: Problem) -> Iterator[_Block]:
    """Blocks of rows with the tokens that any of them may see."""
    batch, heads, positions, group, _ = problem.query.shape
    if 0 in problem.query.shape or 0 in problem.key.shape:
        return
    step = max(1, _ROWS // group)
    limits = problem.limit.tolist()
    for begin in range(0, positions, step):
        rows = slice(begin, min(begin + step, positions))
        seen = limits[rows.stop - 1]
        count = max(1, _WEIGHTS // max(1, heads * (rows.stop - begin) * group * seen))
        for start in range(0, batch, count):
            yield _Block.build(problem, slice(start, min(start + count, batch)), rows, limits[rows])


class _Block(NamedTuple):
    """A block of rows of a part of the batch.

    Attributes:
        batch, rows: part of the batch, and positions of the block.
        limits: limits of the positions, not decreasing.
        shape: (b, K, positions, g).
        query: c q, (b, K, R, r).
        key, value: of the tokens seen, (b, K, S, r) and (b, K, S, dv), less a constant that changes nothing.
        alpha: weights, (b, K, R, S).
        log_sum: of the exponentials of a row's logits, (b, K, R).
        slope: of the cap, (b, K, R, S); None without one.
        pull: the second derivative of the cap over its first, (b, K, R, S).
    """

    batch: slice
    rows: slice
    limits: list[int]
    shape: tuple[int, int, int, int]
    scale: float
    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor
    log_sum: Tensor
    slope: Tensor | None
    pull: Tensor | None

    @classmethod
    def build(cls, problem: Problem, batch: slice, rows: slice, limits: list[int]) -> _Block:
        """Weights of the block."""
        seen = limits[-1]
        query = problem.query[batch, :, rows]  # (b, K, positions, g, r)
        shape = tuple(query.shape[:-1])
        query = problem.scale * query.flatten(2, 3)  # (b, K, R, r)
        key, value = problem.key[batch, :, :seen], problem.value[batch, :, :seen]
        # Neither weights nor covariance change when a constant is subtracted, but logits and the difference of two
        # large products lose digits when the tokens share a large offset. Under a cap only the values may be moved: it
        # bends the logits, and its slopes do not sum to one.
        value = value - problem.value[batch, :, :1]
        if not problem.softcap:
            key = key - problem.key[batch, :, :1]
        slope = pull = None
        logits = query @ key.mT  # (b, K, R, S)
        if problem.softcap:
            bent = torch.tanh(logits / problem.softcap)
            logits, slope = problem.softcap * bent, 1 - bent.square()
            pull = -2 / problem.softcap * bent
        mask = problem.mask
        if mask is not None:
            mask = mask[batch if mask.shape[0] > 1 else slice(None), :, rows, :seen]
        alpha, log_sum = past_weights(logits, problem.first[rows], problem.limit[rows], mask)
        return cls(batch, rows, limits, shape, problem.scale, query, key, value, alpha, log_sum, slope, pull)  # type: ignore[arg-type]

    def weights(self) -> Tensor:
        """Weight of each key, (b, K, R, S)."""
        return self.alpha if self.slope is None else self.alpha * self.slope

    def products(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Stretches of tokens, the rows that see any of them, and [v_s (x) k_s, k_s], (b, K, S', (dv + 1) r)."""
        size = self.key.shape[0] * self.key.shape[1] * self.key.shape[-1] * (self.value.shape[-1] + 1)
        step = max(_TOKENS, min(self.key.shape[2], _PRODUCTS // max(1, size)))
        for start in range(0, self.key.shape[2], step):
            part = slice(start, start + step)
            key = self.key[:, :, part].unsqueeze(-2)  # (b, K, S', 1, r)
            rows = torch.cat([self.value[:, :, part].unsqueeze(-1) * key, key], dim=-2)
            yield part, slice(self.shape[-1] * bisect_right(self.limits, start), None), rows.flatten(-2)

    def moments(self) -> tuple[Tensor, Tensor, Tensor]:
        """C, (b, K, R, dv, r), means less the first token, (b, K, R, dv + r), and log-sums from there, (b, K, R)."""
        weights = self.weights()
        size, rank = self.value.shape[-1], self.key.shape[-1]
        both = weights.new_zeros(*weights.shape[:-1], (size + 1) * rank)
        for part, late, rows in self.products():
            both[:, :, late] += weights[:, :, late, part] @ rows
        both = both.unflatten(-1, (size + 1, rank))  # second moment and, in the last row, the mean of the keys
        mean_value, mean_key = self.alpha @ self.value, both[..., -1, :]
        covariance = both[..., :-1, :] - mean_value.unsqueeze(-1) * mean_key.unsqueeze(-2)
        seen = ~self.log_sum.isneginf()
        offset = torch.cat([mean_value, mean_key], -1).where(seen.unsqueeze(-1), 0.0)
        return covariance.where(seen[..., None, None], 0.0), offset, self.log_sum

    def backward(
        self, gradient: Tensor, on_mean: Tensor | None, on_log: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value from those of the three of :meth:`moments`."""
        weights = self.weights()
        mean_value, mean_key = self.alpha @ self.value, weights @ self.key
        on_value = -(gradient @ mean_key.unsqueeze(-1)).squeeze(-1)  # of the mean value, (b, K, R, dv)
        on_key = -(mean_value.unsqueeze(-2) @ gradient)  # of the mean key, (b, K, R, 1, r)
        if on_mean is not None:
            direct = on_mean.split([self.value.shape[-1], self.key.shape[-1]], -1)
            on_value, on_key = on_value + direct[0], on_key + direct[1].unsqueeze(-2)
        flat = torch.cat([gradient, on_key], dim=-2).flatten(-2)  # as the rows of products()
        to_value = self.alpha.mT @ on_value
        to_weights, to_key = weights.new_zeros(weights.shape), torch.zeros_like(self.key)
        for part, late, rows in self.products():
            to_weights[:, :, late, part] = flat[:, :, late] @ rows.mT
            outer = (weights[:, :, late, part].mT @ flat[:, :, late]).unflatten(
                -1, (-1, self.key.shape[-1])
            )  # (b, K, S', dv + 1, r)
            to_value[:, :, part] += (outer[..., :-1, :] @ self.key[:, :, part].unsqueeze(-1)).squeeze(-1)
            to_key[:, :, part] = (self.value[:, :, part].unsqueeze(-2) @ outer[..., :-1, :]).squeeze(-2)
            to_key[:, :, part] += outer[..., -1, :]
        to_alpha = on_value @ self.value.mT
        to_alpha += to_weights if self.slope is None else to_weights * self.slope
        to_logits = torch.ops.aten._softmax_backward_data(to_alpha, self.alpha, -1, self.alpha.dtype)
        if self.slope is not None:  # of l through tanh, and through the slope itself
            assert self.pull is not None
            to_logits = self.slope * (to_logits + self.alpha * to_weights * self.pull)
        if on_log is not None:
            to_logits = to_logits + on_log.unsqueeze(-1) * weights  # zero in a row that sees nothing
        to_query = (to_logits @ self.key).where(~self.log_sum.isneginf().unsqueeze(-1), 0.0)
        return self.scale * to_query, to_key + to_logits.mT @ self.query, to_value
