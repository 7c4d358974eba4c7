"""Timing by races: competitors take turns in one process, and the result is a ratio."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Row", "Timing", "race"]


@dataclass(frozen=True)
class Timing:
    """Seconds of one competitor.

    Attributes:
        least: minimum over the calls, which other work on the machine disturbs least.
        median: median over the calls.
        calls: number of calls.
    """

    least: float
    median: float
    calls: int

    def as_dict(self) -> dict[str, float]:
        """Return plain JSON values."""
        return {"min": self.least, "median": self.median, "calls": self.calls}


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        work: name of the measured work.
        against: name of the work it is compared with.
        ratio: ratio of the times; None where nothing was measured, and ``notes`` says why.
        faster: True if the ratio is the other's time by ours, so that more is better; False if it is ours by the
            other's, so that less is better.
        goal: ratio to reach; None where it is only reported.
        seconds: timings of both, by name.
        notes: further plain JSON values, by name.
    """

    work: str
    against: str
    ratio: float | None
    faster: bool
    goal: float | None = None
    seconds: Mapping[str, Timing] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """True if the goal is reached; None without a goal or without a measurement."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal if self.faster else self.ratio <= self.goal

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        goal = None if self.goal is None else f"{'>=' if self.faster else '<='} {self.goal:g}"
        return {
            "work": self.work,
            "against": self.against,
            "ratio": self.ratio,
            "sense": "times faster" if self.faster else "times the cost",
            "goal": goal,
            "met": self.met,
            "seconds": {name: timing.as_dict() for name, timing in self.seconds.items()},
            "notes": dict(self.notes),
        }


def race(
    competitors: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 5,
    warmup: int = 1,
    turn: float = 0.0,
    budget: float = 60.0,
) -> dict[str, Timing]:
    """Time functions in turns, so that a disturbance meets all of them.

    Args:
        competitors: functions without arguments, by name.
        rounds: number of turns of each function.
        warmup: number of calls of each function before the first round.
        turn: seconds for which a function is called again and again in its turn, each call timed. After another's
            work, a function of milliseconds finds neither its memory in the caches nor its threads awake.
        budget: seconds after which no further round begins.

    Returns:
        A :class:`Timing` per function, by name.

    Example:
        >>> sorted(race({"a": lambda: None, "b": lambda: None}, rounds=2))
        ['a', 'b']
    """
    for _ in range(warmup):
        for function in competitors.values():
            function()
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    collecting = gc.isenabled()
    gc.disable()
    begin = time.perf_counter()
    try:
        for _ in range(rounds):
            for name, function in competitors.items():
                _settle()
                turn_begin = start = time.perf_counter()
                while True:
                    function()
                    _settle()
                    end = time.perf_counter()
                    seconds[name].append(end - start)
                    if end - turn_begin >= turn:
                        break
                    start = end
            gc.collect()
            if time.perf_counter() - begin > budget:
                break
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(min(taken), statistics.median(taken), len(taken)) for name, taken in seconds.items()}


def _settle() -> None:
    """Wait for work that a GPU still has in its queue."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
