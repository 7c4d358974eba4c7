"""Drawing sequences: the cached solvers against a loop that computes the attention of the prefix at every step."""

from __future__ import annotations

import time
import warnings

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.errors import SeveralSolutionsWarning
from probattn.inference.bench.harness import Row, Timing, race
from probattn.solve.sequence import Method, solve_sequence

__all__ = ["naive_sequence", "sequences"]

_ITERATIONS = 200
_CROSSOVER = ((1, 32), (1, 512), (8, 32), (8, 512), (64, 32))  # sequences and tokens where both methods are timed


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
    """64 sequences of 512 tokens, p = 4, and where sweeps of many tokens are faster than one token after the other.

    The naive loop takes minutes and runs once, for its time and for the comparison of the samples. It looks for one
    solution of each equation, where the library also looks for others.
    """
    torch.manual_seed(0)
    attention = CausalAttention.from_qk_matrix(0.2 * torch.randn(dim, dim, device=device))
    e = 0.5 * torch.randn(batch, length, dim, device=device)
    begin = time.perf_counter()
    naive = naive_sequence(attention, e)
    taken = time.perf_counter() - begin
    ours: dict[str, Timing] = race(
        {"cached": lambda: _draw(attention, e, "auto"), "one by one": lambda: _draw(attention, e, "sequential")},
        rounds=min(rounds, 3),
        warmup=0,
        budget=60.0,
    )
    notes: dict[str, object] = {
        "largest difference of the samples": float((_draw(attention, e, "auto") - naive).abs().max()),
        "the naive loop": "run once",
    }
    rows = [
        Row(
            f"sampling {batch} sequences of {length} tokens, p = {dim}",
            "a loop that computes the attention of the prefix from scratch",
            taken / ours["cached"].least,
            faster=True,
            goal=20.0,
            seconds={**ours, "naive": Timing(taken, taken, 1)},
            notes=notes,
        )
    ]
    return [*rows, *(_methods(attention, e, *shape, rounds) for shape in _CROSSOVER if _fits(shape, e))]


def _fits(shape: tuple[int, int], e: Tensor) -> bool:
    return shape[0] <= e.shape[0] and shape[1] <= e.shape[1]


def _methods(attention: CausalAttention, e: Tensor, batch: int, length: int, rounds: int) -> Row:
    """Both methods on a part of the noise."""
    part = e[:batch, :length]
    seconds = race(
        {
            "together": lambda: _draw(attention, part, "parallel"),
            "one by one": lambda: _draw(attention, part, "sequential"),
        },
        rounds=rounds,
        budget=20.0,
    )
    difference = (_draw(attention, part, "parallel") - _draw(attention, part, "sequential")).abs().max()
    return Row(
        f"sampling by sweeps, {batch} x {length} tokens, p = {e.shape[-1]}",
        "token by token",
        seconds["one by one"].least / seconds["together"].least,
        faster=True,
        seconds=seconds,
        notes={"largest difference of the samples": float(difference)},
    )


def _draw(attention: CausalAttention, e: Tensor, method: Method) -> Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", SeveralSolutionsWarning)
        return solve_sequence(attention, e, selection="uniform", method=method)
