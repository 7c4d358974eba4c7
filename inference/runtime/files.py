"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probattn.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["finite_or_null", "prepare_folder", "write_atomically", "write_figure", "write_json", "write_text"]


def prepare_folder(path: Path) -> Path:
    """Create an output folder and prove that it can be written.

    Args:
        path: folder; its parents are created too.

    Returns:
        The same path.

    Raises:
        InputError: the path is a file, or the folder cannot be made or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}); name a folder that can.") from None
    return path


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let a function fill a file beside ``path`` and move it into place; should it fail, ``path`` is as it was.

    Args:
        path: file to write; its folder exists. Of several writers at once the last to finish wins.
        write: called with the path of the file to fill.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    partial.touch(exist_ok=False)
    try:
        write(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically.

    Args:
        path: file to write; its folder exists.
        text: content.
    """
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON atomically; NaN and infinity, which JSON does not have, become null.

    Args:
        path: file to write; its folder exists.
        content: plain values, see :func:`finite_or_null`.
    """
    text = json.dumps(finite_or_null(content), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(path, f"{text}\n")


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, atomically.

    Args:
        path: file to write; its folder exists.
        figure: matplotlib figure, drawn at 130 dots per inch.
    """
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=130))


def finite_or_null(value: Any) -> Any:
    """Replace numbers that JSON does not have, NaN and infinity, by None.

    Args:
        value: number, text, or mapping, list or tuple of such, nested at will.

    Returns:
        The same with None for every float that is not finite; tuples become lists.

    Example:
        >>> finite_or_null({"k-hat": [0.3, float("inf")], "name": "NUTS"})
        {'k-hat': [0.3, None], 'name': 'NUTS'}
    """
    if isinstance(value, Mapping):
        return {name: finite_or_null(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
