"""Drawing sequences: the cached solver against a loop that computes the attention of the whole prefix at every step."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.errors import SeveralSolutionsWarning
from probattn.inference.bench.harness import Row, race
from probattn.solve import solve_sequence

__all__ = ["naive_sequence", "sequences"]

_ITERATIONS = 200


@torch.no_grad()
def naive_sequence(attention: CausalAttention, e: Tensor, tolerance: float = 1e-6) -> Tensor:
    """U with u - mu(u) = e, each token by iterating u_i <- e_i + mu_i on the whole prefix; it has no cache.

    Args:
        attention: a contraction at every token.
        e: noise, (batch, T, p).
        tolerance: of the last step.

    Returns:
        (batch, T, p).
    """
    u = e[:, :0]
    for i in range(e.shape[1]):
        token = e[:, i : i + 1]
        for _ in range(_ITERATIONS):
            following = e[:, i : i + 1] + attention.mean(torch.cat([u, token], dim=1))[:, -1:]
            moved = float((following - token).abs().max())
            token = following
            if moved < tolerance:
                break
        u = torch.cat([u, token], dim=1)
    return u


def sequences(device: torch.device, rounds: int, batch: int = 64, length: int = 512, dim: int = 4) -> list[Row]:
    """64 sequences of 512 tokens, p = 4."""
    torch.manual_seed(0)
    attention = CausalAttention.from_bilinear(0.2 * torch.randn(dim, dim, device=device))
    e = 0.5 * torch.randn(batch, length, dim, device=device)

    def ours() -> Tensor:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore", SeveralSolutionsWarning)
            return solve_sequence(attention, e, selection="uniform")

    difference = float((ours() - naive_sequence(attention, e)).abs().max())
    seconds = race(
        {"cached": ours, "naive": lambda: naive_sequence(attention, e)}, rounds=min(rounds, 3), warmup=0, budget=120.0
    )
    return [
        Row(
            f"sampling {batch} sequences of {length} tokens, p = {dim}",
            "a loop that computes the attention of the prefix from scratch",
            seconds["naive"].least / seconds["cached"].least,
            faster=True,
            goal=20.0,
            seconds=seconds,
            notes={"largest difference of the samples": difference},
        )
    ]
