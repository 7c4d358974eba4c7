"""Log-density and gradient, raced against the same formulas with T x T weights written out."""

from __future__ import annotations

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.inference.bench.harness import Row, race

__all__ = ["SHAPES", "dense_log_density", "density", "log_density"]

#: Chains times sequences, T and p, for many short chains as in NUTS and for longer sequences.
SHAPES = ((256, 32, 2), (8, 512, 4), (4, 1024, 8))
_TURN = 0.1  # seconds: a call takes milliseconds


def log_density(matrix: Tensor, u: Tensor) -> Tensor:
    """Log-density of A and unit noise without its constant, as the library computes it.

    Args:
        matrix: QK matrix A, (1, p, p).
        u: tokens, (batch, T, p).

    Returns:
        Log-densities, (batch,).
    """
    attention = CausalAttention(matrix, torch.eye(len(matrix[0])).to(matrix)[None], scale=1.0, validate_args=False)
    residual, logabsdet = attention.residual_and_logabsdet(u)
    return logabsdet.sum(-1) - residual.square().sum((-2, -1)) / 2


def dense_log_density(matrix: Tensor, u: Tensor) -> Tensor:
    """Log-density of A as one would write it in torch: all weights, one product with u_s u_s^T, one LAPACK call.

    Args:
        matrix: QK matrix A, (1, p, p).
        u: tokens, (batch, T, p).

    Returns:
        Log-densities, (batch,).
    """
    length, dim = u.shape[-2:]
    past = torch.ones(length, length, dtype=torch.bool, device=u.device).tril(-1)
    logits = (u @ matrix[0].mT) @ u.mT
    alpha = torch.softmax(logits.masked_fill(~past, torch.finfo(u.dtype).min), -1).masked_fill(~past, 0.0)
    mean = alpha @ u
    second = (alpha @ (u.unsqueeze(-1) * u.unsqueeze(-2)).flatten(-2)).unflatten(-1, (dim, dim))
    cov = second - mean.unsqueeze(-1) * mean.unsqueeze(-2)
    logabsdet = torch.linalg.slogdet(torch.eye(dim).to(u) - cov @ matrix[0])[1]
    value: Tensor = logabsdet.sum(-1) - (u - mean).square().sum((-2, -1)) / 2
    return value


def density(device: torch.device, rounds: int) -> list[Row]:
    """Race log-density and gradient in A, in float64 as inference uses them.

    Args:
        device: device to measure on.
        rounds: rounds of each race.

    Returns:
        One row per shape of :data:`SHAPES`.
    """
    rows = []
    for batch, length, dim in SHAPES:
        torch.manual_seed(0)
        matrix = (0.1 * torch.randn(1, dim, dim, dtype=torch.float64, device=device)).requires_grad_()
        u = torch.randn(batch, length, dim, dtype=torch.float64, device=device)

        def exact(matrix: Tensor = matrix, u: Tensor = u) -> None:
            torch.autograd.grad(log_density(matrix, u).sum(), matrix)

        def dense(matrix: Tensor = matrix, u: Tensor = u) -> None:
            torch.autograd.grad(dense_log_density(matrix, u).sum(), matrix)

        seconds = race({"exact": exact, "dense": dense}, rounds=rounds, warmup=3, turn=_TURN)
        name = f"log-density and gradient, float64, {batch} x {length} tokens, p = {dim}"
        ratio = seconds["dense"].least / seconds["exact"].least
        rows.append(Row(name, "the same with T x T weights", ratio, faster=True, seconds=seconds))
    return rows
