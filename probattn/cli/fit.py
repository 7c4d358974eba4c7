"""``probattn fit``: the posterior of attention parameters."""

from __future__ import annotations

from probattn.cli.command import command
from probattn.cli.output import say
from probattn.inference.fit import FitOptions, fit
from probattn.inference.runtime.distributed import launched_rank

__all__ = ["OPTIONS", "PANELS", "app", "run"]


def run(options: FitOptions) -> None:
    """Infer attention parameters behind hidden states.

    Example: probattn fit --data hidden.npz --method svi --out runs/fit

    --method chooses which further options there are: see probattn fit --method svi --help. The inference is judged,
    and fit.nc and figures are written. Under torchrun, svi and map share each step among the processes.

    Exit status: 0 done, 2 bad usage or input, 130 interrupted (--resume goes on).
    """
    _, diagnosis = fit(options)
    if launched_rank() == 0:
        say(str(diagnosis))
        files = (options.out / name for name in ("fit.nc", "diagnosis.json", "summary.csv", "figures"))
        say(f"results: {', '.join(map(str, files))}")


OPTIONS = FitOptions
PANELS = {
    "Data": ("data", "corpus", "array", "sequences", "standardise", "project"),
    "Inference": ("method", "jacobian", "compare"),
    "Attention": ("heads", "rank", "value_dim", "mask", "prior_scale", "memory_radius", "contraction"),
    "Files and machine": ("out", "resume", "seed", "device", "dtype"),
}
app = command("fit", OPTIONS, run, PANELS)
