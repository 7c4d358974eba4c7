"""What a claim is, and the fitted model that the claims are measured on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.models.corpus import Corpus
from probattn.models.language import LanguageModel

__all__ = ["Claim", "Settings", "Subject", "judge", "worst"]

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
        formula: the statement in one line of mathematics.
        control: the negative control: what was broken on purpose, and what came of it.
        figures: by name, for the report.
        seconds: how long the measurement took.
    """

    id: str
    statement: str
    kind: Kind
    verdict: Verdict
    measured: Mapping[str, float]
    bound: Mapping[str, float] = field(default_factory=dict)
    condition: str | None = None
    formula: str = ""
    control: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict, compare=False)
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
            "formula": self.formula,
            "kind": self.kind,
            "verdict": self.verdict,
            "condition": self.condition,
            "measured": {name: _json_number(value) for name, value in self.measured.items()},
            "bound": {name: _json_number(value) for name, value in self.bound.items()},
            "control": self.control,
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
        line_feed: index of the line feed in the vocabulary, which ends a string; None where the text has none.
        seed: of everything random in a claim.
        corpus: the text itself, for a claim that trains models of its own; None: such a claim is not run.
    """

    model: LanguageModel
    values: Mapping[str, Tensor]
    inputs: Tensor
    targets: Tensor
    total: int
    seed: int = 0
    line_feed: int | None = None
    corpus: Corpus | None = None

    @property
    def attention(self) -> CausalAttention:
        """The fitted attention stage of the prior."""
        return self.model.stage(dict(self.values))

    def tokens(self, windows: int) -> Tensor:
        """Embeddings of the first held-out windows, (windows, T, p)."""
        return self.model.embed(dict(self.values), self.inputs[:windows])


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        full: the whole of a claim instead of a representative part.
        named: the claim was asked for by name: with ``full`` its long study is run, which otherwise is read in.
        jobs: processes that share a study.
        folder: where a study keeps what it has finished, to go on from there; None keeps nothing.
        report: called with a line now and then.
    """

    full: bool = False
    named: bool = False
    jobs: int = 1
    folder: Path | None = None
    report: Callable[[str], None] = lambda line: None


def judge(measured: Mapping[str, float], bound: Mapping[str, float]) -> bool:
    """Whether every bounded number stays within its bound; NaN does not."""
    return all(measured[name] <= largest for name, largest in bound.items())


def worst(*numbers: float) -> float:
    """The largest of some errors; NaN if any is, which Python's own max may drop."""
    return math.nan if any(math.isnan(number) for number in numbers) else max(numbers)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
