"""Peak memory of a computation as its length doubles."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from probattn.inference.bench.harness import Row

__all__ = ["growth_of_memory", "peak_of"]

_LINEAR = 2.4  # goal: growth of the memory when T doubles; 2, and room for what does not grow evenly


def growth_of_memory(peak: Callable[[int], int], lengths: Sequence[int], work: str, size: str) -> Row:
    """Compare the peak memory at lengths T, each measured in a process of its own.

    Args:
        peak: bytes at the peak by length, a function of a module, so that another process can import it.
        lengths: lengths T, each twice the one before.
        work: name of the work.
        size: further sizes, behind T.

    Returns:
        A row with the largest growth from one length to the next: 2 if memory is linear.
    """
    peaks = {length: _in_own_process(peak, length) for length in lengths}
    return Row(
        f"peak memory of {work}, T = {lengths[-1]}, {size}",
        f"the same at T = {lengths[-2]}",
        max(peaks[long] / peaks[short] for short, long in pairwise(lengths)),
        faster=False,
        goal=_LINEAR,
        notes={f"MiB at T = {length}": round(peaked / 2**20, 1) for length, peaked in peaks.items()},
    )


def peak_of(work: Callable[[], object]) -> int:
    """Measure the bytes that a call takes at its peak, beyond those that the process held before (Linux only).

    Args:
        work: the call, after a smaller one that has loaded the libraries.

    Returns:
        Bytes.
    """
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    work()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _in_own_process(peak: Callable[[int], int], length: int) -> int:
    # So that nothing freed before is used again.
    code = f"from {peak.__module__} import {peak.__name__} as peak; print(peak({length}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout)
