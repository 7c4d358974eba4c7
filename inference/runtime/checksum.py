"""Checksums of files: a digest after the last byte, compared whenever the file is read.

Readers of ZIP archives and of HDF5 find their way from a directory and a header, and pass over what follows.
"""

from __future__ import annotations

import hashlib

from probattn.errors import InputError

__all__ = ["DamagedFileError", "seal", "unseal"]

_MARK = b"probattn sha256:"
_SIZE = len(_MARK) + hashlib.sha256().digest_size


class DamagedFileError(InputError):
    """A file whose bytes are not those that were written."""


def seal(data: bytes) -> bytes:
    """Append a SHA-256 digest.

    Args:
        data: content of a file.

    Returns:
        The content and 48 bytes more.

    Example:
        >>> unseal(seal(b"draws"), "fit.nc", "fit again")
        b'draws'
    """
    return b"".join((data, _MARK, hashlib.sha256(data).digest()))


def unseal(data: bytes, name: str, remedy: str) -> bytes:
    """Verify and remove the digest that :func:`seal` appended.

    Args:
        data: what was read.
        name: beginning of the message.
        remedy: end of the message.

    Returns:
        The content.

    Raises:
        DamagedFileError: the digest is missing or differs: a byte was changed, lost or added.

    Example:
        >>> unseal(b"x" + seal(b"draws")[1:], "fit.nc", "fit again")
        Traceback (most recent call last):
        ...
        probattn.inference.runtime.checksum.DamagedFileError: fit.nc: cannot be read (damaged: the bytes differ from ...
    """
    content, mark, digest = data[:-_SIZE], data[-_SIZE : -_SIZE + len(_MARK)], data[-_SIZE + len(_MARK) :]
    if len(data) < _SIZE or mark != _MARK:
        reason = "no checksum at its end: cut short, or of another program or version"
    elif hashlib.sha256(content).digest() != digest:
        reason = "damaged: the bytes differ from the checksum"
    else:
        return content
    raise DamagedFileError(f"{name}: cannot be read ({reason}); {remedy}.")
