"""Growth of Jacobians on SmolLM2: measured layer by layer in a folder, or as it ships with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from probattn.errors import InputError
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import prepare_folder, write_json
from probattn.inference.studies.language.plan import Plan
from probattn.inference.studies.language.source import load_source
from probattn.inference.studies.published.lengths import Growth, measure_growth

__all__ = ["LAYERS", "TEXTS", "GrowthResults", "committed_growth", "measure_on_smollm2"]

FILE = "published.json"
LAYERS = (0, 10, 20, 29)
TEXTS = 5
LENGTHS = (16, 32, 64, 128, 256, 512)


@dataclass(frozen=True)
class GrowthResults:
    """Growth of Jacobians with length.

    Attributes:
        layers: one entry per layer.
        record: model, text, machine and date, as plain JSON values.
    """

    layers: Sequence[Growth]
    record: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"schema": 1, "record": self.record, "layers": [layer.as_dict() for layer in self.layers]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> GrowthResults:
        """Read what :meth:`as_dict` returned."""
        return cls([Growth.from_dict(layer) for layer in content["layers"]], content["record"])


def measure_on_smollm2(
    name: str, text: str, folder: Path | None = None, *, layers: Sequence[int] = LAYERS, texts: int = TEXTS
) -> GrowthResults:
    """Measure SmolLM2-135M-Instruct on a text; what is in a folder is not measured again.

    Args:
        name: name of the text.
        text: the text, one window per article where it has articles.
        folder: folder of the finished layers; None keeps none.
        layers: numbers of the layers.
        texts: number of texts, at least 2.

    Returns:
        :class:`GrowthResults`. Some ten minutes of one core.

    Raises:
        InputError: the model's package is not installed, a text that does not fill the windows, or a folder with layers
            of another text.
    """
    file = None if folder is None else prepare_folder(folder) / FILE
    source = load_source(name, text, None, Plan(windows=texts, control_windows=texts, length=LENGTHS[-1]))
    found: list[Growth] = []
    record = {**source.record, "texts": texts, "environment": describe(torch.device("cpu"), torch.float32, 0)}
    if file is not None and file.exists():
        before = GrowthResults.from_dict(json.loads(file.read_text(encoding="utf-8")))
        if any(before.record[part] != record[part] for part in ("model", "corpus", "texts")):
            raise InputError(f"{file} was measured on another text or model; name another folder.")
        found = [growth for growth in before.layers if growth.layer in layers]
    model = source.model.requires_grad_(False)
    for number in layers:
        if number not in {growth.layer for growth in found}:
            found += measure_growth(model, source.ids, (number,), LENGTHS)
            if file is not None:
                write_json(file, GrowthResults(found, record).as_dict())
    return GrowthResults(sorted(found, key=lambda growth: growth.layer), record)


def committed_growth() -> GrowthResults | None:
    """Read the results that ship with the package; None where there are none."""
    file = resources.files("probattn.inference.studies") / "results" / FILE
    if not file.is_file():
        return None
    return GrowthResults.from_dict(json.loads(file.read_text(encoding="utf-8")))
