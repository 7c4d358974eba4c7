"""Progress of long work through Python's ``logging``.

Fits and studies log to loggers named after their modules, below ``probattn.inference``, at level INFO: one line for
people as the message, and what drives a bar as attributes of the record, ``step`` and ``total``, and ``metrics``, a
mapping of numbers by name. Work that has no steps to count names itself when it begins, with the attribute ``stage``.
Nothing is printed unless a handler is attached.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

__all__ = ["log_stage", "log_step"]


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


def log_stage(logger: logging.Logger, message: str) -> None:
    """Log at level INFO that work begins which has no steps to count.

    Args:
        logger: logger of the module that does the work.
        message: name of the work, for people.
    """
    logger.info("%s", message, extra={"stage": message}, stacklevel=2)
