"""Files given by a user, read whole: regular files only, up to a stated size."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from probattn.errors import InputError

__all__ = ["read_regular"]

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def read_regular(path: Path, name: str, *, most: int) -> bytes:
    """Read a regular file; devices and pipes, which may never end or never begin, are refused unread.

    Args:
        path: file to read.
        name: beginning of the messages, such as ``"corpus text.txt"``.
        most: largest size in bytes.

    Returns:
        The bytes of the file.

    Raises:
        FileNotFoundError: no such file.
        InputError: not a regular file, too large, or unreadable.

    Example:
        >>> read_regular(Path("/dev/null"), "corpus /dev/null", most=100)
        Traceback (most recent call last):
        ...
        probattn.errors.InputError: corpus /dev/null: cannot be read (a device, not a regular file); give a file.
    """
    if "\0" in str(path):
        raise InputError(f"{name!r}: a name with a NUL character; no file can have it.")
    # Without O_NONBLOCK, to open a pipe that nobody writes to would wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(file.fileno())
            kind = stat.S_IFMT(found.st_mode)
            if kind != stat.S_IFREG:
                raise InputError(
                    f"{name}: cannot be read ({_KINDS.get(kind, 'something else')}, not a regular file); give a file."
                )
            data = file.read(found.st_size + 1) if found.st_size <= most else b""
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise InputError(f"{name}: cannot be read (a folder, not a regular file); give a file.") from None
    except (OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or "more than the memory holds"
        raise InputError(f"{name}: cannot be read ({reason}); give a readable file.") from None
    if found.st_size > most:
        raise InputError(f"{name}: {found.st_size:,} bytes; at most {most:,} are read: give a part of it.")
    return data
