"""Drawing sequences from a known attention, with the regime of each beside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.distributions import LatentAttention
from probattn.errors import InputError
from probattn.regimes import Regime, regime
from probattn.solve import Selection

__all__ = ["Simulation", "simulate"]


class Simulation(NamedTuple):
    """Simulated sequences.

    Attributes:
        u: (N, T, p).
        regimes: one a sequence.
    """

    u: Tensor
    regimes: list[Regime]


def simulate(
    attention: CausalAttention,
    noise_scale: float | Tensor,
    length: int,
    sequences: int,
    *,
    seed: int = 0,
    selection: Selection = "unique",
) -> Simulation:
    """Draw N sequences of length T; the global random state is left as it was.

    Args:
        attention: without batch axes.
        noise_scale: as in :class:`LatentAttention`.
        length: T.
        sequences: N.
        seed: of the draws.
        selection: as in :class:`LatentAttention`.

    Raises:
        InputError: an attention with batch axes, or no sequences asked for.
        SeveralSolutionsError: the attention folds on a path that was drawn, under selection "unique".

    Example:
        >>> from probattn.models.scalar import scalar_attention
        >>> simulation = simulate(scalar_attention(0.05), 1.0, length=6, sequences=2)
        >>> simulation.u.shape, [str(r) for r in simulation.regimes]
        (torch.Size([2, 6, 1]), ['certified', 'certified'])
    """
    if attention.batch_shape or sequences < 1:
        raise InputError(f"simulate needs one attention and at least one sequence, got {attention!r} and {sequences}.")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        u = LatentAttention(attention, noise_scale, length, selection=selection).sample((sequences,))
    regimes = regime(attention, u)
    return Simulation(u, regimes if isinstance(regimes, list) else [regimes])  # type: ignore[arg-type]
