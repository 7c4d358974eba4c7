"""Progress of a command: plain lines, and on a terminal a bar for work that counts its steps, a clock for the rest."""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from probattn.cli.bar import Bar, clock_line
from probattn.cli.output import ForgivingStream, width_of, wrapped

__all__ = ["Progress", "shown_progress"]

_TICK = 0.5  # seconds between two looks at the clock
_SILENT, _PLAIN_SILENT = 1.0, 30.0  # seconds without a word after which the clock is shown, on a terminal and elsewhere


@contextmanager
def shown_progress() -> Iterator[None]:
    """Show what the package logs while the block runs; processes of ``torchrun`` but the first show warnings alone."""
    logger = logging.getLogger("probattn")
    before = logger.level, logger.propagate
    progress = Progress(sys.stdout)
    first = not int(os.environ.get("RANK", "0"))
    logger.addHandler(progress)
    logger.setLevel(logging.INFO if first else logging.WARNING)
    logger.propagate = False
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, ForgivingStream)]
    for stream in streams:  # a warning interrupts the work, what the command itself prints ends it
        stream.before_write = progress.end_stage if stream is sys.stdout else progress.interrupt
    if first:
        progress.start_clock()
    try:
        yield
    finally:
        progress.close()
        for stream in streams:
            stream.before_write = None
        logger.removeHandler(progress)
        logger.level, logger.propagate = before


class Progress(logging.Handler):
    """Log records as lines, and on a terminal one line below them that tells what is being done.

    That line is a bar for records of :func:`probattn.inference.runtime.progress.log_step`, with rate and time left, and
    a clock for everything else that takes more than a second. It disappears before anything else is written.

    Args:
        stream: stream to write to.
        now: clock in seconds.
    """

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.stream = stream
        self.live = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._now = now
        self._stage: str | None = "starting" if self.live else None
        self._since = self._heard = now()
        self._bar: Bar | None = None
        self._work: tuple[str, int] | None = None
        self._drawn = 0  # columns of the line on the screen
        self._writing = False
        self._stopped = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, or move the bar.

        Args:
            record: what was logged.
        """
        message, metrics = record.getMessage(), getattr(record, "metrics", {})
        total, stage = getattr(record, "total", None), getattr(record, "stage", None)
        if not self.live:
            self._begin(stage or (message if total is None else "working"))
            self._write(f"{_line(message, metrics)}\n")
            return
        if total is None:
            self._bar = self._work = None
            self._begin(stage or _work_in(message))
            if stage is None:
                self._line(_line(message, metrics))
            return
        if self._bar is None or self._work != (record.name, total):
            self._work = (record.name, total)
            self._bar = Bar(message, total)
            self._begin(self._bar.stage)
        self._bar.move(getattr(record, "step", 0), self._now(), _words(metrics))
        self._heard = self._now()
        self._draw(self._bar.line(self._heard, width_of(self.stream), self._letters()))
        if self._bar.is_full:  # what follows without a word of its own has a clock
            self._begin(f"{self._bar.stage} done, going on")
            self._bar = self._work = None

    def tick(self) -> None:
        """Look at the clock: draw the bar anew, or say how long the work has been going on."""
        with self._locked():
            now = self._now()
            if self._stage is None:
                return
            if not self.live:
                if now - self._heard >= _PLAIN_SILENT:
                    self._heard = now
                    self._write(f"{clock_line(self._stage, now - self._since)}\n")
            elif self._bar is not None:
                self._draw(self._bar.line(now, width_of(self.stream), self._letters()))
            elif now - self._heard >= _SILENT:
                self._draw(clock_line(self._stage, now - self._since, width_of(self.stream) - 1))

    def interrupt(self) -> None:
        """Take the line off the screen, because somebody else is about to write."""
        with self._locked():
            if not self._writing:  # by this thread, which holds the lock: its own line
                self._erase()

    def end_stage(self) -> None:
        """Take the line off the screen and say no more until something is logged."""
        with self._locked():
            if not self._writing:
                self._erase()
                self._bar = self._work = self._stage = None

    def start_clock(self) -> None:
        """Look at the clock twice a second until the handler is closed."""
        threading.Thread(target=self._run, name="probattn-clock", daemon=True).start()

    def close(self) -> None:
        """Stop the clock and take the line off the screen."""
        self._stopped.set()
        with self._locked():
            self._erase()
            self._bar = None
        super().close()

    def _run(self) -> None:
        while not self._stopped.wait(_TICK):
            self.tick()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def _begin(self, stage: str) -> None:
        self._stage = stage
        self._since = self._heard = self._now()

    def _letters(self) -> bool:
        # Python writes UTF-8 in the locale C as well, whatever the terminal is.
        plain = os.environ.get("LC_ALL") in ("C", "POSIX")
        return not plain and (getattr(self.stream, "encoding", None) or "").lower().replace("-", "").startswith("utf")

    def _line(self, text: str) -> None:
        self._erase()
        self._write(f"{wrapped(text, width_of(self.stream))}\n")

    def _draw(self, text: str) -> None:
        if not self._stopped.is_set():
            self._write("\r" + text.ljust(self._drawn))
            self._drawn = max(self._drawn, len(text))

    def _erase(self) -> None:
        if self._drawn:
            self._write("\r" + " " * self._drawn + "\r")
            self._drawn = 0

    def _write(self, text: str) -> None:
        self._writing = True  # so that the stream does not take off what is being drawn
        try:
            self.stream.write(text)
            self.stream.flush()
        finally:
            self._writing = False


def _work_in(message: str) -> str:
    """The work that a line announces, as "loading a model" does; "working" for one that tells a result."""
    announced = re.match(r"\w{2,}ing\b [^:;,]*", message)
    return announced[0].strip() if announced else "working"


def _words(metrics: Mapping[str, Any]) -> dict[str, str]:
    return {name.replace("_", " "): f"{value:.4g}" for name, value in metrics.items()}


def _line(message: str, metrics: Mapping[str, Any]) -> str:
    """The message, with the metrics that it does not name."""
    further = [f"{name} {value}" for name, value in _words(metrics).items() if name not in message]
    return ", ".join([message, *further])
