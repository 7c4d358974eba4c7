"""``python -m probattn.inference.studies.robustness``: the study on any text and in any size, resumable run by run."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from probattn.errors import InputError, require_choice
from probattn.inference.runtime.environment import select_device
from probattn.inference.runtime.files import prepare_folder
from probattn.inference.studies.command import run_command
from probattn.inference.studies.robustness.arms import ARMS, VARIANTS, Study
from probattn.inference.studies.robustness.report import write_study
from probattn.inference.studies.robustness.rules import PLAIN
from probattn.inference.studies.robustness.study import read_study, run_study
from probattn.models.corpus import load_corpus
from probattn.models.options import Device, Range, check_options

__all__ = ["StudyOptions", "main", "study"]


@Parameter(name="*")
@dataclass(frozen=True)
class StudyOptions:
    """Options of the study.

    Attributes:
        corpus: text to train on: python-docs, or the path of a UTF-8 file.
        heldout: second text for evaluation; without it, the last tenth of the first.
        name: name of the text in the report; without it, that of the file.
        out: output folder; the runs in it are read, those that are missing are made.
        jobs: number of processes that share the runs; 0 takes one per core.
        variants: add the arms that vary the barrier further.
        arms: names of the arms to run now; none stands for all.
        report: make no run; write the results of those that are finished, each arm with the seeds that it has.
        device: where to train.
        sizes: sizes of the study.
    """

    corpus: str = "python-docs"
    heldout: str | None = None
    name: str | None = None
    out: Path = Path("runs/robustness")
    jobs: Annotated[int, Range(least=0)] = 0
    variants: bool = False
    arms: tuple[str, ...] = ()
    report: bool = False
    device: Device = "cpu"
    sizes: Annotated[Study, Parameter(name="*")] = field(default_factory=Study)

    def __post_init__(self) -> None:
        check_options(self)


def study(options: StudyOptions) -> int:
    """Make the runs that are missing and write table, figures and ``robustness.json``.

    Args:
        options: text, sizes and where to write.

    Returns:
        Exit status: 0.

    Raises:
        InputError: input that cannot be used; or, for a report, fewer than two seeds of plain training.
    """
    corpus = load_corpus(options.corpus, heldout=options.heldout)
    corpus = replace(corpus, name=options.name or corpus.name)
    arms, device = (*ARMS, *(VARIANTS if options.variants else ())), select_device(options.device)
    runs = prepare_folder(options.out) / "studies" / "robustness"  # where ``probattn verify --full`` looks for them
    for name in options.arms:
        require_choice("arms", name, [arm.name for arm in arms])
    if not options.report:
        jobs = options.jobs or os.cpu_count() or 1
        chosen = [arm for arm in arms if not options.arms or arm.name in options.arms]
        run_study(chosen, options.sizes, corpus, folder=runs, jobs=jobs, device=device)
    records = read_study(arms, options.sizes, corpus, runs, device=device)
    plain = sum(record.arm == PLAIN for record in records)
    if plain < 2:
        raise InputError(f"{runs}: {plain} finished runs of plain training, fewer than two; leave out --report first.")
    command = shlex.join(["python", "-m", "probattn.inference.studies.robustness", *sys.argv[1:]])
    write_study(
        options.out,
        records,
        arms=arms,
        study=options.sizes,
        corpus=corpus,
        weights=runs,
        device=device,
        command=command,
    )
    return 0


def main() -> None:
    """Read the command line and run."""
    run_command("robustness", __doc__, _run)


def _run(options: StudyOptions | None = None) -> int:
    return study(options or StudyOptions())


if __name__ == "__main__":
    main()
