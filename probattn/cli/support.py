"""``probattn support``: a text and a local checkpoint in, a page of the tokens nearest to the boundary out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer

from probattn.barrier import MarginKind
from probattn.errors import InputError, require_choice

__all__ = ["read_source", "support"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def support(
    source: Annotated[str, typer.Argument(help="A UTF-8 file; where there is no such file, the text itself.")],
    model: Annotated[Path, typer.Option(help="Folder of a local checkpoint; nothing is downloaded.")],
    kind: Annotated[
        str, typer.Option(help=f"The margin shown first: {', '.join(get_args(MarginKind))}.")
    ] = "singular_value",
    threshold: Annotated[float | None, typer.Option(help="Mark and count the tokens with a smaller margin.")] = None,
    tokens: Annotated[int, typer.Option(help="How many support tokens to outline.", min=1)] = 10,
    out: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/support"),
    seed: Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**31 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or float64.")] = "float32",
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Show which tokens of a text a model holds nearest to the boundary: support.html, and support.json beside it.

    Exit status: 0 done, 2 bad usage or input.
    """
    from probattn.inference.reports.support import support_page
    from probattn.inference.runtime.environment import describe, select_device
    from probattn.inference.runtime.files import prepare_folder, write_text
    from probattn.models.causal_lm import load_causal_lm

    if dtype not in _DTYPES:
        raise InputError(f"--dtype is {dtype!r}; use {' or '.join(_DTYPES)}.")
    require_choice("--kind", kind, get_args(MarginKind))
    name, text = read_source(source)
    place = select_device(device)
    torch.manual_seed(seed)
    network, tokeniser = load_causal_lm(model)
    prepare_folder(out)
    environment = describe(place, _DTYPES[dtype], seed)
    page = support_page(
        text,
        network.to(place, _DTYPES[dtype]).eval(),
        tokeniser,
        kind=kind,  # type: ignore[arg-type]  # checked above
        threshold=threshold,
        support=tokens,
        name=model.resolve().name,
        environment=environment,
    )
    write_text(out / "support.json", json.dumps(page.record, allow_nan=False, ensure_ascii=False) + "\n")
    write_text(out / "support.html", page.html)
    count, windows = len(page.record["tokens"]), len(page.record["windows"])
    typer.echo(f"{name}: {count} tokens" + (f" in {windows} windows of the model's context" if windows > 1 else ""))
    for token in page.record["support"]:
        margin = "inf" if token["margin"] is None else f"{token['margin']:.4f}"
        typer.echo(
            f"margin {margin} at position {token['position']}: {token['text']!r} (layer {token['layer']}, head "
            f"{token['head']})"
        )
    if threshold is not None:
        typer.echo(f"{len(page.record['below'])} of {count} tokens have a {kind} margin below {threshold:g}")
    typer.echo(f"page: {out / 'support.html'}, numbers: {out / 'support.json'}")


def read_source(source: str) -> tuple[str, str]:
    """Name and text of what the user named.

    Args:
        source: a path to a UTF-8 file, or the text itself.

    Returns:
        the file's name ("text" where there is none), and the text.

    Raises:
        InputError: a folder; a file that is empty, binary or cannot be read; a text that is blank or not UTF-8.
    """
    from probattn.models.corpus import read_text

    try:
        path = Path(source)
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError):  # too long for a name, or with a NUL: a text
        is_file = is_folder = False
    if is_file:
        return read_text(str(path.absolute()))
    if source and is_folder:
        raise InputError(f"source {source}: a folder; name a UTF-8 file in it, or give a text.")
    if not source.strip():
        raise InputError("source: the text is empty; give a text, or the path of a UTF-8 file.")
    if "\0" in source:
        raise InputError(f"source: a binary text (NUL at character {source.index(chr(0))}); give plain text.")
    try:
        source.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"source: not UTF-8 (character {error.start}); convert it with iconv -t UTF-8.") from None
    return "text", source
