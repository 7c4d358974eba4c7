"""The command line: flags in, one exit status and one line of error out."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import typer
from tqdm import tqdm

import probattn
from probattn.barrier import BarrierKind
from probattn.cli.bench import bench
from probattn.cli.explore import explore
from probattn.cli.support import support
from probattn.cli.train import train
from probattn.embedding_prior import Prior
from probattn.errors import InputError

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


@app.command(short_help="Fit a model, measure every claim, write a report.")
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
    claims: Annotated[str, typer.Option(help="Only these claims, separated by commas.")] = "",
    full: Annotated[
        bool,
        typer.Option("--full", help="The whole ledger; a claim named in --claims runs its long study as well."),
    ] = False,
    jobs: Annotated[int, typer.Option(help="Processes that share the studies.", min=1)] = os.cpu_count() or 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue fit and studies from what is in the folder.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Fit a character model with the attention prior on a text, measure every claim, and write a report.

    Exit status: 0 done, 1 an identity that must hold did not, 2 bad usage or input.
    """
    # Matplotlib, ArviZ and SciPy are needed here and not by `import probattn`.
    from probattn.inference.methods.map import MapConfig
    from probattn.inference.runtime.environment import select_device
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
        claims=_split(claims),
        full=full,
        jobs=jobs,
        resume=resume,
    )
    with _Progress(steps) as progress:
        judged = run(options, report=progress.line, on_fit=progress.fit, on_claim=progress.claim)
    typer.echo(f"report: {out / 'report.html'}")
    broken = [claim.id for claim in judged if claim.broken]
    if broken:
        typer.echo(f"an identity that must hold did not: {', '.join(broken)}", err=True)
        raise typer.Exit(1)


@app.command(short_help="Infer attention parameters behind hidden states.")
def fit(
    data: Annotated[
        Path | None, typer.Option(help="Hidden states (sequences, T, p): .npy, .npz or .safetensors.")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Or a text (as in verify): the attention stage of a language model fitted to it.")
    ] = None,
    array: Annotated[str | None, typer.Option(help="Which array of the file.")] = None,
    sequences: Annotated[int, typer.Option(help="Use so many at most; 0 for all (of a text: 32).")] = 0,
    standardise: Annotated[bool, typer.Option("--standardise", help="Subtract the mean, divide by the RMS.")] = False,
    method: Annotated[str, typer.Option(help="nuts, svi, laplace or map.")] = "nuts",
    heads: Annotated[int, typer.Option(help="H.")] = 1,
    rank: Annotated[int | None, typer.Option(help="r of the factors W_Q, W_K; else A itself is inferred.")] = None,
    value_dim: Annotated[int | None, typer.Option(help="Infer W_V and W_O too, with this size.")] = None,
    mask: Annotated[str, typer.Option(help="strict or inclusive.")] = "strict",
    prior_scale: Annotated[float, typer.Option(help="s: entries of A have deviation s / sqrt(p).")] = 1.0,
    jacobian: Annotated[
        bool, typer.Option("--jacobian/--no-jacobian", help="Without it: the naive fit, to see what it gets wrong.")
    ] = True,
    chains: Annotated[int, typer.Option(help="NUTS: chains.")] = 4,
    chain_method: Annotated[
        str, typer.Option(help="NUTS: vectorised, or Pyro's own as sequential or process.")
    ] = "vectorised",
    warmup: Annotated[int, typer.Option(help="NUTS: transitions of adaptation.")] = 300,
    draws: Annotated[int, typer.Option(help="Draws kept, a chain for NUTS, in all for svi and laplace.")] = 500,
    target_accept: Annotated[float, typer.Option(help="NUTS: acceptance that the step size aims at.")] = 0.8,
    max_depth: Annotated[int, typer.Option(help="NUTS: doublings of a trajectory at most.")] = 10,
    memory: Annotated[float, typer.Option(help="NUTS: GiB that all chains may take.")] = 8.0,
    guide: Annotated[str, typer.Option(help="SVI: mean_field, low_rank, full_rank or flow.")] = "full_rank",
    particles: Annotated[int, typer.Option(help="SVI: draws in a gradient.")] = 8,
    renyi: Annotated[float | None, typer.Option(help="SVI: alpha of the Renyi bound instead of the ELBO.")] = None,
    shards: Annotated[int, typer.Option(help="SVI, MAP: parts of a step that processes share.")] = 2,
    batch: Annotated[int, typer.Option(help="SVI, MAP: sequences in a step; 0 for all (of a text: 32).")] = 0,
    steps: Annotated[int, typer.Option(help="SVI, MAP: steps at most.")] = 5000,
    correct: Annotated[
        bool, typer.Option("--correct/--no-correct", help="SVI, Laplace: resample by importance where k-hat allows.")
    ] = True,
    compare: Annotated[
        str, typer.Option(help="Fit variants too and compare: jacobian, mask, heads, separated by commas.")
    ] = "",
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/fit"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**31 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float64",
    context: Annotated[int, typer.Option(help="Text: characters in a window.")] = 64,
    dim: Annotated[int, typer.Option(help="Text: size of the embeddings.")] = 32,
    stage_rank: Annotated[int, typer.Option(help="Text: rank of the attention stage.")] = 2,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the folder.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Infer the attention parameters behind hidden states or a text; judge the inference; write fit.nc and figures.

    Under torchrun, svi and map share each step among the processes. Exit status: 0 done, 2 bad usage or input.
    """
    from probattn.inference.fit import FitOptions
    from probattn.inference.fit import fit as run
    from probattn.inference.methods.map import MapConfig
    from probattn.inference.methods.nuts import NutsConfig
    from probattn.inference.methods.svi import SviConfig
    from probattn.inference.runtime.distributed import launched_rank
    from probattn.inference.runtime.environment import select_device

    if dtype not in _DTYPES:
        raise InputError(f"--dtype is {dtype!r}; use {' or '.join(_DTYPES)}.")
    quiet = launched_rank() > 0
    options = FitOptions(
        out=out,
        data=data,
        corpus=corpus,
        array=array,
        sequences=sequences,
        standardise=standardise,
        method=method,  # type: ignore[arg-type]  # checked by FitOptions
        heads=heads,
        rank=rank,
        value_dim=value_dim,
        mask=mask,  # type: ignore[arg-type]  # checked by the model
        prior_scale=prior_scale,
        jacobian=jacobian,
        nuts=NutsConfig(
            chains=chains,
            chain_method=chain_method,  # type: ignore[arg-type]  # checked there
            warmup=warmup,
            draws=draws,
            target_accept=target_accept,
            max_depth=max_depth,
            memory=memory,
            seed=seed,
        ),
        svi=SviConfig(
            guide=guide,  # type: ignore[arg-type]  # checked there
            particles=particles,
            renyi=renyi,
            shards=shards,
            batch=batch,
            steps=steps,
            draws=draws,
            seed=seed,
            correct=correct,
        ),
        map=MapConfig(
            steps=steps,
            batch=batch or (32 if corpus else 2**31),
            learning_rate=0.03,
            patience=10,
            tolerance=1e-6,
            shards=shards,
            seed=seed,
        ),
        language={"context": context, "dim": dim, "stage_rank": stage_rank, "stage_heads": heads},
        laplace_draws=draws,
        correct=correct,
        compare=_split(compare),
        seed=seed,
        device=select_device(device),
        dtype=_DTYPES[dtype],
        resume=resume,
    )
    _, diagnosis = run(options, None if quiet else typer.echo)
    if not quiet:
        typer.echo(str(diagnosis))
        typer.echo(f"results: {out / 'fit.nc'}, {out / 'diagnosis.json'}, {out / 'summary.csv'}, {out / 'figures'}")


app.command(short_help="Train a language model with the log-barrier.")(train)
app.command(short_help="Show the tokens of a text nearest to the boundary.")(support)
app.command(short_help="See it in the browser; begin here.")(explore)
app.command(short_help="Measure costs as ratios (ten minutes).")(bench)


def _split(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    return tuple(filter(None, (part.strip() for part in text.split(","))))


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

    def line(self, text: str) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        typer.echo(text)

    def claim(self, claim: Any) -> None:
        self.line(f"claim {claim.id}: {claim.verdict.replace('_', ' ')} ({claim.seconds:.1f} s)")


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
