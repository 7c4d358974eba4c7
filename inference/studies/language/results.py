"""Results of the study: the summaries that ship with the package, and those of a folder of tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from probattn.errors import InputError
from probattn.inference.runtime.files import write_json
from probattn.inference.studies.language.location import Location, locate, swapped_apart
from probattn.inference.studies.language.prediction import Prediction, predict
from probattn.inference.studies.language.tables import Tables, read_tables

__all__ = ["Results", "committed_results", "read_results", "summarise"]

FILE = "language.json"


@dataclass(frozen=True)
class Results:
    """Both summaries and what they are of.

    Attributes:
        location: where the blocks lie.
        prediction: what the margins predict; None where no noise was measured.
        swapped: share of permutations of a control with the trained model in which layers are apart.
        record: model, corpus, plan, machine and date, as ``study.json`` has them; empty for the quick form.
    """

    location: Location
    prediction: Prediction | None
    swapped: float
    record: dict[str, Any]

    @property
    def origin(self) -> str:
        """Model, text, date, command, machine and other runs in words; empty for the quick form."""
        if not self.record:
            return ""
        environment = self.record["environment"]
        where = ", ".join(dict.fromkeys([environment["device"], environment["processor"]]))
        words: str = (
            f"{self.record['model']['name']} on {self.record['corpus']['name']}, {environment['date'][:10]}, "
            f"{environment['command']}, seed {environment['seed']}, {where}" + self.record.get("also", "")
        )
        return words

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": 1,
            "record": self.record,
            "swapped": self.swapped,
            "location": self.location.as_dict(),
            "prediction": None if self.prediction is None else self.prediction.as_dict(),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Results:
        """Read results that :meth:`as_dict` wrote."""
        found = content["prediction"]
        return cls(
            Location.from_dict(content["location"]),
            None if found is None else Prediction.from_dict(found),
            content["swapped"],
            content["record"],
        )


def summarise(tables: Tables, record: dict[str, Any] | None = None, *, resamples: int = 1000, seed: int = 0) -> Results:
    """Summarise the tables of the study.

    Args:
        tables: tables; "text" at least.
        record: contents of ``study.json``.
        resamples: number of bootstrap resamples.
        seed: random seed.
    """
    control = next((name for name in ("turned_output", "random_weights") if name in tables), "turned_output")
    return Results(
        locate(tables, resamples=resamples, seed=seed),
        predict(tables, resamples=resamples, seed=seed) if "noise" in tables else None,
        swapped_apart(tables, control, resamples=min(resamples, 400), seed=seed),
        record or {},
    )


def read_results(folder: Path) -> Results:
    """Summarise the tables that ``python -m probattn.inference.studies.language`` wrote.

    Args:
        folder: its output folder.

    Returns:
        :class:`Results`, which are written to ``language.json`` in that folder as well.

    Raises:
        InputError: a folder without such tables.
    """
    record = folder / "study.json"
    if not record.is_file():
        raise InputError(
            f"{folder} holds no study.json; run python -m probattn.inference.studies.language --out there."
        )
    results = summarise(read_tables(folder), json.loads(record.read_text(encoding="utf-8")))
    write_json(folder / FILE, results.as_dict())
    return results


def committed_results() -> Results | None:
    """Read the results that ship with the package; None where there are none."""
    file = resources.files("probattn.inference.studies") / "results" / FILE
    if not file.is_file():
        return None
    return Results.from_dict(json.loads(file.read_text(encoding="utf-8")))
