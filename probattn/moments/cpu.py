"""The compiled kernels in ``probattn/moments/kernels``, called with pointers into tensors on the threads of torch.

They are built on installation where there is a C compiler (checked with GCC 12 on x86-64). Without one, on other
devices and for shapes that they do not cover, the callers compute the same with torch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

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

LARGEST = 64  # size of the matrices; kernels.c has the same number
WIDEST = 64  # r and dv of a head
_REAL = {torch.float32: "float", torch.float64: "double"}
_LANES = 16  # matrices that are eliminated together, at most
_SHARES = 4  # pieces per thread, so that none waits long for the last one
_VERSION = 2  # of what the kernels compute; kernels.c has the same number
_WORTH = 3e5  # multiplications below which a further thread costs more than it saves


def _parallel() -> Callable[..., None] | None:
    """GOMP_parallel(function, its argument, threads, 0) of the OpenMP that torch runs on, where there is one.

    Threads of our own would compete with those of torch, which wait for the next operation without sleeping.
    """
    try:
        found: Callable[..., None] = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):  # another OpenMP or none
        return None
    found.restype = None  # type: ignore[attr-defined]
    return found


_PARALLEL = _parallel()


def _leave_alone() -> None:
    global _PARALLEL
    _PARALLEL = None  # OpenMP's threads do not survive a fork, and it waits for them


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_alone)


class _Shared(ctypes.Structure):
    """Structure of the same name in kernels.c, with the part that the kernels' threads share."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (("next", ctypes.c_long), ("failed", ctypes.c_long))
    next: int
    failed: int

    def run(self, name: str, dtype: torch.dtype, pieces: int, work: float) -> None:
        """Run a kernel, on several threads where the work, counted in multiplications, is worth it."""
        function = getattr(_LIBRARY, f"{name}_{_REAL[dtype]}")
        function.restype = None
        threads = min(torch.get_num_threads(), pieces, 1 + int(work / _WORTH))
        if threads > 1 and _PARALLEL is not None:
            _PARALLEL(function, ctypes.byref(self), ctypes.c_uint(threads), ctypes.c_uint(0))
        else:
            function(ctypes.byref(self))
        if self.failed:
            raise MemoryError("the covariance of the past found no memory for its weights.")


class _Matrices(_Shared):
    """``matrices`` of determinants.inc."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (
        ("count", ctypes.c_long),
        ("size", ctypes.c_long),
        *((name, ctypes.c_void_p) for name in ("k", "sign", "logabs", "inverse")),
    )


class _Problem(_Shared):
    """``problem`` of covariance.inc, which explains the fields; keeps the tensors alive that it points into."""

    _fields_: ClassVar[Sequence[tuple[str, Any]]] = (
        *((name, ctypes.c_long) for name in ("heads", "pieces", "rows", "group", "tokens", "rank", "value")),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "first", "limit")),
        ("scale", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("c", "mean", "log_sum", "to_query", "to_key", "to_value")),
    )
    held: tuple[Tensor, ...]

    @classmethod
    def build(
        cls, query: Tensor, key: Tensor, value: Tensor, first: Tensor, limit: Tensor, scale: float, pieces: int
    ) -> _Problem:
        """Build the structure from the arguments of :func:`moments`, in at least so many pieces if the rows suffice."""
        batch, heads, positions, group, rank = query.shape
        held = (
            *(part.contiguous() for part in (query, key, value)),
            *(part.to(torch.int64).contiguous() for part in (first, limit)),
        )
        rows = positions * group
        units = batch * heads
        # With fewer heads than there are pieces, the rows of each head are cut up.
        cut = 1 if units >= pieces else max(1, min(pieces // units, rows // 64))
        sizes = (units, cut, rows, group, key.shape[2], rank, value.shape[-1])
        problem = cls(0, 0, *sizes, *(part.data_ptr() for part in held), scale)
        problem.held = held
        return problem

    def give(self, name: str, dtype: torch.dtype, **tensors: Tensor | None) -> None:
        """Run a kernel with contiguous tensors, given by the names of their fields."""
        for field, tensor in tensors.items():
            setattr(self, field, None if tensor is None else tensor.data_ptr())
        work = self.heads * self.rows * self.tokens * self.rank * self.value / 2
        self.run(name, dtype, self.heads * self.pieces, work)


def _load() -> ctypes.CDLL | None:
    built = sorted(path for path in Path(__file__).parent.glob("kernels/_compiled*") if path.suffix in (".so", ".pyd"))
    if not built or os.environ.get("PROBATTN_NATIVE") == "0":
        return None
    try:
        library = ctypes.CDLL(str(built[0]))
        layout = library.layout
    except (OSError, AttributeError):  # built for another machine, or from another version
        return None
    layout.restype = ctypes.c_long
    expected = 1000000 * _VERSION + 1000 * ctypes.sizeof(_Problem) + ctypes.sizeof(_Matrices)
    return library if layout() == expected else None


_LIBRARY = _load()
AVAILABLE = _LIBRARY is not None
"""True if the kernels were built and loaded; the environment variable ``PROBATTN_NATIVE=0`` keeps them out."""


def determinants(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sign and ``log|det(I - K)|``, and (I - K)^-T, by which the logarithm is differentiated.

    Args:
        matrix: K, (N, m, m), m <= LARGEST, float32 or float64 on the CPU.

    Returns:
        (N,), (N,) and (N, m, m). Where the matrix is singular: 0, -inf, and NaN.
    """
    matrix = matrix.contiguous()
    count, size = matrix.shape[0], matrix.shape[-1]
    results = matrix.new_empty(count), matrix.new_empty(count), torch.empty_like(matrix)
    matrices = _Matrices(0, 0, count, size, *(part.data_ptr() for part in (matrix, *results)))
    matrices.run("determinants", matrix.dtype, count // _LANES, count * size**3)
    return results


def takes_matrices(matrix: Tensor) -> bool:
    """True if :func:`determinants` covers the matrices; those of one number need no elimination."""
    return AVAILABLE and 1 < matrix.shape[-1] <= LARGEST and matrix.device.type == "cpu" and matrix.dtype in _REAL


def takes_moments(query: Tensor, value: Tensor, mask: Tensor | None, softcap: float) -> bool:
    """True if the kernels cover moments of the past: on the CPU, without mask and cap, r and dv up to WIDEST."""
    small = max(query.shape[-1], value.shape[-1]) <= WIDEST and query.numel() * value.numel() > 0
    plain = mask is None and not softcap and query.device.type == "cpu" and query.dtype in _REAL
    return plain and small and AVAILABLE


def moments(
    query: Tensor, key: Tensor, value: Tensor, first: Tensor, limit: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Covariance, offset and log-sum of the first pass, measured from the first token; shapes as in ``past_moments``.

    Raises:
        MemoryError: no room for the weights of a block of rows.
    """
    size, rank = value.shape[-1], query.shape[-1]
    shape = query.shape[:-1]
    c, offset = query.new_empty(*shape, size, rank), query.new_empty(*shape, size + rank)
    log_sum = query.new_empty(shape)
    problem = _Problem.build(query, key, value, first, limit, scale, _SHARES * torch.get_num_threads())
    problem.give("covariance", query.dtype, c=c, mean=offset, log_sum=log_sum)
    return c, offset, log_sum


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
    c, mean, log_sum = (None if part is None else part.contiguous() for part in gradients)
    to_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    # Every piece has its own gradients of key and value: half as many pieces, as they take memory.
    problem = _Problem.build(query, key, value, first, limit, scale, _SHARES // 2 * torch.get_num_threads())
    to_key, to_value = (query.new_zeros(problem.pieces, *part.shape) for part in (key, value))
    results = {"to_query": to_query, "to_key": to_key, "to_value": to_value}
    problem.give("covariance_backward", query.dtype, c=c, mean=mean, log_sum=log_sum, **results)
    return to_query, to_key.sum(0), to_value.sum(0)
