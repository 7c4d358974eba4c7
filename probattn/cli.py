"""The command line: flags in, one exit status and one line of error out."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from tqdm import tqdm

import probattn
from probattn.barrier import BarrierKind
from probattn.errors import InputError
from probattn.models.language import Prior

__all__ = ["app", "main"]

app = typer.Typer(
    name="probattn",
    help="Causal self-attention as a generative model: its Jacobian is a log-barrier, every claim is measured.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_INTERRUPTED = 130  # what a shell reports for Ctrl-C
# Typer carries a Click of its own since 0.26 and the ordinary one before: name the class by its place, not its module.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def _version(shown: bool) -> None:
    if shown:
        typer.echo(f"probattn {probattn.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def verify(
    corpus: Annotated[
        str, typer.Option(help="python-docs, a path to a UTF-8 text, or hf:NAME[:CONFIG].")
    ] = "python-docs",
    heldout: Annotated[str | None, typer.Option(help="A second text for evaluation; else the last tenth.")] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/verify"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**31 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32 or float64, for the fit; claims are measured in float64.")
    ] = "float64",
    steps: Annotated[int, typer.Option(help="Optimiser steps at most.")] = 2000,
    batch: Annotated[int, typer.Option(help="Windows in a minibatch.")] = 32,
    context: Annotated[int, typer.Option(help="Characters in a window.")] = 64,
    dim: Annotated[int, typer.Option(help="Size of the embeddings.")] = 32,
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 2,
    weight: Annotated[float, typer.Option(help="lambda, the weight of the prior on the embeddings.", max=1e6)] = 0.05,
    kind: Annotated[str, typer.Option(help=f"Penalty: {', '.join(get_args(BarrierKind))}.")] = "logdet",
    prior: Annotated[
        str, typer.Option(help=f"{', '.join(get_args(Prior))}: with or without the Gaussian term.")
    ] = "full",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the fit from the checkpoint in the folder.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Fit a character model with the attention prior on a text, measure every claim, and write a report.

    Exit status: 0 done, 1 an identity that must hold did not, 2 bad usage or input.
    """
    # Matplotlib, ArviZ and SciPy are needed here and not by `import probattn`.
    from probattn.inference.environment import select_device
    from probattn.inference.map import MapConfig
    from probattn.inference.verify import VerifyOptions
    from probattn.inference.verify import verify as run

    if dtype not in _DTYPES:
        raise InputError(f"--dtype is {dtype!r}; use {' or '.join(_DTYPES)}.")
    options = VerifyOptions(
        out=out,
        corpus=corpus,
        heldout=heldout,
        fit=MapConfig(steps=steps, batch=batch, seed=seed),
        model={"context": context, "dim": dim, "layers": layers, "weight": weight, "kind": kind, "prior": prior},
        device=select_device(device),
        dtype=_DTYPES[dtype],
        resume=resume,
    )
    with _Progress(steps) as progress:
        claims = run(options, on_fit=progress.fit, on_claim=progress.claim)
    typer.echo(f"report: {out / 'report.html'}")
    broken = [claim.id for claim in claims if claim.broken]
    if broken:
        typer.echo(f"an identity that must hold did not: {', '.join(broken)}", err=True)
        raise typer.Exit(1)


class _Progress:
    """A bar on a terminal, plain lines elsewhere."""

    def __init__(self, steps: int) -> None:
        self.bar: Any = tqdm(total=steps, desc="fit", unit="step") if sys.stderr.isatty() else None

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def fit(self, step: int, metrics: dict[str, float]) -> None:
        shown = {name: f"{metrics[name]:.3f}" for name in ("objective", "cross_entropy", "barrier", "smallest_margin")}
        if self.bar is not None:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)
        else:
            typer.echo(
                f"fit step {step}: " + ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items())
            )

    def claim(self, claim: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        typer.echo(f"claim {claim.id}: {claim.verdict.replace('_', ' ')} ({claim.seconds:.1f} s)")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with 0, 1 or 2 (3: an unexpected failure)."""
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    debug = "--debug" in arguments
    if not debug:
        warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
    try:
        status = app(arguments, standalone_mode=False)
    except _UsageError as error:
        _fail(error.format_message() if hasattr(error, "format_message") else str(error), 2)
    except InputError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except Exception as error:
        if debug:
            raise
        _fail(f"{type(error).__name__}: {error} (a traceback with --debug)", 3)
    if status == _INTERRUPTED:
        _fail("interrupted; run the same command with --resume to go on from the last checkpoint.", _INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    typer.echo(f"probattn: {' '.join(message.split())}", err=True)
    sys.exit(status)
