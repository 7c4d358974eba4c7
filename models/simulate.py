"""Drawing sequences from a known attention, with the regime of each beside it."""

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
from probattn.solve.search import Selection
from probattn.solve.sequence import find_sequence

__all__ = ["Simulation", "draw_data_sets", "simulate"]


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


def draw_data_sets(
    model: ScalarModel | EmbeddingModel, values: Mapping[str, Tensor], sequences: int
) -> tuple[Tensor, Tensor]:
    """One data set for each of S values of a model's sites, and whether these values have a law to draw from.

    Where the attention folds on a path, several tokens solve for the same noise and the model does not say which one
    comes; where no solution is found, the path has grown beyond the precision of its numbers. Draws from the present
    random state.

    Args:
        model: the story that the data sets follow.
        values: of its sites, (S, *event) each.
        sequences: N.

    Returns:
        u, (S, N, T, p), and which of the S met neither, (S,); the others' data are of no use.

    Example:
        >>> values = {"a": torch.tensor([0.1, 5.0]).double(), "noise_scale": torch.ones(2).double()}
        >>> _ = torch.manual_seed(0)
        >>> u, lawful = draw_data_sets(ScalarModel(20), values, sequences=3)
        >>> u.shape, lawful
        (torch.Size([2, 3, 20, 1]), tensor([ True, False]))
    """
    count = len(next(iter(values.values())))
    law = model.likelihood({name: value.unsqueeze(1) for name, value in values.items()}).expand((count, sequences))
    try:
        u, several = find_sequence(law.attention, law.base_dist.sample(), "smallest_step")
        return u, ~several.flatten(1).any(-1)
    except NoSolutionError:
        if count == 1:
            nothing = law.attention.query.new_zeros(1, sequences, *law.event_shape)
            return nothing, torch.zeros(1, dtype=torch.bool, device=nothing.device)
    halves = [
        {name: value[part] for name, value in values.items()} for part in (slice(count // 2), slice(count // 2, None))
    ]
    drawn = [draw_data_sets(model, half, sequences) for half in halves]
    return torch.cat([u for u, _ in drawn]), torch.cat([lawful for _, lawful in drawn])
