"""The one result of all methods: draws in unconstrained space with what is known about each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Draws", "Info"]

Info = dict[str, str | int | float]


@dataclass(frozen=True)
class Draws:
    """Draws of a posterior or of an approximation to it; a mode is one chain of one draw.

    Attributes:
        method: "map", "laplace", "svi" or "nuts".
        z: draws in unconstrained space, ``(chain, draw, D)``; see
            :meth:`~probattn.inference.methods.log_density.LogDensity.constrain`.
        statistics: ``(chain, draw)`` each, by the names that ArviZ uses.
        info: numbers and words about the run.
        history: what was recorded during an optimisation, one number per evaluation, by name; ``step`` among them.
    """

    method: str
    z: Tensor
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    info: Mapping[str, str | int | float] = field(default_factory=dict)
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
