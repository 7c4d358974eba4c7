"""Arms and sizes of the fine-tuning study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Annotated, Any

from probattn.errors import InputError, require_at_least
from probattn.models.options import Range, check_options

__all__ = ["ARMS", "CLEAN", "FAMILIES", "OTHER", "Arm", "Sizes"]

CLEAN, OTHER = "clean", "another text"
#: Levels of the corruptions of a context: shares of characters, or of the norm of each embedding.
FAMILIES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "relative noise": (0.2, 0.5),
        "embedding attack": (0.1, 0.3),
        "swaps": (0.05, 0.1),
        "substitutions": (0.05, 0.1),
        "typos": (0.05, 0.1),
        "deletions": (0.05, 0.1),
    }
)


@dataclass(frozen=True)
class Arm:
    """One way of fine-tuning.

    Attributes:
        name: short name.
        tuned: False leaves the model as it was pretrained.
        neftune: alpha of uniform noise of half-width alpha / sqrt(T p) on the embeddings (Jain et al., 2310.05914).
        adversarial: length of one step up the gradient, as a fraction of the norm of each embedding; the objective is
            the mean of both losses.
        weight: weight of the one-sided barrier on the residual stream of every layer.
        reason: purpose of the arm.
    """

    name: str
    tuned: bool = True
    neftune: float = 0.0
    adversarial: float = 0.0
    weight: float = 0.0
    reason: str = ""

    def __post_init__(self) -> None:
        for name in ("neftune", "adversarial", "weight"):
            require_at_least(f"arm {self.name}: {name}", getattr(self, name), 0)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that decide the result, by name: all but the reason."""
        fields = asdict(self)
        del fields["reason"]
        return fields


ARMS: tuple[Arm, ...] = (
    Arm("plain", reason="cross-entropy alone: what every other arm is compared with"),
    Arm("residual one_sided 0.05", weight=0.05, reason="the barrier where it acts on a language model"),
    Arm("NEFTune 5", neftune=5.0, reason="noise training as it is used (Jain et al., 2310.05914)"),
    Arm("adversarial 0.1", adversarial=0.1, reason="positive control for the attack"),
    Arm("as pretrained", tuned=False, reason="what tuning changes at all"),
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the study.

    Attributes:
        seeds: random seeds; every arm has one run per seed.
        steps: number of optimiser steps.
        batch: number of windows per step.
        length: number T of tokens per window in training.
        learning_rate: peak learning rate of AdamW; it rises during the warm-up and falls linearly to zero.
        warmup: number of warm-up steps.
        positions: share of the positions that the barrier evaluates.
        layers: chance of each layer to be evaluated in a step.
        windows: number of held-out pairs of a context and its continuation.
        context: number of tokens of a context at most.
        continuation: number of tokens of a continuation, whose loss is measured.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    steps: Annotated[int, Range(least=1)] = 200
    batch: Annotated[int, Range(least=1)] = 4
    length: Annotated[int, Range(least=2)] = 128
    learning_rate: Annotated[float, Range(above=0)] = 2e-5
    warmup: Annotated[int, Range(least=0)] = 20
    positions: Annotated[float, Range(above=0, most=1)] = 0.05
    layers: Annotated[float, Range(above=0, most=1)] = 0.2
    windows: Annotated[int, Range(least=2)] = 32
    context: Annotated[int, Range(least=2)] = 64
    continuation: Annotated[int, Range(least=1)] = 48

    def __post_init__(self) -> None:
        check_options(self)
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < 2:
            raise InputError(f"seeds are {self.seeds}; give at least two, all different.")

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that one run depends on, by name: all but the seeds."""
        fields = asdict(self)
        del fields["seeds"]
        return fields
