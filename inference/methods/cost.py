"""Memory and time of a fit, before it begins: too much memory is refused, long work is announced."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from pathlib import Path

import torch

from probattn.errors import InputError
from probattn.inference.methods.log_density import LogDensity

__all__ = ["FEWER", "announce", "free_bytes", "in_words", "require_memory"]

FEWER = "infer fewer (--rank; of a layer --update-rank)"  # the remedy that every method has

_LOG = logging.getLogger(__name__)
_LONG = 60.0  # seconds from which on work is announced
_TIMED = 8  # points at which a gradient is timed: their number has not been checked against the memory yet


def require_memory(target: LogDensity, needed: int, what: str, smaller: str) -> None:
    """Refuse work that needs more memory than is free.

    Args:
        target: log-density, on the device of the work.
        needed: bytes at the peak.
        what: beginning of the message, which names the choice.
        smaller: a choice that needs less.

    Raises:
        InputError: with both amounts and the smaller choice.
    """
    free = free_bytes(target.origin.device)
    if needed > free:
        raise InputError(
            f"{what} needs about {needed / 2**30:,.1f} GiB for {target.dim:,} parameters, and {free / 2**30:,.1f} GiB "
            f"are free; {smaller}."
        )


def announce(target: LogDensity, work: str, evaluations: float, points: int = 1) -> float:
    """Log how long the work may take at most, where that is long, from one timed gradient.

    Args:
        target: log-density.
        work: what is done, such as "20000 steps".
        evaluations: number of gradients, each at all points.
        points: number of points evaluated together.

    Returns:
        Seconds.
    """
    timed = min(points, _TIMED)
    z = target.origin.expand(timed, -1)
    rows = torch.arange(timed, device=z.device) if target.data_sets is not None else None
    target.value_and_gradient(z, rows)  # the first call compiles and allocates
    begin = time.perf_counter()
    value, _ = target.value_and_gradient(z, rows)
    float(value.sum())  # waits for a GPU
    each = (time.perf_counter() - begin) * points / timed
    seconds = each * evaluations
    if seconds > _LONG:
        _LOG.info(
            "%s: up to about %s (%.3g s for a gradient, %s parameters)",
            *(work, in_words(seconds), each, f"{target.dim:,}"),
        )
    return seconds


def in_words(seconds: float) -> str:
    """A duration to one digit or two.

    Args:
        seconds: the duration.

    Example:
        >>> in_words(75), in_words(7300), in_words(300_000)
        ('1 min', '2.0 h', '3.5 days')
    """
    if seconds < 3600:
        return f"{max(1, round(seconds / 60))} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"


def free_bytes(device: torch.device) -> int:
    """Memory that a process can still take: of the GPU, or of the machine and the limit of its container.

    Args:
        device: device of the work.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        found.append(limit - int((group / "memory.current").read_text(encoding="ascii")))
    if not found:
        with contextlib.suppress(OSError, ValueError):
            found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return max(0, min(found, default=2**63))
