"""The compiled kernels of ``probattn/kernels``, called with pointers into tensors on as many threads as torch uses.

They are built when the package is installed where there is a C compiler (checked with GCC 12 on x86-64). Without one,
on other devices and for what they do not cover, the callers compute the same with torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "AVAILABLE",
    "LARGEST",
    "WIDEST",
    "determinants",
    "moments",
    "moments_backward",
    "takes_matrices",
    "takes_moments",
]

LARGEST = 32  # size of the matrices; kernels.c has the same number
WIDEST = 64  # r and dv of a head
_REAL = {torch.float32: "float", torch.float64: "double"}
_LANES = 16  # matrices together, at most
_SHARES = 4  # pieces a thread, so that none waits long for the last
_WORTH = 1e6  # multiplications below which a further thread costs more than it saves


def _load() -> ctypes.CDLL | None:
    built = sorted(Path(__file__).parent.glob("kernels/_compiled*.so"))
    if not built or os.environ.get("PROBATTN_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(built[0]))
    except OSError:  # built for another machine
        return None


_LIBRARY = _load()
AVAILABLE = _LIBRARY is not None
"""Whether the kernels were built and loaded; the environment variable ``PROBATTN_NATIVE=0`` leaves them out."""


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="probattn")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def _share(name: str, dtype: torch.dtype, pieces: int, work: float, *arguments: Any) -> None:
    """Run a kernel on several threads, where its work, in multiplications, is worth it; they take piece after piece."""
    function: Callable[..., int] = getattr(_LIBRARY, f"{name}_{_REAL[dtype]}")
    threads = min(torch.get_num_threads(), pieces, 1 + int(work / _WORTH))
    run = partial(function, ctypes.byref(ctypes.c_long(0)), *arguments)
    others = [_pool(threads - 1).submit(run) for _ in range(threads - 1)]
    codes = [run(), *(other.result() for other in others if not other.cancel())]  # who has not begun is not needed
    if 0 in codes:
        raise MemoryError("the covariance of the past found no memory for its weights.")


def determinants(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sign and log|det(I - K)|, and (I - K)^-T, by which the logarithm is differentiated.

    Args:
        matrix: K, (N, m, m), m <= LARGEST, float32 or float64 on the CPU.

    Returns:
        (N,), (N,) and (N, m, m). Where the matrix is singular: 0, -inf, and NaN.
    """
    matrix = matrix.contiguous()
    count, size = matrix.shape[0], matrix.shape[-1]
    results = matrix.new_empty(count), matrix.new_empty(count), torch.empty_like(matrix)
    sizes = ctypes.c_long(count), ctypes.c_long(size)
    pointers = map(_pointer, (matrix, *results))
    _share("determinants", matrix.dtype, count // _LANES, count * size**3, *sizes, *pointers)
    return results


class _Problem(ctypes.Structure):
    """``problem`` of covariance.inc, which names its fields; it keeps the tensors alive that it points into."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("heads", "pieces", "rows", "group", "tokens", "rank", "value")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "first", "limit")),
        ("scale", ctypes.c_double),
    ]
    held: tuple[Tensor, ...]

    @classmethod
    def build(
        cls, query: Tensor, key: Tensor, value: Tensor, first: Tensor, limit: Tensor, scale: float, pieces: int
    ) -> _Problem:
        """From the arguments of :func:`moments`; in so many pieces at least, where the rows are enough."""
        batch, heads, positions, group, rank = query.shape
        held = (
            *(part.contiguous() for part in (query, key, value)),
            *(part.to(torch.int64).contiguous() for part in (first, limit)),
        )
        rows = positions * group
        units = batch * heads
        # Where there are fewer heads than threads can share, the rows of each are cut up.
        cut = 1 if units >= pieces else max(1, min(pieces // units, rows // 64))
        sizes = (units, cut, rows, group, key.shape[2], rank, value.shape[-1])
        problem = cls(*sizes, *(part.data_ptr() for part in held), scale)
        problem.held = held
        return problem

    def share(self, name: str, dtype: torch.dtype, *tensors: Tensor | None) -> None:
        """Run a kernel on it."""
        work = self.heads * self.rows * self.tokens * self.rank * self.value / 2
        pointers = map(_pointer, tensors)
        _share(name, dtype, self.heads * self.pieces, work, ctypes.byref(self), *pointers)


def takes_matrices(matrix: Tensor) -> bool:
    """Whether :func:`determinants` covers them; a single number a matrix needs no elimination."""
    return AVAILABLE and 1 < matrix.shape[-1] <= LARGEST and matrix.device.type == "cpu" and matrix.dtype in _REAL


def takes_moments(query: Tensor, value: Tensor, mask: Tensor | None, softcap: float) -> bool:
    """Whether the kernels cover moments of the past: on the CPU, without mask and cap, r and dv up to WIDEST."""
    small = max(query.shape[-1], value.shape[-1]) <= WIDEST and query.numel() * value.numel() > 0
    plain = mask is None and not softcap and query.device.type == "cpu" and query.dtype in _REAL
    return plain and small and AVAILABLE


def moments(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, limit: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of :func:`probattn.covariance.past_moments`, same arguments and shapes.

    Raises:
        MemoryError: no room for the weights of a block of rows.
    """
    size, rank = value.shape[-1], query.shape[-1]
    shape = query.shape[:-1]
    results = query.new_empty(*shape, size, rank), query.new_empty(*shape, size + rank), query.new_empty(shape)
    problem = _Problem.build(query, key, value, first, limit, scale, _SHARES * torch.get_num_threads())
    problem.share("covariance", query.dtype, *results)
    return results


def moments_backward(
    gradients: tuple[Tensor, Tensor | None, Tensor | None],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from those of the three, None for zero; shaped as these.

    Raises:
        MemoryError: no room for the weights of a block of rows.
    """
    given = [None if part is None else part.contiguous() for part in gradients]
    to_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    # Every piece has gradients of key and value of its own: half as many as there are shares.
    problem = _Problem.build(query, key, value, first, limit, scale, _SHARES // 2 * torch.get_num_threads())
    to_key, to_value = (query.new_zeros(problem.pieces, *part.shape) for part in (key, value))
    problem.share("covariance_backward", query.dtype, *given, to_query, to_key, to_value)
    return to_query, to_key.sum(0), to_value.sum(0)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
