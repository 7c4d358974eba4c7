"""Progress of long work through Python's ``logging``.

Fits and studies log to loggers named after their modules, below ``probattn.inference``, at level INFO: one line for
people as the message, and what drives a bar as attributes of the record, ``step`` and ``total``, and ``metrics``, a
mapping of numbers by name. Nothing is printed unless a handler is attached.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

__all__ = ["LOGGER", "listening", "log_step"]

LOGGER = "probattn.inference"


def log_step(
    logger: logging.Logger, message: str, step: int, total: int, metrics: Mapping[str, float] | None = None
) -> None:
    """Log one step of long work at level INFO.

    Args:
        logger: logger of the module that does the work.
        message: line for people.
        step: number of steps done.
        total: number of steps at most.
        metrics: numbers by name.
    """
    logger.info("%s", message, extra={"step": step, "total": total, "metrics": dict(metrics or {})}, stacklevel=2)


@contextmanager
def listening(receive: Callable[[logging.LogRecord], None], name: str = LOGGER) -> Iterator[None]:
    """Hand every record at level INFO or above to a function while the block runs.

    An exception that the function raises ends the work that logged.

    Args:
        receive: function called with each record.
        name: logger whose records, and those of the loggers below it, are meant.

    Example:
        >>> lines = []
        >>> with listening(lambda record: lines.append(record.getMessage())):
        ...     log_step(logging.getLogger("probattn.inference.methods.map"), "map step 5", 5, 10)
        >>> lines
        ['map step 5']
    """
    logger = logging.getLogger(name)
    handler = _Receiver(receive)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level, logging.INFO) if level else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _Receiver(logging.Handler):
    def __init__(self, receive: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.INFO)
        self._receive = receive

    def emit(self, record: logging.LogRecord) -> None:
        self._receive(record)
