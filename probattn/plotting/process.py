"""The process over infinite sequences: its boundary and its growth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, Array

__all__ = ["plot_boundary", "plot_excess", "plot_growth", "plot_rotation"]


def plot_boundary(
    spreads: Array,
    curves: Mapping[int, Array],
    critical: Mapping[str, tuple[Array, Array, Array]],
    expected: float,
) -> Figure:
    """The noise that keeps a spread, against the spread, and the largest of it against the length of the past.

    Args:
        spreads: V, (S,).
        curves: measured sigma^2(V) by length n, (S,) each.
        critical: for each case the lengths, the largest noise and its standard error, (L,) each.
        expected: the boundary of mean field.
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    fine = np.linspace(0, max(0.6, float(spreads[-1])), 200)
    left.plot(fine, fine * (1 - fine) ** 2, color="black", linewidth=1, label="mean field, V (1 − aV)²")
    for colour, (length, values) in zip(COLOURS, curves.items(), strict=False):
        left.plot(spreads, values, "o", markersize=4, color=colour, label=f"n = {length}")
    left.axhline(expected, color="grey", linestyle="--", linewidth=1)
    left.annotate("4/27", (0.01, expected), xytext=(0, 3), textcoords="offset points", fontsize=9)
    left.set_xlabel("spread of the past, aV")
    left.set_ylabel("noise that keeps it, aσ²")
    left.legend(fontsize=8)
    bars: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "capsize": 2}
    for k, (label, (lengths, values, error)) in enumerate(critical.items()):
        right.errorbar(1 / lengths + 0.0004 * k, values, 1.96 * error, color=COLOURS[k], label=label, **bars)
    right.axhline(expected, color="grey", linestyle="--", linewidth=1, label="mean field, 4/27")
    right.set_xlabel("1 / n")
    right.set_ylabel("largest noise with a stationary spread, aσ²")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure


def plot_excess(slopes: Array, excess: Array, boundary: float) -> Figure:
    """By how much three tokens have more mass than two, against the strength of the attention.

    Args:
        slopes: a sigma^2, (K,).
        excess: E[Z] - 1, (K,).
        boundary: of stationarity, marked.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.loglog(slopes, np.where(excess > 0, excess, np.nan), color=COLOURS[0])
    axis.axvline(boundary, color="grey", linestyle="--", linewidth=1)
    axis.annotate("4/27", (boundary, axis.get_ylim()[0]), xytext=(3, 6), textcoords="offset points", fontsize=9)
    axis.set_xlabel("strength of the attention, aσ²")
    axis.set_ylabel("excess mass of three tokens, E[Z] − 1")
    axis.set_title("Attraction always folds somewhere: how much it costs", fontsize=10)
    axis.grid(alpha=0.25)
    return figure


def plot_growth(lengths: Array, slopes: Sequence[float], panels: Mapping[str, tuple[Array, Array]]) -> Figure:
    """Median spread of long runs against their length, with the mean-field flow dashed.

    Args:
        lengths: n, (K,).
        slopes: a sigma^2, one a curve.
        panels: by title, the measured and the predicted medians, (slopes, K) each; inf where escaped.
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, (measured, predicted)) in zip(axes, panels.items(), strict=True):
        for k, slope in enumerate(slopes):
            colour = COLOURS[k % len(COLOURS)]
            for values, style in ((measured[k], "o-"), (predicted[k], "--")):
                seen = np.where(np.isfinite(values), values, np.nan)
                label = f"aσ² = {slope:g}" if style == "o-" else None
                axis.plot(lengths, slope * seen, style, color=colour, markersize=4, linewidth=1.2, label=label)
            last = int(np.isfinite(measured[k]).sum())
            if 0 < last < len(lengths):
                axis.annotate(
                    "escapes",
                    (lengths[last - 1], slope * measured[k][last - 1]),
                    xytext=(4, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
        axis.axhline(1 / 3, color="grey", linewidth=1, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlabel("tokens n")
        axis.set_title(f"mean of the past {title}" if title == "free" else title, fontsize=10)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("median spread aV (dashed: mean-field flow)")
    axes[-1].legend(fontsize=8)
    return figure


def plot_rotation(angles: Array, exact: Array, measured_angles: Array, measured: Array) -> Figure:
    """The boundary of a rotating attention in the plane against its angle.

    Args:
        angles: theta in degrees, (K,).
        exact: |lambda| sigma^2 at the boundary, (K,).
        measured_angles: (M,).
        measured: the end of the stable branch, found by continuation, (M,); inf where it has none.
    """
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.plot(angles, exact, color=COLOURS[0], label="2 (1 + cos θ) / (1 + 2 cos θ)³")
    ends = np.isfinite(measured)
    axis.plot(measured_angles[ends], measured[ends], "o", color=COLOURS[1], label="end of the branch, by continuation")
    axis.axvspan(120, 180, color=COLOURS[2], alpha=0.15, label="stationary at every noise")
    axis.set_yscale("log")
    axis.set_xlim(0, 180)
    axis.set_xlabel("angle between a token and what it attends to, θ in degrees")
    axis.set_ylabel("largest noise with a stationary spread, |λ|σ²")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure
