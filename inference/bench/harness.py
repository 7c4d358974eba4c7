"""Timing that can be believed: competitors take turns in one process, and what is reported is a ratio."""

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
        least: minimum over the calls, the figure that other work on the machine disturbs least.
        median: of the calls.
        calls: how many.
    """

    least: float
    median: float
    calls: int

    def as_dict(self) -> dict[str, float]:
        """Plain JSON values."""
        return {"min": self.least, "median": self.median, "calls": self.calls}


@dataclass(frozen=True)
class Row:
    """One comparison.

    Attributes:
        work: what is measured.
        against: what it is compared with.
        ratio: how many times; ``faster`` says of what. None: not measured, and ``notes`` says why.
        faster: True: ratio is the other's time by ours (more is better); False: ours by the other's (less is better).
        goal: what the ratio should reach; None where it is only reported.
        seconds: of both, by name.
        notes: anything else, plain JSON values.
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
        """Whether the goal is reached; None without a goal or without a measurement."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal if self.faster else self.ratio <= self.goal

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
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
        rounds: how many turns each has.
        warmup: how often each is run before.
        turn: seconds for which a function is called again and again in its turn; right after another's work one of
            milliseconds finds neither its memory in the caches nor its threads awake. Each call is timed.
        budget: seconds after which no further round is begun.

    Returns:
        A :class:`Timing` each.

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
