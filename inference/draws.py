"""What every method that samples hands on: draws in unconstrained space with what is known about each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.target import Target

__all__ = ["Draws", "feasible_start"]


@dataclass(frozen=True)
class Draws:
    """Draws of a posterior or of an approximation to it.

    Attributes:
        method: "nuts", "laplace", "svi" or "map".
        z: (chain, draw, D).
        stats: by ArviZ name, (chain, draw) each; ``log_q`` is the log-density of an approximation at its own draw.
        notes: numbers and words about the run.
    """

    method: str
    z: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str | int | float] = field(default_factory=dict)


def feasible_start(target: Target, points: int, seed: int, *, spread: float = 0.1, tries: int = 30) -> Tensor:
    """Points around the origin of unconstrained space where density and gradient are finite, (points, D).

    There the attention is nearly absent and every J_i nearly the identity: the side of the boundary where det J > 0. The
    spread halves until all is finite.

    Args:
        target: the posterior.
        points: how many.
        seed: of the draws.
        spread: standard deviation to begin with.
        tries: halvings at most.

    Raises:
        InputError: none is found.
    """
    unit = target.model.unit
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(points, target.dim, generator=generator, dtype=torch.float64).to(unit)  # type: ignore[arg-type]
    for attempt in range(tries):
        z = spread * 0.5**attempt * noise
        value, gradient = target.value_and_gradient(z)
        if bool(torch.isfinite(value).all() and torch.isfinite(gradient).all()):
            return z
    raise InputError(
        f"no feasible start: the log-density is not finite within {spread * 0.5 ** (tries - 1):.1g} of the origin; "
        "look for values in the data that are too large for its dtype."
    )
