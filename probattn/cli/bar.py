"""One line of a terminal that tells how far some work is: name, bar, rate and time left, whatever the width."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["Bar", "clock_line", "in_time", "stage_in_words"]

_STAGES = {
    "map": "fitting by MAP",
    "svi": "fitting by SVI",
    "laplace": "finding the mode",
    "nuts": "sampling by NUTS",
    "measured": "measuring margins",
}
_NARROWEST = 6  # columns of a bar; with less room there is none


class Bar:
    """Progress of work that counts its steps.

    Args:
        message: first message of the work; its beginning names the stage.
        total: number of steps at most.

    Example:
        >>> bar = Bar("map step 10: objective 1.5", 100)
        >>> bar.move(10, 0.0, {"objective": "1.5"})
        >>> bar.move(20, 5.0, {"objective": "1.2"})
        >>> bar.line(5.0, 64, letters=False)
        'fitting by MAP ##-------- 20/100, 2/s, 40 s left, objective 1.2'
    """

    def __init__(self, message: str, total: int) -> None:
        self.stage, self.total = stage_in_words(message), total
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] = (0, 0.0)
        self._metrics: Mapping[str, str] = {}

    def move(self, step: int, now: float, metrics: Mapping[str, str]) -> None:
        """Take note of a step.

        Args:
            step: number of steps done.
            now: time in seconds.
            metrics: numbers in words by name.
        """
        self._first = self._first or (step, now)
        self._last, self._metrics = (step, now), metrics

    @property
    def is_full(self) -> bool:
        """True once all steps are done."""
        return self._last[0] >= self.total

    def line(self, now: float, width: int, letters: bool = True) -> str:
        """Write the line, at most ``width - 1`` columns of it.

        Args:
            now: time in seconds.
            width: columns of the terminal.
            letters: whether the terminal shows characters beyond ASCII.
        """
        step, at = self._last
        count, rate = f"{step}/{self.total}", self._rate()
        # Before there is a rate, the time since the last step shows that something goes on.
        speed, left = f"for {in_time(now - at)}" if now - at >= 1 else "", ""
        if rate:
            speed = f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
            left = f"{in_time(max(0.0, (self.total - step) / rate - (now - at)))} left"
        metrics = [f"{name} {value}" for name, value in self._metrics.items()]
        room = width - 1
        # What does not fit is left out from the end, and the name is cut last of all.
        space = room - len(self.stage) - 1 - _NARROWEST - 1
        if left and len(f"{count}, {speed}, {left}") > space:
            speed = ""  # the time left says more
        told = _fitting([count, *filter(None, (speed, left)), *metrics], space)
        if not told:
            return f"{self.stage} {count}"[:room]
        size = min(10, room - len(self.stage) - len(told) - 2)
        done = min(size, size * step // max(1, self.total))
        full, empty = ("\u2588", "\u2591") if letters else ("#", "-")
        return f"{self.stage} {full * done}{empty * (size - done)} {told}"

    def _rate(self) -> float:
        """Steps per second since the first record; 0 where nothing can be said."""
        if self._first is None:
            return 0.0
        steps, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return steps / seconds if steps > 0 and seconds > 0 else 0.0


def stage_in_words(message: str) -> str:
    """Return the name of the work that a message belongs to.

    Args:
        message: message of a step.

    Returns:
        The words before the first number or colon, for people.

    Example:
        >>> stage_in_words("nuts transition 5 of 100"), stage_in_words("calibration of SVI: 3 of 10")
        ('sampling by NUTS', 'calibration of SVI')
    """
    name = re.split(r"[:\d]", message, maxsplit=1)[0].strip()
    name = re.sub(r" (step|transition|up to layer)$", "", name)
    return _STAGES.get(name, name) or "working"


def clock_line(stage: str, seconds: float, room: int | None = None) -> str:
    """Say how long something has been going on.

    Args:
        stage: what is being done.
        seconds: time that it has taken.
        room: columns at most; the words are cut, the time is not.

    Returns:
        One line.

    Example:
        >>> clock_line("claim barrier", 72.4), clock_line("reading a long text", 3, 14)
        ('claim barrier (1 min 12 s)', 'reading (3 s)')
    """
    time = f"({in_time(seconds)})"
    if room is not None and len(stage) + 1 + len(time) > room:
        stage = stage[: max(0, room - len(time) - 1)].rpartition(" ")[0] or stage[: max(0, room - len(time) - 1)]
    return f"{stage} {time}"


def in_time(seconds: float) -> str:
    """Write a duration.

    Args:
        seconds: the duration.

    Returns:
        At most two units.

    Example:
        >>> in_time(7.6), in_time(72), in_time(3725)
        ('8 s', '1 min 12 s', '1 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _fitting(parts: list[str], room: int) -> str:
    """The first parts that fit, separated by commas; empty where not even the first does."""
    told = ""
    for part in parts:
        longer = f"{told}, {part}" if told else part
        if len(longer) > room:
            break
        told = longer
    return told
