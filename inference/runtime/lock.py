"""One run per output folder: a lock that names the process that holds it and ends with that process."""

from __future__ import annotations

import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from probattn.errors import InputError
from probattn.inference.runtime.distributed import launched_rank
from probattn.inference.runtime.files import prepare_folder, remove_partial_files

try:
    import fcntl
except ImportError:  # no POSIX system: folders are not locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["hold_folder", "sole_run"]

_NAME = ".lock"
Result = TypeVar("Result")


def sole_run(run: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Let a function of options hold their output folder, ``options.out``, while it runs.

    Under ``torchrun`` the first process holds it for all.

    Args:
        run: function to decorate.
    """

    @wraps(run)
    def holding(options: Any) -> Result:
        with nullcontext() if launched_rank() else hold_folder(options.out):
            return run(options)

    return holding


@contextmanager
def hold_folder(path: Path) -> Iterator[Path]:
    """Create an output folder and keep other runs out of it while the block runs.

    What killed runs left half written is removed first. The lock is the kernel's (``flock``): it ends with the process,
    however that ends. A folder that was made here and is still empty afterwards is removed again.

    Args:
        path: output folder.

    Returns:
        Context manager whose value is the folder.

    Raises:
        InputError: another run holds the folder, with its process, command and time; or it cannot be written.

    Example:
        >>> import tempfile
        >>> with hold_folder(Path(tempfile.mkdtemp()) / "fit") as folder:
        ...     (folder / ".lock").exists()
        True
    """
    made = not path.exists()
    prepare_folder(path)
    descriptor = _acquire(path)
    try:
        remove_partial_files(path)
        yield path
    finally:
        if descriptor is not None:
            # Removed before it is let go: whoever opened it meanwhile sees that the name is no longer this file's.
            (path / _NAME).unlink(missing_ok=True)
            os.close(descriptor)
        if made and path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _acquire(path: Path) -> int | None:
    if fcntl is None:
        return None
    file = path / _NAME
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode("utf-8", "replace").strip() or "another process"
            os.close(descriptor)
            raise InputError(
                f"--out {path}: in use by {holder}; wait until that run ends, or name another folder."
            ) from None
        except OSError:  # a file system without locks
            os.close(descriptor)
            return None
        if _is_named(descriptor, file):
            break
        os.close(descriptor)  # its holder removed it while this process waited to open it
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300]
    words = f"process {os.getpid()} on {socket.gethostname()} ({command}, since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC)"
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, words.encode("utf-8", "replace"), 0)
    except OSError:
        pass  # a full disk: the lock holds all the same, without a name
    return descriptor


def _is_named(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
