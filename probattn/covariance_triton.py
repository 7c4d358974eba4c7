r"""Covariances of the past on CUDA: the sums of :mod:`probattn.covariance` as kernels in Triton.

Everything is an average, under the weights, of wide rows that exist for one block of tokens at a time,

.. math::
    z_s = [\, v_s \otimes k_s \;|\; v_s \;|\; k_s \,], \quad
    \sum_s \alpha_{is} z_s = [\, M_i \;|\; \bar v_i \;|\; \bar k_i \,], \quad C_i = M_i - \bar v_i \bar k_i^T .

With :math:`G_i = \partial L / \partial C_i` the gradient of that average is
:math:`W_i = [\, G_i \;|\; -G_i \bar k_i \;|\; -G_i^T \bar v_i \,]`, and the rest is the backward pass of any attention,

.. math::
    x_{is} = \langle W_i, z_s \rangle, \quad D_i = \sum_s \alpha_{is} x_{is}, \quad
    \frac{\partial L}{\partial l_{is}} = \alpha_{is} (x_{is} - D_i), \quad
    \frac{\partial L}{\partial z_s} = \sum_i \alpha_{is} W_i .

A row of :math:`r d_v` numbers fits in no register file, so a program owns a block of rows (or of tokens) and one tile
of the columns: some dimensions of v times all of k, or [v | k], the plain tile. All sums are linear in the tiles: every
program writes its own share, and the shares are added in a fixed order. Nothing is atomic; two runs agree bit by bit.
The weights come back from their log-sum-exp. Of products of rows x tokens x r dv there is one forward and three
backward; the shares take r / 128 of the memory of G.

Sums are in float32 whatever the input. float32 inputs are multiplied as float32 unless
:func:`torch.set_float32_matmul_precision` allows TF32, 16-bit inputs as TF32, which is finer than they are.
Derived here. Checked in Triton's interpreter on a CPU and compiled for compute capabilities 8.0 to 10.0; **not yet run,
let alone timed, on a GPU**.
"""

# ruff: noqa: ANN001, ANN202  a kernel's arguments are typed by Triton when it is called
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton  # type: ignore
    import triton.language as tl  # type: ignore
    from triton.language import constexpr  # the name by which Triton knows an argument of compile time
except ImportError:  # there is none for this system; supports() says no
    triton = None

__all__ = ["LARGEST", "Statistics", "backward", "forward", "supports"]

LARGEST = 64  # r and dv
_OWN, _COLUMNS = 64, 128  # rows or tokens of a program, and columns of a tile
_REAL = (torch.float16, torch.bfloat16, torch.float32)
# Tokens or rows that a program takes at a time, and warps: what compiles for compute capability 9.0 without spilling
# registers worth speaking of.
_SHAPE = {"ieee": (16, 8), "tf32": (32, 4)}


class Statistics(NamedTuple):
    """What the forward pass leaves for the backward pass.

    Attributes:
        tokens: [v_s | k_s] less those of the first token, which changes no covariance, (B K, S, dv + r), float32.
        mean: their averages [vbar_i | kbar_i], (B K, P g, dv + r), float32.
        log_sum: of the exponentials of a row's logits, 0 for a row that sees nothing, (B K, P g), float32.
    """

    tokens: Tensor
    mean: Tensor
    log_sum: Tensor


def supports(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float | None) -> bool:
    """Whether the kernels cover a covariance of the past; where they do not, compute it with torch.

    They want Triton, an NVIDIA GPU with compute capability 8.0 or more, one dtype among float32, bfloat16 and float16,
    r and dv up to LARGEST, no mask beside first and limit, and no cap on the logits.

    Args:
        query: q, (B, K, P, g, r).
        key: k, (B, K, S, r).
        value: v, (B, K, S, dv).
        mask: as in :func:`probattn.covariance.past_covariance`.
        softcap: likewise; None or 0 for none.

    Example:
        >>> q, k = torch.zeros(1, 1, 2, 1, 4), torch.zeros(1, 1, 2, 4)
        >>> supports(q, k, k, None, None)  # on the CPU
        False
    """
    if triton is None or query.device.type != "cuda" or torch.version.hip is not None:
        return False
    plain = mask is None and not softcap and query.dtype in _REAL and key.dtype == value.dtype == query.dtype
    small = query.shape[-1] <= LARGEST and value.shape[-1] <= LARGEST
    return plain and small and torch.cuda.get_device_capability(query.device) >= (8, 0)


def forward(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, limit: Tensor, scale: float
) -> tuple[Tensor, Statistics]:
    """C as in :func:`probattn.covariance.past_covariance`, same arguments and shapes, and what `backward` can reuse.

    Args:
        query: q, (B, K, P, g, r), any strides, of one dtype with key and value.
        key: k, (B, K, S, r).
        value: v, (B, K, S, dv).
        first: (P,).
        limit: (P,), not decreasing.
        scale: c.

    Returns:
        C, (B, K, P, g, dv, r), summed in float32, in the dtype of query; and the statistics.

    Example:
        >>> covariance, statistics = forward(query, key, value, first, limit, 0.125)  # doctest: +SKIP
    """
    problem = _Problem.build(query, key, value, first, limit, scale)
    covariance = query.new_empty(*query.shape[:-1], value.shape[-1], query.shape[-1])
    statistics = problem.statistics()
    problem.launch(_covariance, problem.tiles, *statistics, covariance)
    return covariance, statistics


def backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    scale: float,
    statistics: Statistics | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from that of C.

    Args:
        gradient: G, (B, K, P, g, dv, r), any strides.
        query: this and the next five as in `forward`.
        key: k.
        value: v.
        first: (P,).
        limit: (P,).
        scale: c.
        statistics: of `forward`; None: computed again, which costs little beside the rest.

    Returns:
        As query, key and value, contiguous.

    Example:
        >>> to_query, to_key, to_value = backward(gradient, query, key, value, first, limit, 0.125)  # doctest: +SKIP
    """
    problem = _Problem.build(query, key, value, first, limit, scale)
    tokens, mean, log_sum = statistics or problem.statistics()
    heads, rows, rank = problem.query.shape
    size, tiles = value.shape[-1], problem.tiles
    mean_value, mean_key = mean.split([size, rank], -1)
    upstream = gradient.reshape(heads, rows, size, rank).contiguous()
    with torch.autocast(query.device.type, enabled=False):
        wide = upstream.float()
        on_value, on_key = wide @ mean_key.unsqueeze(-1), mean_value.unsqueeze(-2) @ wide
    on_mean = -torch.cat([on_value.squeeze(-1), on_key.squeeze(-2)], -1)
    del wide

    # One share a tile, and one for the plain tile.
    weighed, total = mean.new_empty(tiles + 1, heads, rows, rank), mean.new_empty(tiles + 1, heads, rows)
    problem.launch(_to_rows, tiles, tokens, log_sum, upstream, weighed, total)
    problem.launch(_to_rows, 0, tokens, log_sum, on_mean, weighed[tiles:], total[tiles:])
    inner = total.sum(0)  # D
    to_query = scale * (weighed.sum(0) - inner.unsqueeze(-1) * mean_key)

    spans = problem.spans()
    to_key = mean.new_empty(tiles + 1, *problem.key.shape)
    to_value, direct = mean.new_empty(problem.value.shape), torch.empty_like(tokens)
    problem.launch(_to_tokens, tiles, tokens, log_sum, upstream, inner, spans, to_key, to_value)
    problem.launch(_to_tokens, 0, tokens, log_sum, on_mean, inner, spans, to_key[tiles:], direct)
    to_value += direct[..., :size]
    gradients = to_query, to_key.sum(0).add_(direct[..., size:]), to_value
    return tuple(part.view_as(like).to(like.dtype) for part, like in zip(gradients, (query, key, value), strict=True))


class _Problem(NamedTuple):
    """The arguments, as the kernels take them.

    Attributes:
        query: q, (B K, P g, r), rows of one position together.
        key, value: (B K, S, r) and (B K, S, dv).
        first, limit: (P,), 32 bits.
        scale: c.
        group: g.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    first: Tensor
    limit: Tensor
    scale: float
    group: int

    @classmethod
    def build(cls, query: Tensor, key: Tensor, value: Tensor, first: Tensor, limit: Tensor, scale: float) -> _Problem:
        """From the arguments of `forward`."""
        rows = query.flatten(2, 3).flatten(0, 1).contiguous()
        first, limit = (place.to(torch.int32).contiguous() for place in (first, limit))
        return cls(rows, key.flatten(0, 1), value.flatten(0, 1), first, limit, float(scale), query.shape[3])

    @property
    def rank(self) -> int:
        """R in a block, r padded to what a product of matrices takes."""
        return _padded(self.query.shape[-1])

    @property
    def dims(self) -> int:
        """Dimensions of v in a tile."""
        return min(_COLUMNS // self.rank, _padded(self.value.shape[-1], 1))

    @property
    def tiles(self) -> int:
        """How many make the r dv columns."""
        return -(-self.value.shape[-1] // self.dims)

    def statistics(self) -> Statistics:
        """Tokens, means and log-sum-exps."""
        tokens = torch.cat([self.value, self.key], -1).float()
        tokens = tokens - tokens[:, :1]
        mean = tokens.new_empty(*self.query.shape[:2], tokens.shape[-1])
        log_sum = tokens.new_empty(self.query.shape[:2])
        self.launch(_summary, 0, tokens, mean, log_sum)
        return Statistics(tokens, mean, log_sum)

    def spans(self) -> Tensor:
        """For each block of tokens the first row that may see any of it, and one more than the last, (blocks, 2)."""
        edge = torch.arange(0, self.key.shape[1], _OWN, dtype=torch.int32, device=self.first.device)
        later = self.first.flip(0).cummin(0).values.flip(0)  # the least first of this position and those after it
        begin, end = torch.searchsorted(self.limit, edge, right=True), torch.searchsorted(later, edge + _OWN)
        return (self.group * torch.stack([begin, end], -1)).to(torch.int32)

    def launch(self, kernel: Any, tiles: int, *tensors: Tensor) -> None:
        """Run a kernel on the tiles, or on the plain one where they are 0; rows or tokens are cut into blocks."""
        (heads, rows, rank), size = self.query.shape, self.value.shape[-1]
        seen = self.key.shape[1]
        blocks = -(-(seen if kernel is _to_tokens else rows) // _OWN)
        if not blocks * heads:
            return
        width = self.dims * self.rank if tiles else _padded(size + rank)
        exact = self.query.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        precision = "ieee" if exact else "tf32"
        other, warps = _SHAPE[precision]
        with torch.cuda.device_of(self.query):
            kernel[(blocks * heads, max(1, tiles))](
                self.query, self.first, self.limit, *tensors, self.scale, rows, seen, self.group, blocks,
                DV=size, R=rank, RANK=self.rank, WIDTH=width, PLAIN=not tiles, OWN=_OWN, OTHER=other,
                PRECISION=precision, num_warps=warps, num_stages=2, enable_fp_fusion=True,
            )  # fmt: skip


def _padded(size: int, least: int = 16) -> int:
    """The next power of two, as blocks want it; products of matrices want 16 at least."""
    return max(least, 1 << (size - 1).bit_length())


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
    """Where the columns of a tile stand in a row of dv times r numbers, and whether they do."""
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
    """Which rows exist, and what they see; one that does not exist sees nothing."""
    here = row < rows
    begin = tl.load(first + row // group, mask=here, other=2147483647)
    return here, begin, tl.load(limit + row // group, mask=here, other=0)


@_kernel
def _weights(one, other, token, begin, end, log_sum, PRECISION: constexpr):
    """Alpha; of its axes rows may be either."""
    logits = tl.dot(one, tl.trans(other), input_precision=PRECISION)
    return tl.where((token >= begin) & (token < end), tl.exp(logits - log_sum), 0.0)


@_kernel
def _summary(
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
def _covariance(
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
    place, exists = _columns(tile, DV, R, RANK, WIDTH)
    where = (head * rows + row)[:, None] * (DV * R) + place[None, :]
    tl.store(out + where, moment.to(out.dtype.element_ty), mask=here[:, None] & exists[None, :])


@_kernel
def _to_rows(
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
def _to_tokens(
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
