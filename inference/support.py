"""Support tokens of a text under a language model: a text and a local checkpoint in, a page out."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from probattn.barrier import MarginKind
from probattn.errors import InputError
from probattn.inference.reports.support import support_page
from probattn.inference.runtime.environment import describe, select_device
from probattn.inference.runtime.files import prepare_folder, write_text
from probattn.models.causal_lm import load_causal_lm
from probattn.models.corpus import read_text
from probattn.models.options import Device, Dtype, Range, Seed, check_options

__all__ = ["SupportOptions", "read_source", "support"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupportOptions:
    """Options of ``probattn support``.

    Attributes:
        source: UTF-8 file; where there is no such file, the text itself.
        model: folder of a local checkpoint; nothing is downloaded.
        kind: margin that is shown first.
        threshold: margin below which tokens are marked and counted.
        tokens: number of support tokens to outline.
        out: output folder.
        seed: random seed.
        device: where to compute; auto takes a GPU where there is one.
        dtype: precision.
    """

    source: str = field(metadata={"positional": True})
    model: Path
    kind: MarginKind = "singular_value"
    threshold: Annotated[float | None, Range()] = None
    tokens: Annotated[int, Range(least=1)] = 10
    out: Path = Path("runs/support")
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        check_options(self)


def support(options: SupportOptions) -> dict[str, Any]:
    """Find the tokens nearest to the boundary and write ``support.html`` and ``support.json``.

    Args:
        options: text, model and what to show.

    Returns:
        The content of ``support.json``.

    Raises:
        InputError: a text or a checkpoint that cannot be used.
    """
    name, text = read_source(options.source)
    device, dtype = select_device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    network, tokeniser = load_causal_lm(options.model)
    prepare_folder(options.out)
    page = support_page(
        text,
        network.to(device, dtype).eval(),
        tokeniser,
        kind=options.kind,
        threshold=options.threshold,
        support=options.tokens,
        name=options.model.resolve().name,
        environment=describe(device, dtype, options.seed),
    )
    write_text(options.out / "support.json", json.dumps(page.record, allow_nan=False, ensure_ascii=False) + "\n")
    write_text(options.out / "support.html", page.html)
    record: dict[str, Any] = dict(page.record)
    count, windows = len(record["tokens"]), len(record["windows"])
    _LOG.info("%s: %d tokens%s", name, count, f" in {windows} windows of the model's context" if windows > 1 else "")
    for token in record["support"]:
        margin = "inf" if token["margin"] is None else f"{token['margin']:.4f}"
        _LOG.info(
            "margin %s at position %d: %r (layer %d, head %d)",
            *(margin, token["position"], token["text"], token["layer"], token["head"]),
        )
    if options.threshold is not None:
        below = len(record["below"])
        _LOG.info("%d of %d tokens have a %s margin below %g", below, count, options.kind, options.threshold)
    return record


def read_source(source: str) -> tuple[str, str]:
    """Name and text of a source.

    Args:
        source: path of a UTF-8 file, or the text itself.

    Returns:
        Name of the file ("text" where there is none), and the text.

    Raises:
        InputError: a folder; a file that is empty, binary or cannot be read; a text that is blank or not UTF-8.
    """
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
