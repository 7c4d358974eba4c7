"""What a command says while it works: plain lines, and on a terminal a bar for work that counts its steps."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

__all__ = ["shown_progress"]


@contextmanager
def shown_progress(quiet: bool = False) -> Iterator[None]:
    """Show what the package logs.

    On a terminal, a record with the attributes ``done`` and ``total`` moves a bar; every other record is
    a line.

    Args:
        quiet: show nothing below a warning, for all processes but the first.
    """
    logger = logging.getLogger("probattn")
    before = logger.level, logger.propagate
    handler = _Handler()
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        handler.close()
        logger.removeHandler(handler)
        logger.level, logger.propagate = before


class _Handler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.bar: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        done, total = getattr(record, "done", None), getattr(record, "total", None)
        if done is None or total is None or not sys.stdout.isatty():
            self._end_bar()
            print(record.getMessage(), flush=True)
            return
        if self.bar is None or self.bar.total != total or done < self.bar.n:
            self._end_bar()
            self.bar = tqdm(total=total, file=sys.stdout, leave=False)
        self.bar.set_description_str(record.getMessage(), refresh=False)
        self.bar.update(done - self.bar.n)

    def _end_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        self._end_bar()
        super().close()
