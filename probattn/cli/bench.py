"""``probattn bench``: costs as ratios, measured in one run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

__all__ = ["bench"]


def bench(
    parts: Annotated[
        str, typer.Option(help="Only these: penalty,autograd,density,memory,sampling,nuts,training,gpu.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Rounds in which the competitors take turns.")] = 5,
    gate: Annotated[bool, typer.Option("--gate", help="Exit with 1 where a ratio falls behind its gate.")] = False,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/bench"),
    seed: Annotated[int, typer.Option(help="Of the numbers that are measured on.", min=0, max=2**31 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Measure what the exact penalty, sampling, posteriors and training cost, beside what one would use otherwise.

    Exit status: 0 done (goals that are missed are reported, not failed), 1 a gate is broken (--gate), 2 bad usage.
    """
    from probattn.inference.bench.run import bench as run
    from probattn.inference.bench.run import broken_gates
    from probattn.inference.runtime.environment import select_device

    torch.manual_seed(seed)
    chosen = tuple(filter(None, (part.strip() for part in parts.split(","))))
    rows = run(out, select_device(device), parts=chosen, rounds=rounds, report=typer.echo)
    typer.echo(f"results: {out / 'bench.json'}, {out / 'bench.md'}")
    broken = broken_gates(rows) if gate else []
    if broken:
        typer.echo("; ".join(broken), err=True)
        raise typer.Exit(1)
