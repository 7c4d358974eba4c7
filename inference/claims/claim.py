"""A claim with its verdict, and the fitted model on which claims are measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.models.corpus import Corpus
from probattn.models.language import LanguageModel

__all__ = ["Claim", "Settings", "Subject", "Verdict", "judge", "verdict_in_words", "worst"]

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
        verdict: "supported", "supported_within" (under ``condition``), "not_supported" or "not_run" (for the reason in
            ``condition``); :func:`verdict_in_words` puts it into words.
        measured: numbers by name.
        bound: the largest value that each decisive number may take.
        condition: a phrase that completes "holds if ..." for "supported_within", or the reason for "not_run".
        formula: the statement in one line of mathematics.
        control: the negative control: a fault made on purpose, and its effect on the measurement.
        finding: sentences on what else was seen, above all where the statement fails.
        figures: figures for the report, by name.
        seconds: duration of the measurement.
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
    finding: str = ""
    figures: Mapping[str, Figure] = field(default_factory=dict, compare=False)
    seconds: float = 0.0

    @property
    def broken(self) -> bool:
        """True if an identity, which must hold, does not."""
        return self.kind == "identity" and self.verdict == "not_supported"

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; a number that JSON lacks becomes its name, such as "inf"."""
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
            "finding": self.finding,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True)
class Subject:
    """A fitted language model and real text to measure on, all in float64 on the CPU.

    Attributes:
        model: the model.
        values: the model's sites at the mode.
        inputs: characters of held-out windows, (N, T).
        targets: the successor of each of these characters, (N, T).
        total: number of windows in the training data.
        seed: random seed for the claims.
        line_feed: index of the line feed in the vocabulary, which ends a string; None where the text has none.
        corpus: the text itself, for a claim that trains models of its own; without it such a claim is not run.
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
        """Return the embeddings of the first held-out windows, (windows, T, p)."""
        return self.model.embed(dict(self.values), self.inputs[:windows])


@dataclass(frozen=True)
class Settings:
    """Size and place of the measurements.

    Attributes:
        full: measure the whole of a claim instead of a representative part.
        named: the claim was asked for by name; with ``full`` its long study is run instead of read from the package.
        jobs: number of processes that share a study.
        folder: folder in which a study keeps its finished parts, so that it can resume; None keeps nothing.
    """

    full: bool = False
    named: bool = False
    jobs: int = 1
    folder: Path | None = None


def judge(measured: Mapping[str, float], bound: Mapping[str, float]) -> bool:
    """Return True if every bounded number stays within its bound; NaN does not."""
    return all(measured[name] <= largest for name, largest in bound.items())


def verdict_in_words(claim: Claim | Mapping[str, Any]) -> str:
    """Put a verdict into words: "holds", "holds if ...", "does not hold" or "not run (...)".

    Args:
        claim: a claim, or its entry in ``claims.json``.

    Returns:
        A phrase that can follow the statement, without a full stop.

    Example:
        >>> verdict_in_words({"verdict": "supported_within", "condition": "the map does not fold"})
        'holds if the map does not fold'
    """
    entry = claim.as_dict() if isinstance(claim, Claim) else claim
    return {
        "supported": "holds",
        "supported_within": f"holds if {entry['condition']}",
        "not_supported": "does not hold",
        "not_run": f"not run ({entry['condition']})",
    }[entry["verdict"]]


def worst(*numbers: float) -> float:
    """Return the largest of some errors; NaN if any is NaN, which Python's own max may drop."""
    return math.nan if any(math.isnan(number) for number in numbers) else max(numbers)


def _json_number(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
