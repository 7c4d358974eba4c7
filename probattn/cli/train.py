"""``probattn train``: flags and a YAML file, flags first."""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from probattn.barrier import BarrierKind
from probattn.errors import InputError

__all__ = ["read_settings", "train"]


def train(
    context_: typer.Context,
    corpus: Annotated[
        str, typer.Option(help="python-docs, a path to a UTF-8 text, or hf:NAME[:CONFIG].")
    ] = "python-docs",
    heldout: Annotated[str | None, typer.Option(help="A second text for evaluation; else the last tenth.")] = None,
    model: Annotated[Path | None, typer.Option(help="Go on from this local checkpoint; else from scratch.")] = None,
    architecture: Annotated[str, typer.Option(help="From scratch: gpt2, llama, mistral, gemma2, qwen3.")] = "gpt2",
    layers: Annotated[int, typer.Option(help="From scratch: layers.")] = 2,
    dim: Annotated[int, typer.Option(help="From scratch: size of the hidden states.")] = 64,
    heads: Annotated[int, typer.Option(help="From scratch: attention heads.")] = 4,
    context: Annotated[int, typer.Option(help="Tokens in a window.")] = 64,
    dropout: Annotated[float, typer.Option(help="From scratch: dropout.", min=0.0, max=0.99)] = 0.0,
    weight: Annotated[float, typer.Option(help="lambda, the weight of the barrier; 0 trains without.")] = 0.05,
    kind: Annotated[str, typer.Option(help=f"Penalty: {', '.join(get_args(BarrierKind))}.")] = "one_sided",
    positions: Annotated[float, typer.Option(help="Share of the positions that is evaluated, at random.")] = 1.0,
    placement: Annotated[
        str, typer.Option(help="heads (of every layer) or embeddings (a stage of their own).")
    ] = "heads",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Windows in a step, over all processes.")] = 32,
    accumulate: Annotated[int, typer.Option(help="Parts that a process makes of its share of a batch.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW, after the warm-up; then a cosine to zero.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.", min=0.0)] = 0.0,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.")] = 50,
    precision: Annotated[
        str, typer.Option("--precision", "--dtype", help="float32, float64, or mixed: bf16, fp16.")
    ] = "float32",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute activations in the backward pass.")
    ] = False,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the model.")] = False,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 leaves none.")] = 200,
    evaluate_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end.")] = 200,
    log_every: Annotated[int, typer.Option(help="Steps between lines.")] = 20,
    keep: Annotated[int, typer.Option(help="Checkpoints that are kept.")] = 2,
    evaluate_windows: Annotated[int, typer.Option(help="Held-out windows in an evaluation; 0: all.")] = 256,
    report_to: Annotated[str, typer.Option(help="Trackers of transformers, separated by commas.")] = "",
    config: Annotated[
        Path | None, typer.Option(help="YAML file of these options (with _ or -); flags come first.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/train"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**31 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last whole checkpoint in the folder.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Train a causal language model with the log-barrier on every layer and head, or on its embeddings.

    Under torchrun or accelerate launch the processes share each batch. Exit status: 0 done, 2 bad usage or input, 130
    interrupted (--resume goes on).
    """
    from probattn.inference.runtime.distributed import launched_rank
    from probattn.inference.training.run import TrainOptions
    from probattn.inference.training.run import train as run

    given = dict(context_.params)
    for name in ("config", "debug"):
        given.pop(name)
    if config is not None:
        kinds = {field.name: type(field.default) for field in fields(TrainOptions)}
        chosen = {name for name in given if str(context_.get_parameter_source(name)).endswith("COMMANDLINE")}
        given |= {name: value for name, value in read_settings(config, kinds).items() if name not in chosen}
    for name in ("out", "model"):
        given[name] = Path(given[name]) if given[name] is not None else None
    result = run(TrainOptions(**given), typer.echo)
    if launched_rank() == 0:
        typer.echo(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in result.items()))
        typer.echo(
            f"results: {given['out'] / 'model'}, {given['out'] / 'metrics.jsonl'}, {given['out'] / 'config.json'}"
        )


def read_settings(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """Options from a YAML file.

    Args:
        path: the file, a mapping from names to values.
        kinds: the options that exist, with the type of their default; that of None stands for any.

    Raises:
        InputError: no such file, no YAML, no mapping, an option that does not exist (with the nearest that does), or a
            value of another kind.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: holds {type(content).__name__}; write a mapping, one option: value a line.")
    settings = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1, cutoff=0.0)[0]
            raise InputError(f"--config {path}: option {key!r} does not exist; the nearest is {near!r}.")
        settings[name] = _as_kind(path, name, value, kinds[name])
    return settings


def _as_kind(path: Path, name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-3 as text
        except ValueError:
            pass
    if kind is type(None) or kind is type(value) or (isinstance(value, str) and issubclass(kind, Path)):
        return value
    raise InputError(f"--config {path}: {name} is {value!r}; it must be of the kind {kind.__name__}.")
