"""The kernels of :mod:`probattn.moments.cuda`, which has their formulas and launches them.

A program owns a block of rows or of tokens of one head and one tile of the columns; see there for what the tiles are.
Where there is no Triton the names exist and cannot be launched.
"""

# ruff: noqa: ANN001, ANN201, ANN202  a kernel's arguments are typed by Triton when it is called
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore
    from triton.language import constexpr  # the name by which Triton knows an argument of compile time
except ImportError:  # there is none for this system
    triton = None

AVAILABLE = triton is not None

__all__ = ["AVAILABLE", "covariance", "summary", "to_rows", "to_tokens"]


def _kernel(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


@_kernel
def _load(source, index, here, start, end, stride, SIZE: constexpr):
    """Columns start <= j < start + SIZE of some rows, zero from `end` on and where a row is not here."""
    column = start + tl.arange(0, SIZE)
    inside = here[:, None] & (column < end)[None, :]
    return tl.load(source + index[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@_kernel
def _wide(source, last, index, here, tile, DV: constexpr, R: constexpr, WIDTH: constexpr, PLAIN: constexpr):
    """A tile of z from rows [v | k] at `source`; `last` holds the k."""
    if PLAIN:
        result = _load(source, index, here, 0, DV + R, DV + R, WIDTH)
    else:
        DIMS: constexpr = WIDTH // last.shape[1]
        value = _load(source, index, here, tile * DIMS, DV, DV + R, DIMS)
        result = tl.reshape(value[:, :, None] * last[:, None, :], (last.shape[0], WIDTH))
    return result


@_kernel
def _columns(tile, DV: constexpr, R: constexpr, RANK: constexpr, WIDTH: constexpr):
    """Columns of a tile within a row of dv times r numbers, and a mask of those that exist."""
    d, a = tile * (WIDTH // RANK) + tl.arange(0, WIDTH) // RANK, tl.arange(0, WIDTH) % RANK
    return d * R + a, (d < DV) & (a < R)


@_kernel
def _upstream(
    source, row, here, tile, DV: constexpr, R: constexpr, RANK: constexpr, WIDTH: constexpr, PLAIN: constexpr
):
    """A tile of W."""
    if PLAIN:
        result = _load(source, row, here, 0, DV + R, DV + R, WIDTH)
    else:
        place, exists = _columns(tile, DV, R, RANK, WIDTH)
        inside = here[:, None] & exists[None, :]
        result = tl.load(source + row.to(tl.int64)[:, None] * (DV * R) + place[None, :], mask=inside, other=0.0)
    return result.to(tl.float32)


@_kernel
def _view(first, limit, row, rows, group):
    """Mask of the rows that exist, and the tokens they see; a row that does not exist sees none."""
    here = row < rows
    begin = tl.load(first + row // group, mask=here, other=2147483647)
    return here, begin, tl.load(limit + row // group, mask=here, other=0)


@_kernel
def _weights(one, other, token, begin, end, log_sum, PRECISION: constexpr):
    """Alpha; of its axes rows may be either."""
    logits = tl.dot(one, tl.trans(other), input_precision=PRECISION)
    return tl.where((token >= begin) & (token < end), tl.exp(logits - log_sum), 0.0)


@_kernel
def summary(
    q, first, limit, z, mean, log_sum, scale, rows, seen, group, blocks,
    DV: constexpr, R: constexpr, RANK: constexpr, WIDTH: constexpr, PLAIN: constexpr, OWN: constexpr,
    OTHER: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """Averages of [v | k] and log-sum-exps of a block of rows, in one pass over the tokens."""
    head = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * OWN + tl.arange(0, OWN)
    here, begin, end = _view(first, limit, row, rows, group)
    query = scale * _load(q + head * rows * R, row, here, 0, R, R, RANK)
    z += head * seen * (DV + R)
    highest = tl.full((OWN,), float("-inf"), tl.float32)
    total = tl.zeros((OWN,), tl.float32)
    average = tl.zeros((OWN, WIDTH), tl.float32)
    stop = tl.minimum(tl.max(end), seen)
    for start in range(tl.min(begin), stop, OTHER):
        token = start + tl.arange(0, OTHER)
        key = _load(z, token, token < stop, DV, DV + R, DV + R, RANK)
        logits = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        visible = (token[None, :] >= begin[:, None]) & (token[None, :] < end[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: -inf - 0, not -inf - -inf
        weight, fade = tl.exp(logits - level[:, None]), tl.exp(highest - level)
        total = total * fade + tl.sum(weight, 1)
        wide = _wide(z, key, token, token < stop, 0, DV, R, WIDTH, PLAIN)
        average = tl.dot(weight, wide, average * fade[:, None], input_precision=PRECISION)
        highest = higher
    column = tl.arange(0, WIDTH)
    place = (head * rows + row)[:, None] * (DV + R) + column[None, :]
    total = tl.where(highest == float("-inf"), 1.0, total)  # where nothing is seen all is zero
    average /= total[:, None]
    tl.store(mean + place, average, mask=here[:, None] & (column < DV + R)[None, :])
    tl.store(log_sum + head * rows + row, tl.where(highest == float("-inf"), 0.0, highest) + tl.log(total), mask=here)


@_kernel
def covariance(
    q, first, limit, z, mean, log_sum, out, scale, rows, seen, group, blocks,
    DV: constexpr, R: constexpr, RANK: constexpr, WIDTH: constexpr, PLAIN: constexpr, OWN: constexpr,
    OTHER: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """A tile of C for a block of rows."""
    head, tile = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) % blocks * OWN + tl.arange(0, OWN)
    here, begin, end = _view(first, limit, row, rows, group)
    query = scale * _load(q + head * rows * R, row, here, 0, R, R, RANK)
    level = tl.load(log_sum + head * rows + row, mask=here, other=0.0)
    z += head * seen * (DV + R)
    moment = tl.zeros((OWN, WIDTH), tl.float32)
    stop = tl.minimum(tl.max(end), seen)
    for start in range(tl.min(begin), stop, OTHER):
        token = start + tl.arange(0, OTHER)
        key = _load(z, token, token < stop, DV, DV + R, DV + R, RANK)
        alpha = _weights(query, key, token[None, :], begin[:, None], end[:, None], level[:, None], PRECISION)
        wide = _wide(z, key, token, token < stop, tile, DV, R, WIDTH, PLAIN)
        moment = tl.dot(alpha, wide, moment, input_precision=PRECISION)
    mean += head * rows * (DV + R)
    mean_key = _load(mean, row, here, DV, DV + R, DV + R, RANK)
    moment -= _wide(mean, mean_key, row, here, tile, DV, R, WIDTH, PLAIN)
    moment = tl.where((begin < end)[:, None], moment, 0.0)  # where the first token is NaN and nothing is seen
    place, exists = _columns(tile, DV, R, RANK, WIDTH)
    where = (head * rows + row)[:, None] * (DV * R) + place[None, :]
    tl.store(out + where, moment.to(out.dtype.element_ty), mask=here[:, None] & exists[None, :])


@_kernel
def to_rows(
    q, first, limit, z, log_sum, upstream, weighed, total, scale, rows, seen, group, blocks,
    DV: constexpr, R: constexpr, RANK: constexpr, WIDTH: constexpr, PLAIN: constexpr, OWN: constexpr,
    OTHER: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """A tile's share of sum_s alpha_is x_is [k_s | 1] for a block of rows."""
    head, tile = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(1)
    row = tl.program_id(0) % blocks * OWN + tl.arange(0, OWN)
    here, begin, end = _view(first, limit, row, rows, group)
    query = scale * _load(q + head * rows * R, row, here, 0, R, R, RANK)
    level = tl.load(log_sum + head * rows + row, mask=here, other=0.0)
    z += head * seen * (DV + R)
    size = DV + R if PLAIN else DV * R
    coming = _upstream(upstream + head * rows * size, row, here, tile, DV, R, RANK, WIDTH, PLAIN)
    by_key = tl.zeros((OWN, RANK), tl.float32)
    by_one = tl.zeros((OWN,), tl.float32)
    stop = tl.minimum(tl.max(end), seen)
    for start in range(tl.min(begin), stop, OTHER):
        token = start + tl.arange(0, OTHER)
        key = _load(z, token, token < stop, DV, DV + R, DV + R, RANK)
        alpha = _weights(query, key, token[None, :], begin[:, None], end[:, None], level[:, None], PRECISION)
        wide = _wide(z, key, token, token < stop, tile, DV, R, WIDTH, PLAIN)
        part = alpha * tl.dot(coming, tl.trans(wide), input_precision=PRECISION)
        by_one += tl.sum(part, 1)
        by_key = tl.dot(part, key, by_key, input_precision=PRECISION)
    share = (tile * (tl.num_programs(0) // blocks) + head) * rows + row
    column = tl.arange(0, RANK)
    tl.store(weighed + share[:, None] * R + column[None, :], by_key, mask=here[:, None] & (column < R)[None, :])
    tl.store(total + share, by_one, mask=here)


@_kernel
def to_tokens(
    q, first, limit, z, log_sum, upstream, inner, spans, to_key, to_other, scale, rows, seen, group, blocks,
    DV: constexpr, R: constexpr, RANK: constexpr, WIDTH: constexpr, PLAIN: constexpr, OWN: constexpr,
    OTHER: constexpr, PRECISION: constexpr,
):  # fmt: skip
    """A tile's share of the gradients of a block of tokens: all of dv's part, or of [v | k] directly."""
    block, head = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    tile = tl.program_id(1)
    token = block * OWN + tl.arange(0, OWN)
    # What no row sees may be anything, and does not enter.
    valid = token < tl.minimum(tl.load(limit + (rows - 1) // group, mask=rows > 0, other=0), seen)
    z += head * seen * (DV + R)
    key = _load(z, token, valid, DV, DV + R, DV + R, RANK)
    wide = _wide(z, key, token, valid, tile, DV, R, WIDTH, PLAIN)
    q += head * rows * R
    upstream += head * rows * (DV + R if PLAIN else DV * R)
    summed = tl.zeros((OWN, WIDTH), tl.float32)  # alpha^T W
    by_query = tl.zeros((OWN, RANK), tl.float32)
    for start in range(tl.load(spans + 2 * block), tl.load(spans + 2 * block + 1), OTHER):
        row = start + tl.arange(0, OTHER)
        here, begin, end = _view(first, limit, row, rows, group)
        query = scale * _load(q, row, here, 0, R, R, RANK)
        level = tl.load(log_sum + head * rows + row, mask=here, other=0.0)
        alpha = _weights(key, query, token[:, None], begin[None, :], end[None, :], level[None, :], PRECISION)
        coming = _upstream(upstream, row, here, tile, DV, R, RANK, WIDTH, PLAIN)
        slope = tl.dot(wide, tl.trans(coming), input_precision=PRECISION)
        if PLAIN:
            slope -= tl.load(inner + head * rows + row, mask=here, other=0.0)[None, :]
        summed = tl.dot(alpha, coming, summed, input_precision=PRECISION)
        by_query = tl.dot(alpha * slope, query, by_query, input_precision=PRECISION)
    exists = token < seen
    if PLAIN:
        column = tl.arange(0, WIDTH)
        place = (head * seen + token)[:, None] * (DV + R) + column[None, :]
        tl.store(to_other + place, summed, mask=exists[:, None] & (column < DV + R)[None, :])
    else:  # sum_i alpha_is G_i, once times k_s and once times v_s
        DIMS: constexpr = WIDTH // RANK
        moment = tl.reshape(summed, (OWN, DIMS, RANK))
        value = _load(z, token, valid, tile * DIMS, DV, DV + R, DIMS)
        by_query += tl.sum(moment * value[:, :, None], 1)
        column = tile * DIMS + tl.arange(0, DIMS)
        place = (head * seen + token)[:, None] * DV + column[None, :]
        tl.store(to_other + place, tl.sum(moment * key[:, None, :], 2), mask=exists[:, None] & (column < DV)[None, :])
    column = tl.arange(0, RANK)
    share = (tile * (tl.num_programs(0) // blocks) + head) * seen + token
    tl.store(to_key + share[:, None] * R + column[None, :], by_query, mask=exists[:, None] & (column < R)[None, :])
