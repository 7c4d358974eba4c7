"""``probattn bench``: costs as ratios, measured in one run."""

from __future__ import annotations

import sys

from probattn.cli.command import command
from probattn.inference.bench.run import BenchOptions, bench, broken_gates

__all__ = ["OPTIONS", "app", "run"]


def run(options: BenchOptions) -> int:
    """Measure what the exact penalty, sampling, posteriors and training cost, beside what one would use otherwise.

    Exit status: 0 done (goals that are missed are reported, not failed), 1 a gate is broken (--gate), 2 bad usage.
    """
    rows = bench(options)
    print(f"results: {options.out / 'bench.json'}, {options.out / 'bench.md'}")
    broken = broken_gates(rows) if options.gate else []
    if broken:
        print("; ".join(broken), file=sys.stderr)
    return int(bool(broken))


OPTIONS = BenchOptions
app = command("bench", OPTIONS, run)
