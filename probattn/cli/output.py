"""Output that never decides a command: a closed pipe, a full disk or a poor encoding only cut its words."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

__all__ = ["ForgivingStream", "forgiving_output"]


class ForgivingStream:
    """A text stream whose reader may go away: what is written from then on is dropped.

    Characters that its encoding lacks are written as escapes.

    Args:
        stream: stream to write to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write a text, or drop it.

        Args:
            text: what to write.
        """
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
