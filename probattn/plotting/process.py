"""The process over infinite sequences: its boundary, its growth, and the excess mass of attraction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, ERROR_BARS, Array, finish, panel, panels

__all__ = ["plot_boundary", "plot_excess", "plot_growth", "plot_rotation"]


def plot_boundary(
    spreads: Array,
    curves: Mapping[int, Array],
    critical: Mapping[str, tuple[Array, Array, Array]],
    expected: float,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw the noise that keeps a spread against the spread, and the largest such noise against the length.

    Args:
        spreads: spreads V of the past, (S,).
        curves: measured noise sigma^2(V) by number n of tokens in the past, (S,) each.
        critical: lengths, largest noise and its standard error, (L,) each, by name of the case.
        expected: boundary of the mean field, 4/27.
        axes: one panel for the noise against the spread, one for the largest noise.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> spreads = np.array([0.1, 0.3, 0.5])
        >>> measured = {50: spreads * (1 - spreads) ** 2}
        >>> largest = {"free": (np.array([50]), np.array([0.15]), np.array([0.01]))}
        >>> figure = plot_boundary(spreads, measured, largest, 4 / 27)
        >>> [axis.get_xlabel() for axis in figure.axes]
        ['spread of the past, aV', '1 / n (bars: 95 %)']
    """
    figure, (left, right) = panels(axes, 2, (10.5, 4.2))
    fine = np.linspace(0, max(0.6, float(spreads[-1])), 200)
    left.plot(fine, fine * (1 - fine) ** 2, color="black", linewidth=1, label="mean field, V (1 − aV)²")
    for colour, (length, values) in zip(cycle(COLOURS), curves.items(), strict=False):
        left.plot(spreads, values, "o", markersize=4, color=colour, label=f"n = {length}")
    left.axhline(expected, color="grey", linestyle="--", linewidth=1)
    left.annotate("4/27", (0.01, expected), xytext=(0, 3), textcoords="offset points", fontsize=9)
    for k, (label, (lengths, values, error)) in enumerate(critical.items()):
        # Set apart a little, so that the bars do not hide each other.
        shifted, colour = 1 / lengths + 0.0004 * k, COLOURS[k % len(COLOURS)]
        right.errorbar(shifted, values, 1.96 * error, color=colour, label=label, **ERROR_BARS)
    right.axhline(expected, color="grey", linestyle="--", linewidth=1, label="mean field, 4/27")
    finish(left, "spread of the past, aV", "noise that keeps it, aσ²", legend=True)
    finish(right, "1 / n (bars: 95 %)", "largest noise with a stationary spread, aσ²", legend=True)
    return figure


def plot_excess(
    slopes: Array,
    excess: Array,
    boundary: float,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw the excess mass that attraction gives to three tokens, against the strength of the attention.

    Args:
        slopes: strengths a sigma^2, (K,).
        excess: excess masses E[Z] - 1, (K,); values that are not positive leave a gap.
        boundary: boundary of stationarity, 4/27, which is marked.
        ax: panel to draw on; None for a new figure.

    Returns:
        The figure.

    Example:
        >>> figure = plot_excess(np.array([0.1, 0.5, 1.0]), np.array([0.0, 1e-4, 5e-3]), 4 / 27)
        >>> figure.axes[0].get_yscale()
        'log'
    """
    figure, axis = panel(ax, (6.4, 4.2))
    axis.loglog(slopes, np.where(excess > 0, excess, np.nan), color=COLOURS[0])
    axis.axvline(boundary, color="grey", linestyle="--", linewidth=1)
    axis.annotate("4/27", (boundary, axis.get_ylim()[0]), xytext=(3, 6), textcoords="offset points", fontsize=9)
    finish(axis, "strength of the attention, aσ²", "excess mass of three tokens, E[Z] − 1")
    return figure


def plot_growth(
    lengths: Array,
    slopes: Sequence[float],
    cases: Mapping[str, tuple[Array, Array]],
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw the median spread of long runs against their length, with the mean-field flow dashed.

    Args:
        lengths: numbers n of tokens, (K,).
        slopes: strengths a sigma^2, one per curve.
        cases: measured and predicted medians by title, (slopes, K) each; inf where a run escaped, which ends a curve
            and is written beside it.
        axes: one panel per case, from left to right.

    Returns:
        The figure.

    Raises:
        InputError: no case, or a wrong number of axes.

    Example:
        >>> medians = np.array([[0.1, 0.12, np.inf]])
        >>> figure = plot_growth(np.array([10, 100, 1000]), [0.2], {"free": (medians, medians)})
        >>> [text.get_text() for text in figure.axes[0].texts]
        ['1/3', 'escapes']
    """
    figure, drawn = panels(axes, len(cases), (10.5, 4.2), sharey=True)
    for axis, (title, (measured, predicted)) in zip(drawn, cases.items(), strict=True):
        axis.axhline(1 / 3, color="grey", linewidth=1, linestyle=":")
        axis.annotate("1/3", (lengths[0], 1 / 3), xytext=(0, 3), textcoords="offset points", fontsize=9)
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
        axis.set_xscale("log")
        finish(axis, "tokens n", title=title)
    finish(drawn[0], ylabel="median spread aV (dashed: mean-field flow)")
    finish(drawn[-1], legend=True)
    return figure


def plot_rotation(
    angles: Array, exact: Array, measured_angles: Array, measured: Array, *, ax: Axes | None = None
) -> Figure:
    """Draw the boundary of a rotating attention in the plane against its angle.

    Args:
        angles: angles theta in degrees, (K,).
        exact: noise ``|lambda|`` sigma^2 at the boundary, (K,).
        measured_angles: angles of the measurements in degrees, (M,).
        measured: noise at the end of the stable branch, found by continuation, (M,); inf, which is not drawn, where
            the branch has no end.
        ax: panel to draw on; None for a new figure.

    Returns:
        The figure.

    Example:
        >>> figure = plot_rotation(np.array([0.0, 60.0]), np.array([4 / 27, 0.375]), np.array([60]), np.array([0.37]))
        >>> figure.axes[0].get_xlim()
        (np.float64(0.0), np.float64(180.0))
    """
    figure, axis = panel(ax, (6.4, 4.2))
    axis.plot(angles, exact, color=COLOURS[0], label="2 (1 + cos θ) / (1 + 2 cos θ)³")
    ends = np.isfinite(measured)
    axis.plot(measured_angles[ends], measured[ends], "o", color=COLOURS[1], label="end of the branch, by continuation")
    axis.axvspan(120, 180, color=COLOURS[2], alpha=0.15, label="stationary at every noise")
    axis.set_yscale("log")
    axis.set_xlim(0, 180)
    words = "angle between a token and the tokens it attends to, θ in degrees"
    finish(axis, words, "largest noise with a stationary spread, |λ|σ²", legend=True)
    return figure
