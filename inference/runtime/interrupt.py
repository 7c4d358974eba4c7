"""Ctrl-C, SIGTERM and SIGHUP that wait for the end of a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["SIGNALS", "deferred_interrupt", "signals_interrupt"]

#: Signals that end a run as Ctrl-C does, with what is done saved.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Turn the first of :data:`SIGNALS` into a flag that a loop reads between two steps; a second interrupts at once.

    Outside the main thread, which alone receives signals, the flag is never set. A signal that is ignored, as SIGHUP is
    under ``nohup``, stays ignored.

    Example:
        >>> with deferred_interrupt() as interrupted:
        ...     interrupted.is_set()
        False
    """
    flag = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    # A handler that is none of Python's (None) could not be put back.
    watched = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]

    def give_back() -> None:
        for number in watched:
            signal.signal(number, previous[number])

    def receive(*_: object) -> None:
        flag.set()
        give_back()

    for number in watched:
        signal.signal(number, receive)
    try:
        yield flag
    finally:
        give_back()


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` at SIGTERM and SIGHUP while the block runs, as Python does at Ctrl-C.

    A handler that somebody installed, and a signal that is ignored, stay as they are.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    taken = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
