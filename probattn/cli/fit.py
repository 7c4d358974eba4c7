"""``probattn fit``: the posterior of attention parameters."""

from __future__ import annotations

from probattn.cli.command import command
from probattn.inference.fit import FitOptions, fit
from probattn.inference.runtime.distributed import launched_rank

__all__ = ["OPTIONS", "app", "run"]


def run(options: FitOptions) -> None:
    """Infer attention parameters behind hidden states.

    --method chooses which further options there are: see probattn fit --method svi --help. The inference is judged,
    and fit.nc and figures are written. Under torchrun, svi and map share each step among the processes. Exit status: 0
    done, 2 bad usage or input, 130 interrupted (--resume goes on).
    """
    _, diagnosis = fit(options)
    if launched_rank() == 0:
        print(diagnosis)
        files = (options.out / name for name in ("fit.nc", "diagnosis.json", "summary.csv", "figures"))
        print(f"results: {', '.join(map(str, files))}")


OPTIONS = FitOptions
app = command("fit", OPTIONS, run)
