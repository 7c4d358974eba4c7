"""Results of a finished study on disk: table, figures, and the summary that ships with the package."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import write_figure, write_json, write_text
from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.figures import draw_study
from probattn.inference.studies.robustness.gains import measure_gains
from probattn.inference.studies.robustness.obfuscation import check_obfuscation
from probattn.inference.studies.robustness.study import Record
from probattn.inference.studies.robustness.summary import Summary, shared_seeds, summarise
from probattn.inference.studies.robustness.table import render_table
from probattn.inference.studies.robustness.training import one_thread
from probattn.inference.studies.robustness.verdict import Verdict, judge_study
from probattn.models.corpus import Corpus

__all__ = ["RESULTS", "study_identity", "write_study"]

RESULTS = "robustness.json"


def study_identity(corpus: Corpus, study: Study, arms: Sequence[Arm]) -> dict[str, Any]:
    """Describe the study, arms and text of results, as read back from JSON; the seeds are those of the summary.

    Args:
        corpus: text.
        study: sizes.
        arms: arms of the study.
    """
    content = {"study": study.as_dict(), "arms": [arm.as_dict() for arm in arms], "corpus": corpus.digest}
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def write_study(
    folder: Path,
    records: Sequence[Record],
    *,
    arms: Sequence[Arm],
    study: Study,
    corpus: Corpus,
    weights: Path | None = None,
    device: torch.device | None = None,
    command: str | None = None,
) -> tuple[Summary, Verdict]:
    """Summarise and judge a study; write ``robustness.md``, ``robustness.json`` and the figures.

    Args:
        folder: output folder.
        records: records of the runs, every arm with the same seeds.
        arms: arms of the study.
        study: sizes of the study.
        corpus: text.
        weights: folder with the weights of the models, which are attacked again; None leaves that out.
        device: device on which it ran; None for the CPU.
        command: command to name; None for that of this process.

    Returns:
        The summary and its verdict.
    """
    summary = summarise(records, arms)
    verdict = judge_study(summary)
    environment = describe(device or torch.device("cpu"), torch.float32, summary.seeds[0])
    if command is not None:
        environment["command"] = command
    figures = draw_study(summary)
    for name, figure in figures.items():
        write_figure(folder / f"{name}.png", figure)
    with one_thread():
        seeds = shared_seeds(records)
        attacked = [] if weights is None else check_obfuscation(weights, arms, study, corpus, seeds)
        gains = [] if weights is None else measure_gains(weights, arms, study, corpus, seeds)
    table = render_table(
        summary, verdict, records, arms, study, corpus.name, environment, list(figures), attacked=attacked, gains=gains
    )
    write_text(folder / "robustness.md", table)
    content = {
        "schema": 2,
        "origin": "{date}, {command}, {processor}, {device}".format(**environment),
        **study_identity(corpus, study, arms),
        "summary": summary.as_dict(),
        "attacked": [found._asdict() for found in attacked],
        "gains": [found._asdict() for found in gains],
    }
    write_json(folder / RESULTS, content)
    return summary, verdict
