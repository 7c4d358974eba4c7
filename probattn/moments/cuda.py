r"""Moments of the past on CUDA: the sums of :mod:`probattn.moments.operators` as kernels in Triton.

Everything is an average, under the weights, of wide rows that exist for one block of tokens at a time,

.. math::
    z_s = [\, v_s \otimes k_s \;|\; v_s \;|\; k_s \,], \quad
    \sum_s \alpha_{is} z_s = [\, M_i \;|\; \bar v_i \;|\; \bar k_i \,], \quad C_i = M_i - \bar v_i \bar k_i^T .

With :math:`G_i = \partial L / \partial C_i` the gradient of that average is
:math:`W_i = [\, G_i \;|\; h_i - G_i \bar k_i \;|\; g_i - G_i^T \bar v_i \,]`, and the rest is the backward pass of any
attention,

.. math::
    x_{is} = \langle W_i, z_s \rangle, \quad D_i = \sum_s \alpha_{is} x_{is}, \quad
    \frac{\partial L}{\partial l_{is}} = \alpha_{is} (x_{is} - D_i + w_i), \quad
    \frac{\partial L}{\partial z_s} = \sum_i \alpha_{is} W_i .

A row of :math:`r d_v` numbers fits in no register file, so a program owns a block of rows (or of tokens) and one tile
of the columns: some dimensions of v times all of k, or [v | k], the plain tile. All sums are linear in the tiles: every
program writes its own share, and the shares are added in a fixed order. Nothing is atomic; two runs agree bit by bit.
The weights come back from their log-sum-exp. Of products of rows x tokens x r dv there is one forward and three
backward; the shares take r / 128 of the memory of G.

Sums are in float32 whatever the input. float32 inputs are multiplied as float32 unless
:func:`torch.set_float32_matmul_precision` allows TF32; 16-bit inputs are multiplied as TF32, which has as many digits
as float16 and more than bfloat16. Derived here.

The kernels pass their tests in Triton's interpreter on a CPU, compile for compute capabilities 8.0 to 10.0, and were
measured on an H100 and an H200 (``docs/results/cuda.md``): as fast as torch (:mod:`probattn.moments.blocked`) or up to
ten times as fast, and in bfloat16 thirty times as exact, for at most three times the memory. The environment variable
``PROBATTN_TRITON=0`` leaves moments on CUDA to torch.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.moments.kernels import triton_kernels as kernels

__all__ = ["ENABLED", "LARGEST", "backward", "forward", "supports"]

ENABLED = os.environ.get("PROBATTN_TRITON") != "0"
"""True if the kernels may be used; the environment variable ``PROBATTN_TRITON=0`` keeps them out."""


LARGEST = 64  # r and dv
_OWN, _COLUMNS = 64, 128  # rows or tokens of a program, and columns of a tile
_REAL = (torch.float16, torch.bfloat16, torch.float32)
# Tokens or rows that a program takes at a time, and warps: what compiles for compute capability 9.0 without spilling
# registers worth speaking of.
_SHAPE = {"ieee": (16, 8), "tf32": (32, 4)}


class _Statistics(NamedTuple):
    """Means and log-sums, of tokens less the first one.

    Attributes:
        tokens: [v_s | k_s] less those of the first token, which changes no covariance, (B K, S, dv + r), float32.
        mean: their averages [vbar_i | kbar_i], (B K, P g, dv + r), float32.
        log_sum: of the exponentials of a row's logits, 0 for a row that sees nothing, (B K, P g), float32.
    """

    tokens: Tensor
    mean: Tensor
    log_sum: Tensor


def supports(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, softcap: float | None) -> bool:
    """True if the kernels cover moments of the past; otherwise compute them with torch.

    They need to be enabled, and they need Triton, an NVIDIA GPU with compute capability 8.0 or more, one dtype among
    float32, bfloat16 and float16, r and dv up to LARGEST, no mask beside first and limit, and no cap on the logits.

    Args:
        query: q, (B, K, P, g, r).
        key: k, (B, K, S, r).
        value: v, (B, K, S, dv).
        mask: as in :func:`probattn.moments.operators.past_moments`.
        softcap: likewise; None or 0 for none.

    Example:
        >>> q, k = torch.zeros(1, 1, 2, 1, 4), torch.zeros(1, 1, 2, 4)
        >>> supports(q, k, k, None, None)  # on the CPU
        False
    """
    if not ENABLED or not kernels.AVAILABLE or query.device.type != "cuda" or torch.version.hip is not None:
        return False
    plain = mask is None and not softcap and query.dtype in _REAL and key.dtype == value.dtype == query.dtype
    small = query.shape[-1] <= LARGEST and value.shape[-1] <= LARGEST
    return plain and small and torch.cuda.get_device_capability(query.device) >= (8, 0)


def forward(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, limit: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance, offset and log-sum of the first pass, measured from the first token.

    Args:
        query: q, (B, K, P, g, r), any strides, of one dtype with key and value.
        key: k, (B, K, S, r).
        value: v, (B, K, S, dv).
        first: (P,).
        limit: (P,), not decreasing.
        scale: c.

    Returns:
        C, (B, K, P, g, dv, r), means less the first token and log-sums of logits measured from there, summed in
        float32, in the dtype of query.

    Example:
        >>> covariance, offset, log_sum = forward(query, key, value, first, limit, 0.125)  # doctest: +SKIP
    """
    problem = _Problem.build(query, key, value, first, limit, scale)
    covariance = query.new_empty(*query.shape[:-1], value.shape[-1], query.shape[-1])
    statistics = problem.statistics()
    problem.launch(kernels.covariance, problem.tiles, *statistics, covariance)
    # The maximum of a row passes over NaN: a query with NaN in it must not look like one that sees nothing.
    missing = torch.where(problem.query.isnan().any(-1), torch.nan, 0.0)
    log_sum = torch.where(problem.some().squeeze(-1), statistics.log_sum + missing, -torch.inf)
    shape, width = query.shape[:-1], statistics.mean.shape[-1]
    return covariance, statistics.mean.view(*shape, width).to(query.dtype), log_sum.view(shape).to(query.dtype)


def backward(
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from those of the three.

    Args:
        gradients: G, (B, K, P, g, dv, r), any strides, [h | g], (B, K, P, g, dv + r), and w, (B, K, P, g); None: zero.
        query: this and the next five as in `forward`.
        key: k.
        value: v.
        first: (P,).
        limit: (P,).
        scale: c.

    Returns:
        As query, key and value, contiguous.

    Example:
        >>> to_query, to_key, to_value = backward((g, None, None), q, k, v, first, limit, 0.125)  # doctest: +SKIP
    """
    gradient, direct, on_log = gradients
    problem = _Problem.build(query, key, value, first, limit, scale)
    tokens, mean, log_sum = problem.statistics()  # again, which costs little beside the rest
    heads, rows, rank = problem.query.shape
    size, tiles = value.shape[-1], problem.tiles
    mean_value, mean_key = mean.split([size, rank], -1)
    upstream = gradient.reshape(heads, rows, size, rank).contiguous()
    with torch.autocast(query.device.type, enabled=False):
        wide = upstream.float()
        on_value, on_key = wide @ mean_key.unsqueeze(-1), mean_value.unsqueeze(-2) @ wide
    on_mean = -torch.cat([on_value.squeeze(-1), on_key.squeeze(-2)], -1)
    if direct is not None:
        on_mean += direct.reshape(heads, rows, size + rank)
    del wide

    # One share a tile, and one for the plain tile.
    weighed, total = mean.new_empty(tiles + 1, heads, rows, rank), mean.new_empty(tiles + 1, heads, rows)
    problem.launch(kernels.to_rows, tiles, tokens, log_sum, upstream, weighed, total)
    problem.launch(kernels.to_rows, 0, tokens, log_sum, on_mean, weighed[tiles:], total[tiles:])
    inner, to_query, some = total.sum(0).unsqueeze(-1), weighed.sum(0), problem.some()
    if on_log is not None:
        inner -= on_log.reshape(heads, rows, 1).float()
    inner = torch.where(some, inner, 0.0)  # D - w
    to_query = scale * torch.where(some, to_query - inner * mean_key, 0.0)

    spans = problem.spans()
    to_key = mean.new_empty(tiles + 1, *problem.key.shape)
    to_value, plain = mean.new_empty(problem.value.shape), torch.empty_like(tokens)
    problem.launch(kernels.to_tokens, tiles, tokens, log_sum, upstream, inner, spans, to_key, to_value)
    problem.launch(kernels.to_tokens, 0, tokens, log_sum, on_mean, inner, spans, to_key[tiles:], plain)
    to_value += plain[..., :size]
    results = to_query, to_key.sum(0).add_(plain[..., size:]), to_value
    return tuple(part.view_as(like).to(like.dtype) for part, like in zip(results, (query, key, value), strict=True))  # type: ignore[return-value]


class _Problem(NamedTuple):
    """The arguments in the form that the kernels take.

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
        """Number of tiles that make the r dv columns."""
        return -(-self.value.shape[-1] // self.dims)

    def some(self) -> Tensor:
        """True for rows that see any token, (P g, 1)."""
        return (self.first < self.limit).repeat_interleave(self.group).unsqueeze(-1)

    def statistics(self) -> _Statistics:
        """Tokens, means and log-sum-exps."""
        tokens = torch.cat([self.value, self.key], -1).float()
        tokens = tokens - tokens[:, :1]
        mean = tokens.new_empty(*self.query.shape[:2], tokens.shape[-1])
        log_sum = tokens.new_empty(self.query.shape[:2])
        self.launch(kernels.summary, 0, tokens, mean, log_sum)
        return _Statistics(tokens, torch.where(self.some(), mean, 0.0), log_sum)

    def spans(self) -> Tensor:
        """For each block of tokens the first row that may see any of it, and one more than the last, (blocks, 2)."""
        edge = torch.arange(0, self.key.shape[1], _OWN, dtype=torch.int32, device=self.first.device)
        later = self.first.flip(0).cummin(0).values.flip(0)  # the least first of this position and those after it
        begin, end = torch.searchsorted(self.limit, edge, right=True), torch.searchsorted(later, edge + _OWN)
        return (self.group * torch.stack([begin, end], -1)).to(torch.int32)

    def launch(self, kernel: Any, tiles: int, *tensors: Tensor) -> None:
        """Run a kernel on the tiles, or for 0 on the plain tile; rows or tokens are cut into blocks."""
        (heads, rows, rank), size = self.query.shape, self.value.shape[-1]
        seen = self.key.shape[1]
        blocks = -(-(seen if kernel is kernels.to_tokens else rows) // _OWN)
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
