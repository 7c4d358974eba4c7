"""Ctrl-C that waits for the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["deferred_interrupt"]


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into a flag that a loop reads between two steps; a second one interrupts at once.

    Outside the main thread, which alone receives signals, the flag is never set.

    Example:
        >>> with deferred_interrupt() as interrupted:
        ...     interrupted.is_set()
        False
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = signal.getsignal(signal.SIGINT)

    def receive(*_: object) -> None:
        flag.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, receive)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)
