"""Training, posteriors and their calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, STYLES, Array, headline, outside_legend, panel, panels

__all__ = [
    "plot_chains",
    "plot_comparison",
    "plot_margin_bands",
    "plot_posterior",
    "plot_rank_bands",
    "plot_recovery",
    "plot_training",
]


def plot_training(history: Mapping[str, Sequence[float]], *, axes: Sequence[Axes] | None = None) -> Figure:
    """Training curves against optimiser steps.

    Args:
        history: ``step``, ``objective``, ``cross_entropy``, ``barrier``, ``smallest_margin``, ``embedding_norm``; one
            number an evaluation each.
        axes: five panels, in the order of these names.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> names = ("step", "objective", "cross_entropy", "barrier", "smallest_margin", "embedding_norm")
        >>> figure = plot_training({name: [1.0, 2.0] for name in names})
        >>> len(figure.axes)
        5
    """
    curves = {
        "objective per character (nats)": "objective",
        "held-out cross-entropy (nats)": "cross_entropy",
        "mean barrier b (nats)": "barrier",
        "smallest singular value of J": "smallest_margin",
        "embedding norm (rms)": "embedding_norm",
    }
    figure, drawn = panels(axes, len(curves), (13, 2.7), columns=len(curves))
    for axis, colour, (title, name) in zip(drawn, COLOURS, curves.items(), strict=False):
        axis.plot(history["step"], history[name], color=colour, marker="o", markersize=2)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    return figure


def plot_posterior(
    posterior: Mapping[str, Array],
    prior: Mapping[str, Array],
    truth: Mapping[str, float] | None = None,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Posterior and prior of each number, one panel each, with 50 and 90 % intervals of the posterior.

    Args:
        posterior: draws by label, (S,) each.
        prior: draws of the prior by the same labels; where one is missing its panel shows the posterior alone.
        truth: values to mark, where they are known.
        axes: one panel a label, in their order.

    Returns:
        The figure.

    Raises:
        InputError: no draws, or a wrong number of axes.

    Example:
        >>> draws = {"A[0,0]": np.linspace(0.0, 1.0, 50)}
        >>> figure = plot_posterior(draws, {}, {"A[0,0]": 0.4})
        >>> figure.axes[0].get_legend_handles_labels()[1]
        ['posterior', 'truth']
    """
    columns = max(1, min(4, len(posterior)))
    size = (3.1 * columns, 2.3 * -(-len(posterior) // columns))
    figure, drawn = panels(axes, len(posterior), size, columns=columns)
    for axis, (label, values) in zip(drawn, posterior.items(), strict=True):
        low, high = np.quantile(values, (0.001, 0.999))
        room = 0.6 * (high - low) + 1e-12
        bins = np.linspace(low - room, high + room, 60)
        axis.hist(values, bins.tolist(), density=True, color=COLOURS[0], alpha=0.75, label="posterior")
        if label in prior:
            # Of all prior draws, so that those outside the panel count too.
            count, edges = np.histogram(prior[label], bins)
            axis.stairs(count / len(prior[label]) / np.diff(edges), edges, color=COLOURS[1], label="prior")
        for level, width in ((0.9, 2.0), (0.5, 5.0)):
            ends = np.quantile(values, (0.5 - level / 2, 0.5 + level / 2))
            axis.plot(ends, [0, 0], color="black", linewidth=width, solid_capstyle="butt", clip_on=False)
        if truth is not None and label in truth:
            axis.axvline(truth[label], color=COLOURS[6], linestyle="--", linewidth=1, label="truth")
        axis.set_title(label, fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
    drawn[0].legend(fontsize=7)
    if axes is None:
        figure.suptitle("Posterior and prior; bars: 50 and 90 % intervals")
    return figure


def plot_chains(draws: Mapping[str, Array], diverging: Array, *, axes: Sequence[Axes] | None = None) -> Figure:
    """Every chain's path, one panel a number, with the divergent transitions marked at the bottom.

    Args:
        draws: by label, (chain, draw) each.
        diverging: (chain, draw).
        axes: one panel a label, from top to bottom.

    Returns:
        The figure.

    Raises:
        InputError: no draws, or a wrong number of axes.

    Example:
        >>> figure = plot_chains({"a": np.zeros((2, 5))}, np.eye(2, 5, dtype=bool))
        >>> figure.get_suptitle()
        '2 chains; 2 divergences (black marks)'
    """
    figure, drawn = panels(axes, len(draws), (9, 1.3 * len(draws) + 0.6), sharex=True)
    for axis, (label, values) in zip(drawn, draws.items(), strict=True):
        for k, chain in enumerate(values):
            axis.plot(chain, color=COLOURS[k % len(COLOURS)], linewidth=0.5, alpha=0.8)
        hit = np.flatnonzero(diverging.any(0))
        axis.plot(hit, np.full(len(hit), values.min()), "|", color="black", markersize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.005)
    drawn[-1].set_xlabel("draw")
    headline(axes, figure, drawn, f"{len(diverging)} chains; {int(diverging.sum())} divergences (black marks)")
    return figure


def plot_margin_bands(
    margin: Array,
    log_abs_det: Array,
    *,
    title: str = "Posterior along the first sequence",
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Posterior of margin and log-determinant along one sequence.

    Args:
        margin: smallest singular value of J_i, (S, T).
        log_abs_det: log|det J_i|, (S, T).
        title: over both panels.
        axes: for the margin, and for the log-determinant.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> figure = plot_margin_bands(np.ones((10, 4)), np.zeros((10, 4)), title="No attention")
        >>> figure.get_suptitle()
        'No attention'
    """
    figure, drawn = panels(axes, 2, (9, 4.6), sharex=True)
    named = ((r"$\sigma_{\min}(J_i)$", margin), (r"$\log|\det J_i|$", log_abs_det))
    for axis, colour, (label, values) in zip(drawn, COLOURS, named, strict=False):
        positions = np.arange(values.shape[1])
        for level, shade in ((0.9, 0.25), (0.5, 0.45)):
            low, high = np.quantile(values, (0.5 - level / 2, 0.5 + level / 2), axis=0)
            axis.fill_between(
                positions, low, high, color=colour, alpha=shade, linewidth=0, label=f"{100 * level:.0f} %"
            )
        axis.plot(positions, np.median(values, axis=0), color=colour, linewidth=1.2, label="median")
        axis.set_ylabel(label)
        axis.grid(alpha=0.25)
        axis.margins(x=0.01)
    drawn[0].axhline(0, color="black", linewidth=0.8, linestyle="--", label="degeneracy boundary")
    drawn[0].legend(fontsize=8, ncols=4 if axes is None else 1)
    drawn[1].set_xlabel("token")
    headline(axes, figure, drawn, title)
    return figure


def plot_comparison(differences: Mapping[str, tuple[float, float]], *, ax: Axes | None = None) -> Figure:
    """Models by how much worse they predict a sequence that was left out, with one and two standard errors.

    Args:
        differences: by name, the difference of elpd to the best model and its standard error.
        ax: where to draw; None for a figure of its own.

    Returns:
        The figure.

    Example:
        >>> figure = plot_comparison({"full": (0.0, 0.0), "without the Jacobian": (-34.0, 8.0)})
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['full', 'without the Jacobian']
    """
    figure, axis = panel(ax, (7, 0.5 * len(differences) + 1.3))
    rows = np.arange(len(differences))[::-1]
    for row, (difference, error) in zip(rows, differences.values(), strict=True):
        for width, thickness in ((2, 1.2), (1, 3.5)):
            ends = (difference - width * error, difference + width * error)
            axis.plot(ends, (row, row), color=COLOURS[0], linewidth=thickness, solid_capstyle="butt")
        axis.plot(difference, row, "o", color=COLOURS[0])
    axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(rows, list(differences))
    axis.set_ylim(-0.6, len(differences) - 0.4)
    axis.set_xlabel("elpd behind the best model (nats; bars: one and two standard errors)")
    axis.grid(alpha=0.25, axis="x")
    return figure


def plot_rank_bands(
    ranks: Mapping[str, Mapping[str, Array]],
    band: tuple[Array, Array, Array],
    level: float,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Simulation-based calibration: the ECDF of normalised ranks minus the uniform one, with its simultaneous band.

    Args:
        ranks: by method and quantity, numbers in (0, 1), (replicates,) each.
        band: points in [0, 1], lower and upper end of the ECDF there, (K,) each.
        level: probability that a calibrated ECDF stays within the band.
        axes: one panel a method, in their order.

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
            ecdf = np.searchsorted(np.sort(values), points, side="right") / len(values)
            colour, line = STYLES[k % len(STYLES)]
            name = label.replace("_", " ")
            axis.plot(points, ecdf - points, color=colour, linestyle=line, linewidth=1.2, label=name)
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("normalised rank")
        axis.grid(alpha=0.25)
        if place % columns == 0:
            axis.set_ylabel("ECDF of ranks - uniform")
    outside_legend(axes, figure, drawn[0], "right upper", fontsize=8)
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
    """Coverage of central intervals against their level, and the error of the posterior mean against the data.

    Args:
        levels: nominal levels, (K,).
        coverage: by arm, share of the truths held, (K,) each.
        band: what chance alone leaves around the diagonal, low and high, (K,) each.
        sizes: numbers of sequences.
        errors: by posterior, root mean square error of the mean at each size.
        axes: for the coverage, and for the error.

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
    figure, (left, right) = panels(axes, 2, (10.5, 4.2), columns=2)
    left.fill_between(levels, np.maximum(band[0], 0), np.minimum(band[1], 1), color="0.85", label="chance alone")
    left.plot((0, 1), (0, 1), color="black", linewidth=0.8)
    for k, (label, values) in enumerate(coverage.items()):
        left.plot(levels, values, color=COLOURS[k % len(COLOURS)], marker="o", markersize=3, label=label)
    left.set_xlabel("level of the interval")
    left.set_ylabel("share that holds the truth")
    left.set_aspect("equal")
    for k, (label, numbers) in enumerate(errors.items()):
        right.loglog(sizes, numbers, color=COLOURS[k % len(COLOURS)], marker="o", label=label)
    first = next(iter(errors.values()))[0]
    slope = first * (np.asarray(sizes, dtype=float) / sizes[0]) ** -0.5
    right.loglog(sizes, slope, color="grey", linestyle=":", label="1 / sqrt(N)")
    right.set_xticks(list(sizes), [str(size) for size in sizes])
    right.set_xticks([], minor=True)
    right.set_xlabel("sequences N")
    right.set_ylabel("error of the posterior mean of A (rms)")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure
