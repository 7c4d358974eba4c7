"""All comparisons in one process, as a table, a JSON file and a figure."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from probattn.inference.bench.density import density
from probattn.inference.bench.growth import growth
from probattn.inference.bench.harness import Row
from probattn.inference.bench.margins import against_forward, against_jacrev, margin_memory
from probattn.inference.bench.penalty import against_attention, against_autograd, against_others, memory
from probattn.inference.bench.posterior import nuts
from probattn.inference.bench.sampling import sequences
from probattn.inference.bench.training import gpt2_step
from probattn.inference.runtime.environment import describe, select_device
from probattn.inference.runtime.files import prepare_folder, write_figure, write_json, write_text
from probattn.inference.runtime.progress import log_stage
from probattn.models.options import Device, Range, Seed, check_options
from probattn.moments import cpu
from probattn.plotting import plot_cost

__all__ = ["GATES", "PARTS", "BenchOptions", "Part", "as_table", "bench", "broken_gates"]

_LOG = logging.getLogger(__name__)

Part = Literal["penalty", "autograd", "density", "memory", "sampling", "nuts", "training", "gpu", "margins"]

#: Comparisons by the name that ``--parts`` takes.
PARTS: Mapping[Part, Callable[[torch.device, int], list[Row]]] = {
    "penalty": against_others,
    "autograd": against_autograd,
    "density": density,
    "memory": lambda device, rounds: memory(),
    "sampling": sequences,
    "nuts": lambda device, rounds: nuts(rounds),
    "training": gpt2_step,
    "gpu": lambda device, rounds: against_attention(rounds),
    "margins": lambda device, rounds: [
        *against_forward(device, rounds),
        *against_jacrev(device, rounds),
        *margin_memory(),
    ],
}
#: Ratio that a change must keep, by competitor, about half of what is reached, so that a busy machine does not fail it.
GATES: Mapping[str, float] = {
    "its three matrix products, dense": 4.0,
    "einsum and slogdet": 1.5,
    "dense Jacobian by torch.func": 100.0,
}


@dataclass(frozen=True)
class BenchOptions:
    """Options of ``probattn bench``.

    Attributes:
        parts: parts to measure; none stands for all.
        rounds: number of rounds in which the competitors take turns.
        gate: exit with status 1 where a ratio falls behind its gate.
        out: output folder.
        seed: random seed of the numbers that are measured on.
        device: where to measure; auto takes a GPU where there is one.
    """

    parts: tuple[Part, ...] = ()
    rounds: Annotated[int, Range(least=1)] = 5
    gate: bool = False
    out: Path = Path("runs/bench")
    seed: Seed = 0
    device: Device = "auto"

    def __post_init__(self) -> None:
        check_options(self)


def bench(options: BenchOptions) -> list[Row]:
    """Measure and write ``bench.json``, ``bench.md`` and ``cost.png``; parts and rows are logged.

    Args:
        options: parts, rounds and where to write.

    Returns:
        The rows.

    Raises:
        InputError: a folder that cannot be written, or a device that is not there.
    """
    device = select_device(options.device)
    prepare_folder(options.out)
    torch.manual_seed(options.seed)
    rows: list[Row] = []
    for name, part in PARTS.items():
        if options.parts and name not in options.parts:
            continue
        log_stage(_LOG, f"measuring {name}")
        try:
            found = part(device, options.rounds)
        except ImportError as error:
            found = [Row(name, "", None, faster=False, notes={"not measured": f"{error}; install probattn[bench]."})]
        for row in found:
            rows.append(row)
            _LOG.info(_line(row))
    environment = describe(device, torch.float32, options.seed)
    curves: dict[str, Any] = {}
    if not options.parts or "penalty" in options.parts:
        curves = growth(device)
        write_figure(options.out / "cost.png", plot_cost(curves))
    content = {"schema": 1, "environment": environment, "rows": [row.as_dict() for row in rows], "growth": curves}
    write_json(options.out / "bench.json", content)
    write_text(options.out / "bench.md", as_table(rows, environment))
    return rows


def as_table(rows: Sequence[Row], environment: Mapping[str, Any]) -> str:
    """Write rows as Markdown.

    Args:
        rows: rows of the benchmark.
        environment: machine and versions, see :func:`~probattn.inference.runtime.environment.describe`.

    Returns:
        A table, the seconds and the notes.
    """
    where = (
        f"`{environment['command']}`, {environment['date']}; {environment['processor']}, {environment['device']}, "
        f"{environment['threads']} threads of {environment['cores']} cores, kernels by {environment['kernels']}; "
        f"torch {environment['versions']['torch']}; "
        "float32 unless stated. Ratios of minima over rounds in which the competitors take turns."
    )
    lines = ["# Costs as ratios", "", where, "", "| work | against | ratio | goal | met |", "|---|---|---|---|---|"]
    for row in rows:
        content = row.as_dict()
        ratio = row.notes.get("not measured", "not measured") if row.ratio is None else _ratio(row)
        met = {True: "yes", False: "**no**", None: ""}[row.met]
        work, against = (name.replace("|", r"\|") for name in (row.work, row.against))  # a bar ends a cell
        lines.append(f"| {work} | {against} | {ratio} | {content['goal'] or ''} | {met} |")
    seconds = [
        f"- {row.work}: "
        + ", ".join(f"{name} {timing.least:.4g} s (median {timing.median:.4g})" for name, timing in row.seconds.items())
        for row in rows
        if row.seconds
    ]
    notes = [
        f"- {row.work} against {row.against}: " + "; ".join(f"{name} {value}" for name, value in row.notes.items())
        for row in rows
        if row.notes and row.ratio is not None
    ]
    return "\n".join([*lines, "", "Seconds:", "", *seconds, "", "Notes:", "", *notes]) + "\n"


def broken_gates(rows: Sequence[Row]) -> list[str]:
    """List the rows that fall behind :data:`GATES`, which are meant for the compiled kernels.

    Args:
        rows: rows of the benchmark.

    Returns:
        One line per broken gate; none where the kernels are not compiled.
    """
    broken: list[str] = []
    if not cpu.AVAILABLE:
        return broken
    for row in rows:
        gate = GATES.get(row.against)
        if gate is not None and row.ratio is not None and replace(row, goal=gate).met is False:
            broken.append(f"{row.work} against {row.against}: {_ratio(row)}, gate {gate:g}")
    return broken


def _ratio(row: Row) -> str:
    three_digits = float(f"{row.ratio:.3g}")
    return f"{three_digits:,g} times {'faster' if row.faster else 'the cost'}"


def _line(row: Row) -> str:
    reached = row.notes.get("not measured", "not measured") if row.ratio is None else _ratio(row)
    goal = f" (goal {row.as_dict()['goal']}: {'met' if row.met else 'missed'})" if row.met is not None else ""
    return f"{row.work} | {row.against}: {reached}{goal}"
