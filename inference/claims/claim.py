"""What a claim is, and the fitted model that the claims are measured on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from probattn.attention import CausalAttention
from probattn.models.language import LanguageModel

__all__ = ["Claim", "Subject", "judge", "worst"]

Kind = Literal["identity", "statistical", "empirical"]
Verdict = Literal["supported", "supported_within", "not_supported", "not_run"]


@dataclass(frozen=True)
class Claim:
    """A statement, what was measured, and the verdict.

    Attributes:
        id: short name.
        statement: one sentence that can be false.
        kind: "identity" (must hold to numerical precision), "statistical" (a test with a stated error rate) or
            "empirical" (an experiment whose verdict decides nothing but itself).
        verdict: "supported", "supported_within" (then ``condition`` says where), "not_supported", "not_run" (then
            ``condition`` says why).
        measured: numbers by name.
        bound: the largest value that each decisive number may take.
        condition: where it holds.
        seconds: how long the measurement took.
    """

    id: str
    statement: str
    kind: Kind
    verdict: Verdict
    measured: Mapping[str, float]
    bound: Mapping[str, float] = field(default_factory=dict)
    condition: str | None = None
    seconds: float = 0.0

    @property
    def broken(self) -> bool:
        """Whether an identity that must hold did not."""
        return self.kind == "identity" and self.verdict == "not_supported"

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; a number that JSON lacks becomes its name, such as "inf"."""
        return {
            "id": self.id,
            "statement": self.statement,
            "kind": self.kind,
            "verdict": self.verdict,
            "condition": self.condition,
            "measured": {name: _json_number(value) for name, value in self.measured.items()},
            "bound": {name: _json_number(value) for name, value in self.bound.items()},
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Subject:
    """A fitted language model and real text to measure on, all in float64 on the CPU.

    Attributes:
        model: the model.
        values: its sites at the mode.
        inputs: held-out windows, (N, T).
        targets: their successors, (N, T).
        total: windows in the training data.
        seed: of everything random in a claim.
    """

    model: LanguageModel
    values: Mapping[str, Tensor]
    inputs: Tensor
    targets: Tensor
    total: int
    seed: int = 0

    @property
    def attention(self) -> CausalAttention:
        """The fitted attention stage of the prior."""
        return self.model.stage(dict(self.values))

    def tokens(self, windows: int) -> Tensor:
        """Embeddings of the first held-out windows, (windows, T, p)."""
        return self.model.embed(dict(self.values), self.inputs[:windows])


def judge(measured: Mapping[str, float], bound: Mapping[str, float]) -> bool:
    """Whether every bounded number stays within its bound; NaN does not."""
    return all(measured[name] <= largest for name, largest in bound.items())


def worst(*numbers: float) -> float:
    """The largest of some errors; NaN if any is, which Python's own max may drop."""
    return math.nan if any(math.isnan(number) for number in numbers) else max(numbers)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
