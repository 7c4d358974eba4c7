"""Draw sequences from a known attention, with the regime of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.distributions import LatentAttention
from probattn.errors import InputError, NoSolutionError
from probattn.folds.regime import Regime, regime
from probattn.models.embedding import EmbeddingModel
from probattn.models.scalar import ScalarModel
from probattn.numerics.random import isolated_seed
from probattn.solve.selection import Selection
from probattn.solve.sequence import find_sequence

__all__ = ["Simulation", "draw_data_sets", "simulate"]


class Simulation(NamedTuple):
    """Simulated sequences.

    Attributes:
        u: sequences, ``(N, T, p)``.
        regimes: the regime of each sequence, N of them.
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
    """Draw N sequences of T tokens without touching the global random state.

    Args:
        attention: attention without batch axes.
        noise_scale: standard deviation of the noise, a number or one per feature, as in
            :class:`~probattn.distributions.LatentAttention`.
        length: number T of tokens in a sequence.
        sequences: number N of sequences.
        seed: random seed for the draws.
        selection: rule for the choice among several solutions, as in
            :class:`~probattn.distributions.LatentAttention`.

    Returns:
        The sequences, ``(N, T, p)``, and their regimes.

    Raises:
        InputError: the attention has batch axes, or the number of sequences is below 1.
        SeveralSolutionsError: the attention folds on a path that was drawn, under selection "unique".

    Example:
        >>> from probattn.models.scalar import scalar_attention
        >>> simulation = simulate(scalar_attention(0.05), 1.0, length=6, sequences=2)
        >>> simulation.u.shape, [str(r) for r in simulation.regimes]
        (torch.Size([2, 6, 1]), ['certified', 'certified'])
    """
    if attention.batch_shape or sequences < 1:
        raise InputError(
            f"simulate was given {attention!r} and {sequences} sequences; it needs one attention without batch axes "
            "and at least one sequence."
        )
    with isolated_seed(seed, attention.query.device):
        u = LatentAttention(attention, noise_scale, length, selection=selection).sample((sequences,))
    regimes = regime(attention, u)
    return Simulation(u, regimes if isinstance(regimes, list) else [regimes])  # type: ignore[arg-type]


def draw_data_sets(
    model: ScalarModel | EmbeddingModel, values: Mapping[str, Tensor], sequences: int
) -> tuple[Tensor, Tensor]:
    """Draw one data set for each of S values of a model's parameters, and flag the data sets that are usable.

    A data set is unusable where the attention folds on one of its paths, since several tokens then solve for the same
    noise and the model does not choose between them, and where no solution was found, since the path has then grown
    beyond the precision of its numbers. Draws from the global random state.

    Args:
        model: generative model of the data sets.
        values: values of its sites, ``(S, *event)`` each.
        sequences: number N of sequences in a data set.

    Returns:
        The data sets, ``(S, N, T, p)``, and a mask of the usable ones, ``(S)``.

    Example:
        >>> values = {"a": torch.tensor([0.1, 5.0]).double(), "noise_scale": torch.ones(2).double()}
        >>> _ = torch.manual_seed(0)
        >>> u, usable = draw_data_sets(ScalarModel(20), values, sequences=3)
        >>> u.shape, usable
        (torch.Size([2, 3, 20, 1]), tensor([ True, False]))
    """
    count = len(next(iter(values.values())))
    batched = {name: value.unsqueeze(1) for name, value in values.items()}  # (S, 1, *event)
    process = model.likelihood(batched).expand((count, sequences))
    try:
        u, several = find_sequence(process.attention, process.base_dist.sample(), "smallest_step")
        return u, ~several.flatten(1).any(-1)
    except NoSolutionError:
        if count == 1:
            nothing = process.attention.like.new_zeros(1, sequences, *process.event_shape)
            return nothing, torch.zeros(1, dtype=torch.bool, device=nothing.device)
    halves = [
        {name: value[part] for name, value in values.items()} for part in (slice(count // 2), slice(count // 2, None))
    ]
    drawn = [draw_data_sets(model, half, sequences) for half in halves]
    return torch.cat([u for u, _ in drawn]), torch.cat([usable for _, usable in drawn])
