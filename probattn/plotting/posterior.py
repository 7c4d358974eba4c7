"""Posteriors of attention parameters: densities with their prior, traces of the chains, margins, comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, Array, finish, headline, label_rows, outside_legend, panel, panels, words

__all__ = ["plot_chains", "plot_comparison", "plot_margin_bands", "plot_posterior"]

_LEVELS = (0.9, 0.5)


def plot_posterior(
    posterior: Mapping[str, Array],
    prior: Mapping[str, Array],
    truth: Mapping[str, float] | None = None,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw posterior and prior of each number, one panel each, with 50 and 90 % intervals of the posterior.

    A panel shows the surroundings of the posterior; of a prior that is wider the rest lies outside.

    Args:
        posterior: posterior draws by label, (S,) each.
        prior: prior draws by the same labels; where one is missing, its panel shows the posterior alone.
        truth: values to mark, by label, where they are known.
        axes: one panel per label, in their order.

    Returns:
        The figure.

    Raises:
        InputError: no draws, or a wrong number of axes.

    Example:
        >>> draws = {"A[0,0]": np.linspace(0.0, 1.0, 50)}
        >>> figure = plot_posterior(draws, {}, {"A[0,0]": 0.4})
        >>> figure.axes[0].get_legend_handles_labels()[1]
        ['posterior', '90% interval', '50% interval', 'truth']
    """
    columns = max(1, min(4, len(posterior)))
    size = (3.1 * columns + 1.4, 2.3 * -(-len(posterior) // columns))
    figure, drawn = panels(axes, len(posterior), size, columns=columns)
    for axis, (label, values) in zip(drawn, posterior.items(), strict=True):
        heights, edges = _histogram(values)
        axis.stairs(heights, edges, fill=True, color=COLOURS[0], alpha=0.75, label="posterior")
        if label in prior:
            axis.stairs(*_histogram(prior[label]), color=COLOURS[1], linewidth=1.5, label="prior")
        for level, width in zip(_LEVELS, (2.0, 5.0), strict=True):
            bar: dict[str, Any] = {"color": "black", "linewidth": width, "solid_capstyle": "butt", "clip_on": False}
            axis.plot(_interval(values, level), [0, 0], label=f"{level:.0%} interval", **bar)
        if truth is not None and label in truth:
            axis.axvline(truth[label], color=COLOURS[6], linestyle="--", linewidth=1, label="truth")
        room = 0.6 * (edges[-1] - edges[0])
        axis.set_xlim(edges[0] - room, edges[-1] + room)
        axis.set_title(words(label), fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
    outside_legend(axes, figure, drawn[0])
    return figure


def plot_chains(draws: Mapping[str, Array], diverging: Array, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw the path of every chain, one panel per number, with divergent transitions marked at the bottom.

    Args:
        draws: draws by label, (chain, draw) each.
        diverging: True where a transition diverged, (chain, draw).
        axes: one panel per label, from top to bottom.

    Returns:
        The figure.

    Raises:
        InputError: no draws, or a wrong number of axes.

    Example:
        >>> figure = plot_chains({"a": np.zeros((2, 5))}, np.eye(2, 5, dtype=bool))
        >>> figure.get_suptitle()
        '2 chains; 2 divergences (black marks)'
    """
    figure, drawn = panels(axes, len(draws), (9, 1.4 * len(draws) + 0.6), columns=1, sharex=True)
    for axis, (label, values) in zip(drawn, draws.items(), strict=True):
        for k, chain in enumerate(values):
            axis.plot(chain, color=COLOURS[k % len(COLOURS)], linewidth=0.5, alpha=0.8)
        hit = np.flatnonzero(diverging.any(0))
        axis.plot(hit, np.full(len(hit), values.min()), "|", color="black", markersize=8)
        axis.set_ylabel(words(label), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.005)
    drawn[-1].set_xlabel("draw")
    headline(axes, figure, drawn, f"{len(diverging)} chains; {int(diverging.sum())} divergences (black marks)")
    return figure


def plot_margin_bands(margin: Array, log_abs_det: Array, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw the posterior of margin and log-determinant along one sequence.

    Args:
        margin: smallest singular value of J_i in every draw, (S, T).
        log_abs_det: ``log|det J_i|`` in every draw, (S, T).
        axes: one panel for the margin, one for the log-determinant.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> figure = plot_margin_bands(np.ones((10, 4)), np.zeros((10, 4)))
        >>> figure.axes[0].get_legend_handles_labels()[1]
        ['90%', '50%', 'median', 'degeneracy boundary']
    """
    figure, drawn = panels(axes, 2, (9, 4.6), columns=1, sharex=True)
    named = ((r"margin $\sigma_{\min}(J_i)$", margin), (r"$\log|\det J_i|$", log_abs_det))
    for axis, colour, (label, values) in zip(drawn, COLOURS, named, strict=False):
        positions = np.arange(values.shape[1])
        for level, shade in zip(_LEVELS, (0.25, 0.45), strict=True):
            low, high = _interval(values, level)
            axis.fill_between(positions, low, high, color=colour, alpha=shade, linewidth=0, label=f"{level:.0%}")
        axis.plot(positions, np.median(values, axis=0), color=colour, linewidth=1.2, label="median")
        finish(axis, ylabel=label)
        axis.margins(x=0.01)
    drawn[0].axhline(0, color="black", linewidth=0.8, linestyle="--", label="degeneracy boundary")
    outside_legend(axes, figure, drawn[0], "upper center", columns=4)
    drawn[1].set_xlabel("token")
    return figure


def plot_comparison(differences: Mapping[str, tuple[float, float]], *, ax: Axes | None = None) -> Figure:
    """Draw how much worse each model predicts a sequence that was left out, with one and two standard errors.

    Args:
        differences: difference of the expected log predictive density (elpd) to the best model, and its standard
            error, by name of the model.
        ax: panel to draw on; None for a new figure.

    Returns:
        The figure.

    Example:
        >>> figure = plot_comparison({"full": (0.0, 0.0), "without the Jacobian": (-34.0, 8.0)})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['full', 'without the Jacobian']
    """
    figure, axis = panel(ax, (7, 0.5 * len(differences) + 1.3))
    centre, error = np.array(list(differences.values())).T
    rows = label_rows(axis, list(differences))
    for width, thickness in ((2, 1.2), (1, 3.5)):
        axis.hlines(rows, centre - width * error, centre + width * error, color=COLOURS[0], linewidth=thickness)
    axis.plot(centre, rows, "o", color=COLOURS[0])
    axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
    finish(axis, "elpd behind the best model (nats; bars: one and two standard errors)")
    return figure


def _interval(values: Array, level: float) -> Array:
    """Central interval over the draws, ends first, (2, ...)."""
    ends: Array = np.quantile(values, (0.5 - level / 2, 0.5 + level / 2), axis=0)
    return ends


def _histogram(values: Array) -> tuple[Array, Array]:
    """Density of the central 99.8 % of the draws, as a share of all of them: heights and edges of the bins."""
    low, high = np.quantile(values, (0.001, 0.999))
    edges = np.histogram_bin_edges(values, "auto", range=(float(low), float(high)))
    return np.histogram(values, edges)[0] / np.size(values) / np.diff(edges), edges
