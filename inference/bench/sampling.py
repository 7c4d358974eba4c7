"""Sampling of sequences, raced against a loop that computes the attention of the prefix at every step."""

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
_BATCH, _LENGTH, _DIM = 64, 512, 4
_CROSSOVER = ((1, 32), (1, 512), (8, 32), (8, 512), (64, 32))  # sequences and tokens where both methods are timed


@torch.no_grad()
def naive_sequence(attention: CausalAttention, e: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Solve u - mu(u) = e token by token, iterating u_i <- e_i + mu_i on the whole prefix without a cache.

    Args:
        attention: attention that is a contraction at every token.
        e: noise, (batch, T, p).
        tolerance: largest change of a token in its last step.

    Returns:
        Tokens, (batch, T, p).
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


def sequences(device: torch.device, rounds: int) -> list[Row]:
    """Race the sampling of 64 sequences of 512 tokens, p = 4, and parallel against sequential solving at five sizes.

    The naive loop takes minutes and runs once, for its time and for the comparison of the samples. It looks for one
    solution of each equation, where the library also looks for others.

    Args:
        device: device to measure on.
        rounds: rounds of each race.

    Returns:
        One row for the naive loop, and one per size at which the two methods of the library were raced.
    """
    torch.manual_seed(0)
    attention = CausalAttention.from_qk_matrix(0.2 * torch.randn(_DIM, _DIM, device=device))
    e = 0.5 * torch.randn(_BATCH, _LENGTH, _DIM, device=device)
    begin = time.perf_counter()
    naive = naive_sequence(attention, e)
    taken = time.perf_counter() - begin
    ours: dict[str, Timing] = race(
        {"parallel": lambda: _draw(attention, e, "parallel"), "sequential": lambda: _draw(attention, e, "sequential")},
        rounds=min(rounds, 3),
        warmup=0,
        budget=60.0,
    )
    notes: dict[str, object] = {
        "largest difference of the samples": float((_draw(attention, e, "parallel") - naive).abs().max()),
        "the naive loop": "run once",
    }
    rows = [
        Row(
            f"sampling {_BATCH} sequences of {_LENGTH} tokens, p = {_DIM}",
            "a loop that computes the attention of the prefix from scratch",
            taken / ours["parallel"].least,
            faster=True,
            goal=20.0,
            seconds={**ours, "naive": Timing(taken, taken, 1)},
            notes=notes,
        )
    ]
    return [*rows, *(_methods(attention, e[:batch, :length], rounds) for batch, length in _CROSSOVER)]


def _methods(attention: CausalAttention, part: Tensor, rounds: int) -> Row:
    """Race both methods of the library on a part of the noise."""
    competitors = {
        "parallel": lambda: _draw(attention, part, "parallel"),
        "sequential": lambda: _draw(attention, part, "sequential"),
    }
    seconds = race(competitors, rounds=rounds, budget=20.0)
    difference = (_draw(attention, part, "parallel") - _draw(attention, part, "sequential")).abs().max()
    return Row(
        f"sampling in parallel, {part.shape[0]} x {part.shape[1]} tokens, p = {part.shape[2]}",
        "token by token",
        seconds["sequential"].least / seconds["parallel"].least,
        faster=True,
        seconds=seconds,
        notes={"largest difference of the samples": float(difference)},
    )


def _draw(attention: CausalAttention, e: Tensor, method: Method) -> Tensor:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", SeveralSolutionsWarning)
        return solve_sequence(attention, e, selection="uniform", method=method)
