"""Calibration of inference: ranks of the truth, coverage of intervals, and errors that shrink with the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatterSciNotation

from probattn.plotting.style import COLOURS, STYLES, Array, finish, outside_legend, panels, words

__all__ = ["plot_rank_bands", "plot_recovery"]


def plot_rank_bands(
    ranks: Mapping[str, Mapping[str, Array]],
    band: tuple[Array, Array, Array],
    level: float,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw the distribution of normalised ranks minus the uniform one, with its simultaneous band.

    Simulation-based calibration: the ranks of the truth among posterior draws are uniform if inference is right (Talts,
    Betancourt, Simpson, Vehtari and Gelman, 2018, arXiv 1804.06788; bands for the empirical distribution function:
    Säilynoja, Bürkner and Vehtari, 2022, arXiv 2103.10522).

    Args:
        ranks: normalised ranks in (0, 1) by method and quantity, (replicates,) each.
        band: points in [0, 1], and lower and upper end of the empirical distribution function there, (K,) each.
        level: probability that a calibrated function stays within the band.
        axes: one panel per method, in their order.

    Returns:
        The figure.

    Raises:
        InputError: no ranks, or a wrong number of axes.

    Example:
        >>> points = np.linspace(0.0, 1.0, 11)
        >>> band = (points, points - 0.3, points + 0.3)
        >>> figure = plot_rank_bands({"NUTS": {"a": points}}, band, 0.99)
        >>> figure.axes[0].get_title()
        'NUTS'
    """
    columns = max(1, min(4, len(ranks)))
    size = (3.6 * columns + 1.6, 3.3 * -(-len(ranks) // columns))
    figure, drawn = panels(axes, len(ranks), size, columns=columns)
    points, low, high = band
    for place, (axis, (method, quantities)) in enumerate(zip(drawn, ranks.items(), strict=True)):
        axis.fill_between(points, low - points, high - points, color="0.85", label=f"{100 * level:.3g} % band")
        for k, (label, values) in enumerate(quantities.items()):
            share = np.searchsorted(np.sort(values), points, side="right") / len(values)
            colour, line = STYLES[k % len(STYLES)]
            axis.plot(points, share - points, color=colour, linestyle=line, linewidth=1.2, label=words(label))
        finish(axis, "normalised rank", "share of ranks below − uniform" if place % columns == 0 else "", words(method))
    outside_legend(axes, figure, drawn[0])
    return figure


def plot_recovery(
    levels: Array,
    coverage: Mapping[str, Array],
    band: tuple[Array, Array],
    sizes: Sequence[int],
    errors: Mapping[str, Sequence[float]],
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw coverage of central intervals against their level, and the error of the posterior mean against the data.

    Args:
        levels: nominal levels of the intervals, (K,).
        coverage: share of the true values inside the intervals, by posterior, (K,) each.
        band: low and high end of what chance alone leaves around the diagonal, (K,) each.
        sizes: numbers of sequences.
        errors: root mean square error of the posterior mean at each size, by posterior.
        axes: one panel for the coverage, one for the error.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> levels = np.array([0.5, 0.9])
        >>> band = (levels - 0.1, levels + 0.1)
        >>> figure = plot_recovery(levels, {"NUTS": levels}, band, [8, 32], {"NUTS": [0.2, 0.1]})
        >>> figure.axes[1].get_xscale()
        'log'
    """
    figure, (left, right) = panels(axes, 2, (10.5, 4.2))
    left.fill_between(levels, np.maximum(band[0], 0), np.minimum(band[1], 1), color="0.85", label="chance alone")
    left.plot((0, 1), (0, 1), color="black", linewidth=0.8)
    for k, (label, values) in enumerate(coverage.items()):
        left.plot(levels, values, color=COLOURS[k % len(COLOURS)], marker="o", markersize=3, label=label)
    left.set_aspect("equal")
    for k, (label, numbers) in enumerate(errors.items()):
        right.loglog(sizes, numbers, color=COLOURS[k % len(COLOURS)], marker="o", label=label)
    first = next(iter(errors.values()))[0]
    slope = first * (np.asarray(sizes, dtype=float) / sizes[0]) ** -0.5
    right.loglog(sizes, slope, color="grey", linestyle=":", label="1 / √N")
    right.set_xticks(list(sizes), [str(size) for size in sizes])
    right.set_xticks([], minor=True)
    right.yaxis.set_minor_formatter(LogFormatterSciNotation(minor_thresholds=(2, 0.5)))
    finish(left, "level of the interval", "share of true values inside", legend=True)
    finish(right, "sequences N", "error of the posterior mean of A (rms)", legend=True)
    return figure
