"""Progress of a command: plain lines, and on a terminal a bar for work that counts its steps."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

__all__ = ["Progress", "shown_progress"]


@contextmanager
def shown_progress() -> Iterator[None]:
    """Show what the package logs while the block runs; processes of ``torchrun`` but the first show warnings alone."""
    logger = logging.getLogger("probattn")
    before = logger.level, logger.propagate
    progress = Progress(sys.stdout)
    logger.addHandler(progress)
    logger.setLevel(logging.WARNING if int(os.environ.get("RANK", "0")) else logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        progress.close()
        logger.removeHandler(progress)
        logger.level, logger.propagate = before


class Progress(logging.Handler):
    """Records as lines, and on a terminal those of :func:`probattn.inference.runtime.progress.log_step` as a bar.

    Args:
        stream: where to write.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self.stream = stream
        self._bar: Any = None
        self._work: tuple[str, int] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or move the bar.

        Args:
            record: what was logged.
        """
        total, metrics = getattr(record, "total", None), getattr(record, "metrics", {})
        if total is None or not self.stream.isatty():
            self._end_bar()
            print(_line(record.getMessage(), metrics), file=self.stream, flush=True)
            return
        work = (record.name, total)
        if self._bar is None or work != self._work:
            self._end_bar()
            self._work = work
            self._bar = tqdm(total=total, desc=record.getMessage().partition(" ")[0], file=self.stream, leave=False)
        self._bar.n = getattr(record, "step", 0)
        self._bar.set_postfix(_words(metrics))

    def close(self) -> None:
        """End the bar."""
        self._end_bar()
        super().close()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _words(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name.replace("_", " "): f"{value:.4g}" for name, value in metrics.items()}


def _line(message: str, metrics: Mapping[str, float]) -> str:
    """The message, with the metrics that it does not name."""
    further = [f"{name} {value}" for name, value in _words(metrics).items() if name not in message]
    return ", ".join([message, *further])
