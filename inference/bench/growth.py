"""Growth of the cost of the exact penalty with the length, the size of a head and the number of heads."""

from __future__ import annotations

from typing import Any

import torch

from probattn.inference.bench.harness import race
from probattn.inference.bench.penalty import dense_penalty, kernel_penalty

__all__ = ["growth"]

_POINTS = {
    "length T": [(4, length, 16) for length in (64, 128, 256, 512, 1024)],
    "size of a head d": [(4, 256, dim) for dim in (4, 8, 16, 32, 64)],
    "heads": [(heads, 256, 16) for heads in (1, 2, 4, 8, 16)],
}
_VARIED = {"length T": 1, "size of a head d": 2, "heads": 0}
_ROUNDS = 3


def growth(device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Measure the seconds, forward and backward, as each of three sizes grows.

    Args:
        device: device to measure on.

    Returns:
        By name of the size, a mapping with ``at`` for its values and the seconds of ``exact`` and ``dense`` there.
    """
    curves: dict[str, dict[str, list[float]]] = {}
    for axis, shapes in _POINTS.items():
        curve: dict[str, list[float]] = {"at": [], "exact": [], "dense": []}
        for shape in shapes:
            parts = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]

            def exact(own: Any = parts) -> None:
                torch.autograd.grad(kernel_penalty(*own).sum(), own)

            def dense(own: Any = parts) -> None:
                torch.autograd.grad(dense_penalty(*own).sum(), own)

            seconds = race({"exact": exact, "dense": dense}, rounds=_ROUNDS, turn=0.02)
            curve["at"].append(float(shape[_VARIED[axis]]))
            for name in ("exact", "dense"):
                curve[name].append(seconds[name].least)
        curves[axis] = curve
    return curves
