"""Output that never decides a command: a closed pipe, a full disk or a poor encoding only cut its words."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

__all__ = ["ForgivingStream", "forgiving_output", "say", "width_of", "wrapped"]

_FILLER = "\ufdd0"  # a code that is no character


class ForgivingStream:
    """A text stream whose reader may go away: what is written from then on is dropped.

    Characters that its encoding lacks are written as escapes.

    Args:
        stream: stream to write to.

    Attributes:
        before_write: called before anything is written, to clear what stands on the last line of a terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.before_write: Callable[[], None] | None = None
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write a text, or drop it.

        Args:
            text: what to write.
        """
        if self.before_write is not None:
            self.before_write()
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a stream that cannot be told to escape
            encoding = self._stream.encoding or "ascii"
            return self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:  # `| head`, a terminal that is gone, a full disk
            self._drop()
            return len(text)

    def flush(self) -> None:
        """Flush what is still listened to."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _drop(self) -> None:
        """Let the stream write to nowhere, so that neither this nor the end of Python fails again."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            try:
                os.dup2(nowhere, self._stream.fileno())
            finally:
                os.close(nowhere)


@contextmanager
def forgiving_output() -> Iterator[None]:
    """Replace the standard streams by forgiving ones while the block runs; one that is closed, by one to nowhere."""
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as opened:
        for name, stream in zip(("stdout", "stderr"), before, strict=True):
            # Python has None where the descriptor was closed, as by `>&-`.
            there = stream or opened.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            setattr(sys, name, ForgivingStream(there))
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = before


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a text; on a terminal its lines are broken between words, elsewhere they stay as they are.

    Args:
        text: what to say.
        stream: where; None for the standard output.
    """
    stream = stream or sys.stdout
    print(wrapped(text, width_of(stream)) if stream.isatty() else text, file=stream, flush=True)


def wrapped(text: str, width: int) -> str:
    """Break long lines between words; a word that is longer than a line is left whole.

    Args:
        text: lines of text.
        width: columns of the terminal.

    Returns:
        The same words; what continues a line is indented.

    Example:
        >>> print(wrapped("claim barrier: holds if nothing folds", 24))
        claim barrier: holds if
          nothing folds
    """
    # Each wide character counts twice.
    doubled = "".join(c + _FILLER if unicodedata.east_asian_width(c) in ("W", "F") else c for c in text)
    lines = [
        textwrap.wrap(
            line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False, drop_whitespace=True
        )
        or [""]
        for line in doubled.split("\n")
    ]
    return "\n".join(part for line in lines for part in line).replace(_FILLER, "")


def width_of(stream: TextIO) -> int:
    """Columns of the terminal behind a stream; ``COLUMNS`` overrules it, and 80 stands where nothing is known.

    Args:
        stream: stream that leads to a terminal.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if "COLUMNS" not in os.environ:
            return os.get_terminal_size(stream.fileno()).columns or 80
    return shutil.get_terminal_size((80, 24)).columns
