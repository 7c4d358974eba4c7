"""The kernels of the exact penalty, forward and backward, raced against their matrix products and against other ways.

What is measured on one head with values of the size of its keys is the covariance and one determinant per token, the
work that a layer does for each of its heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from probattn import blocks
from probattn.attention import CausalAttention
from probattn.inference.bench.harness import Row, race
from probattn.inference.bench.memory import growth_of_memory, peak_of
from probattn.moments.operators import past_moments
from probattn.penalty import attention_penalty

__all__ = [
    "SHAPES",
    "against_attention",
    "against_autograd",
    "against_others",
    "dense_penalty",
    "kernel_penalty",
    "memory",
    "peak",
]

#: Batch times heads, T and d.
SHAPES = ((32, 256, 8), (32, 256, 16), (8, 512, 32))
_FLOOR = 2.5  # goal: times the cost of the three matrix products
_AUTOGRAD = 200.0  # goal: times faster than the Jacobian by torch.func
_TURN = 0.1  # seconds: a call takes milliseconds
_LENGTHS = (1024, 2048, 4096, 8192)


def dense_penalty(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Penalty ``-log|det(I - c Cov)|`` by the formula as it stands: T x T weights, one einsum, one LAPACK call.

    Args:
        query: queries, (N, T, d).
        key: keys, (N, T, d).
        value: values, (N, T, d).

    Returns:
        Penalties, (N, T).
    """
    length, dim = query.shape[-2:]
    past = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    alpha = torch.softmax((dim**-0.5 * query @ key.mT).masked_fill(~past, -torch.inf), dim=-1)
    second = torch.einsum("nts,nsv,nsk->ntvk", alpha, value, key)
    cov = second - (alpha @ value).unsqueeze(-1) * (alpha @ key).unsqueeze(-2)
    penalty: Tensor = -torch.linalg.slogdet(torch.eye(dim, dtype=cov.dtype, device=cov.device) - dim**-0.5 * cov)[1]
    return penalty


def kernel_penalty(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by the kernels of the package.

    Args:
        query: queries, (N, T, d).
        key: keys, (N, T, d).
        value: values, (N, T, d).

    Returns:
        Penalties, (N, T).
    """
    length, dim = query.shape[-2:]
    scale, place = dim**-0.5, torch.arange(length, device=query.device)
    parts = query[:, None, :, None], key.unsqueeze(1), scale * value.unsqueeze(1)  # (N, 1, T, 1, d), (N, 1, T, d) twice
    cov = past_moments(*parts, torch.zeros_like(place), place + 1, scale=scale).covariance  # (N, 1, T, 1, d, d)
    return -blocks.logabsdet_one_minus(cov)[1][:, 0, :, 0]


def against_others(device: torch.device, rounds: int) -> list[Row]:
    """Race the penalty against its three matrix products and against the dense formula, at three sizes.

    Args:
        device: device to measure on.
        rounds: rounds of each race.

    Returns:
        Two rows per size of :data:`SHAPES`.
    """
    rows = []
    for batch, length, dim in SHAPES:
        torch.manual_seed(0)
        parts = [torch.randn(batch, length, dim, device=device, requires_grad=True) for _ in range(3)]

        def exact(own: list[Tensor] = parts) -> None:
            _backward(kernel_penalty(*own).sum(), own)

        def dense(own: list[Tensor] = parts) -> None:
            _backward(dense_penalty(*own).sum(), own)

        competitors = {"exact": exact, "dense": dense, "products": _products(batch, length, dim, device)}
        seconds = race(competitors, rounds=rounds, warmup=3, turn=_TURN)
        size = f"{batch} x {length} x {dim}"
        ours = seconds["exact"].least
        rows.append(
            Row(
                f"exact penalty, forward and backward, {size}",
                "its three matrix products, dense",
                ours / seconds["products"].least,
                faster=False,
                goal=_FLOOR,
                seconds={name: seconds[name] for name in ("exact", "products")},
            )
        )
        rows.append(
            Row(
                f"exact penalty, forward and backward, {size}",
                "einsum and slogdet",
                seconds["dense"].least / ours,
                faster=True,
                seconds={name: seconds[name] for name in ("exact", "dense")},
            )
        )
    return rows


def against_autograd(device: torch.device, rounds: int) -> list[Row]:
    """Race the penalty of one sequence, T = 128, p = 8, against the whole Jacobian by ``torch.func``.

    Args:
        device: device to measure on.
        rounds: rounds of the race.

    Returns:
        One row.
    """
    torch.manual_seed(0)
    dim, length = 8, 128
    matrix = (0.2 * torch.randn(1, dim, dim, device=device)).requires_grad_()
    u = torch.randn(length, dim, device=device)
    identity = torch.eye(dim, device=device).unsqueeze(0)

    def exact() -> None:
        query = (u @ matrix.mT).unsqueeze(0)  # (1, 1, T, p)
        own = u[None, None]
        penalty = attention_penalty(query, own, own, identity[0], matrix[0], kind="logdet", causal="strict", scale=1.0)
        _backward(penalty.values.sum(), [matrix])

    def whole() -> None:
        attention = CausalAttention(matrix, identity, scale=1.0, validate_args=False)
        jacobian = torch.func.jacrev(attention.residual)(u)  # (T, p, T, p)
        blocks = jacobian.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (T, p, p)
        _backward(-torch.linalg.slogdet(blocks)[1].sum(), [matrix])

    seconds = race({"exact": exact, "autograd": whole}, rounds=rounds, turn=_TURN)
    ratio = seconds["autograd"].least / seconds["exact"].least
    name = f"exact penalty, forward and backward, T = {length}, p = {dim}"
    return [Row(name, "dense Jacobian by torch.func", ratio, faster=True, goal=_AUTOGRAD, seconds=seconds)]


def against_attention(rounds: int) -> list[Row]:
    """Race the penalty against plain attention, forward and backward, on a GPU.

    Args:
        rounds: rounds of the race.

    Returns:
        One row; without a GPU it says so.
    """
    if not torch.cuda.is_available():
        notes = {"not measured": "no CUDA device here"}
        return [Row("exact penalty on a GPU, 32 x 1024 x 64", "plain attention", None, faster=False, notes=notes)]
    query, key, value = (torch.randn(32, 1024, 64, device="cuda", requires_grad=True) for _ in range(3))
    parts = [query, key, value]

    def exact() -> None:
        _backward(kernel_penalty(*parts).sum(), parts)

    def attention() -> None:
        _backward(F.scaled_dot_product_attention(query, key, value, is_causal=True).sum(), parts)

    seconds = race({"exact": exact, "attention": attention}, rounds=rounds, warmup=3, turn=_TURN)
    ratio = seconds["exact"].least / seconds["attention"].least
    # Three products of 2 T^2 d^2 for each of 32 heads, half of them needed.
    flops = 3 * 2 * 32 * 1024**2 * 64**2 / 2
    reached = {"teraflops per second": round(flops / seconds["exact"].least / 1e12, 2)}
    name = "exact penalty on a GPU, 32 x 1024 x 64"
    return [Row(name, "plain attention", ratio, faster=False, seconds=seconds, notes=reached)]


def memory(lengths: tuple[int, ...] = _LENGTHS) -> list[Row]:
    """Measure the peak memory of the penalty, forward and backward, one head, d = 16, as T doubles.

    Args:
        lengths: lengths T, each twice the one before.

    Returns:
        One row, with the largest growth from one length to the next: 2 if memory is linear.
    """
    row = growth_of_memory(peak, lengths, "the exact penalty", "d = 16")
    return [replace(row, notes={**row.notes, "below 2 GiB": row.notes[f"MiB at T = {lengths[-1]}"] < 2**11})]


def peak(length: int) -> int:
    """Measure the bytes that one penalty takes at its peak, beyond those that the process held before (Linux only).

    Args:
        length: length T of the sequence.

    Returns:
        Bytes.
    """
    torch.manual_seed(0)
    parts = [torch.randn(1, length, 16, requires_grad=True) for _ in range(3)]
    _backward(kernel_penalty(*(part[:, :64] for part in parts)).sum(), parts)  # libraries
    return peak_of(lambda: _backward(kernel_penalty(*parts).sum(), parts))


def _products(batch: int, length: int, dim: int, device: torch.device) -> Callable[[], None]:
    """Weights with the rows v (x) k, and the two products of the backward pass."""
    alpha = torch.rand(batch, length, length, device=device)
    rows = torch.randn(batch, length, dim * dim, device=device)

    def products() -> None:
        cov = alpha @ rows
        cov @ rows.mT
        alpha.mT @ cov

    return products


def _backward(value: Tensor, parts: list[Tensor]) -> None:
    torch.autograd.grad(value, parts)
