"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probattn.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "finite_or_null",
    "named_errors",
    "prepare_folder",
    "remove_partial_files",
    "replace_folder",
    "write_atomically",
    "write_bytes",
    "write_figure",
    "write_json",
    "write_text",
]

_PARTIAL = re.compile(r"\..+\.[0-9a-f]{32}\.partial")


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


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes that exist already whole, atomically; after a crash of the machine there is the old file or the new.

    Args:
        path: file to write; its folder exists.
        data: content.

    Raises:
        InputError: the disk is full, a limit of the process or a quota is reached, or the folder cannot be written;
            ``path`` is as it was.
    """
    with named_errors(path, size=len(data)), _partial(path) as partial:
        partial.write_bytes(data)


def replace_folder(path: Path, write: Callable[[Path], Any], *others: type[Exception]) -> None:
    """Let a function fill a folder beside ``path`` and move it into place; should it fail, ``path`` is as it was.

    Args:
        path: folder to write; its parent exists.
        write: called with the path of a new folder to fill.
        *others: errors of its library that mean that a file could not be written, see :func:`named_errors`.

    Raises:
        InputError: as :func:`write_bytes`.
    """
    partial, old = (path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial") for _ in range(2))
    with named_errors(path, *others):
        try:
            partial.mkdir()
            write(partial)
            if path.exists():
                path.rename(old)
            partial.rename(path)
        finally:
            for folder in (partial, old):
                shutil.rmtree(folder, ignore_errors=True)


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Let a function fill a file beside ``path`` and move it into place; should it fail, ``path`` is as it was.

    Args:
        path: file to write; its folder exists. Of several writers at once the last to finish wins.
        write: called with the path of the file to fill.

    Raises:
        InputError: as :func:`write_bytes`, to be preferred where the bytes fit in memory.
    """
    with named_errors(path), _partial(path) as partial:
        write(partial)


def remove_partial_files(folder: Path) -> list[str]:
    """Remove the files that killed writers left half written, in a folder and those in it.

    Only for a folder that no other process writes to, see :func:`probattn.inference.runtime.lock.hold_folder`.

    Args:
        folder: output folder.

    Returns:
        Names of the files removed.
    """
    found = [path for path in folder.rglob(".*.partial") if _PARTIAL.fullmatch(path.name)]
    for path in found:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return sorted(path.name for path in found)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically.

    Args:
        path: file to write; its folder exists.
        text: content.
    """
    write_bytes(path, text.encode("utf-8"))


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
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=130)
    write_bytes(path, drawn.getvalue())


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


@contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to fill, moved into place at the end."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.touch(exist_ok=False)
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename last; where folders cannot be opened (no POSIX system), there is nothing to do."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def named_errors(path: Path, *others: type[Exception], size: int | None = None) -> Iterator[None]:
    """Turn errors of writing into one line: which file, why, what to do.

    Args:
        path: file or folder that is written.
        *others: errors of a library that writes by itself, which often do not say that the disk is full; the number of
            the system's error in their words, the limits of the process and the free space are asked.
        size: number of bytes to write, where it is known.

    Returns:
        Context manager.

    Raises:
        InputError: an OSError, or one of ``others``, was raised inside.

    Example:
        >>> with named_errors(Path("runs/fit.nc")):
        ...     raise OSError(errno.ENOSPC, "No space left on device")
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: runs/fit.nc: cannot be written: the disk is full (...
    """
    caught: tuple[type[Exception], ...] = (OSError, *others)
    try:
        yield
    except InputError:
        raise
    except caught as error:
        needed = "" if size is None else f"{size / 2**20:.1f} MiB to write, "
        number = error.errno if isinstance(error, OSError) else _number_behind(error, path.parent)
        if number == errno.ENOSPC:
            with suppress(OSError):
                needed += f"{shutil.disk_usage(path.parent).free / 2**20:.1f} MiB free, "
            reason, remedy = f"the disk is full ({needed}{path.parent})", "free space there, or name another --out"
        elif number == errno.EFBIG:
            reason, remedy = f"it is larger than this process may write ({needed}ulimit -f)", "raise the limit"
        elif number == errno.EDQUOT:
            reason, remedy = f"the quota of the disk is used up ({needed}{path.parent})", "free space, or ask for more"
        else:
            words = getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__
            reason, remedy = words, "name a folder that can be written"
        raise InputError(
            f"{path}: cannot be written: {reason}; {remedy}. What was there before is as it was."
        ) from None


def _number_behind(error: Exception, folder: Path) -> int | None:
    """The system's number behind the error of a library, as far as it can be found out; None otherwise."""
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return int(found[1])
    with suppress(ImportError):
        import resource  # not on every system

        if resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
            return errno.EFBIG
    with suppress(OSError):
        if shutil.disk_usage(folder).free < 2**24:
            return errno.ENOSPC
    return None
