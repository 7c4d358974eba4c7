"""Figures, each a function of arrays that returns a matplotlib ``Figure``; nothing is shown or saved here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = [
    "plot_barriers",
    "plot_boundary",
    "plot_bounds",
    "plot_chains",
    "plot_comparison",
    "plot_conditional",
    "plot_excess",
    "plot_growth",
    "plot_margin_bands",
    "plot_margins",
    "plot_mass",
    "plot_masses",
    "plot_posterior",
    "plot_rank_bands",
    "plot_recovery",
    "plot_rotation",
    "plot_training",
]

Array = NDArray[np.float64]

# Okabe and Ito's palette, told apart by every kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_margins(margins: Mapping[str, Array], characters: Sequence[str], support: Sequence[int]) -> Figure:
    """Margins along one sequence, one panel a kind, with the support tokens marked.

    Args:
        margins: by kind, (T,) each.
        characters: what to write under each position, T of them.
        support: positions to mark.
    """
    figure = Figure(figsize=(11, 1.9 * len(margins)), layout="constrained")
    axes = figure.subplots(len(margins), 1, sharex=True, squeeze=False)[:, 0]
    positions = np.arange(len(characters))
    chosen = np.asarray(support, dtype=int)
    for axis, colour, (kind, values) in zip(axes, _COLOURS, margins.items(), strict=False):
        axis.plot(positions, values, color=colour, marker="o", markersize=2.5, linewidth=1)
        axis.plot(chosen, values[chosen], "o", color="black", markersize=7, fillstyle="none", label="support tokens")
        axis.set_ylabel(kind.replace("_", " "))
        axis.margins(x=0.01)
        axis.grid(alpha=0.25)
        axis.ticklabel_format(axis="y", useOffset=False, style="plain")
        positive = values[np.isfinite(values)]
        if positive.size and positive.min() > 0 and positive.max() / positive.min() > 100:
            axis.set_yscale("log")
    axes[0].legend(loc="best", fontsize=8)
    axes[-1].set_xticks(
        positions, [_visible(character) for character in characters], fontfamily="monospace", fontsize=8
    )
    axes[-1].set_xlabel("character")
    figure.suptitle("Margins along one window of held-out text")
    return figure


def plot_bounds(measured: Mapping[str, float], bound: Mapping[str, float]) -> Figure:
    """What was measured against the largest value that it may take, on a logarithmic axis.

    Args:
        measured: by name; zero is drawn at the left end.
        bound: by name, those to show.
    """
    names = list(bound)
    figure = Figure(figsize=(7.5, 1.2 + 0.28 * len(names)), layout="constrained")
    axis = figure.subplots()
    sizes = [abs(value) for name in names for value in (measured[name], bound[name]) if 0 < abs(value) < np.inf]
    low, high = (min(sizes) / 10, max(sizes) * 10) if sizes else (1e-3, 1.0)
    for row, name in enumerate(names):
        limit, value = max(bound[name], low), measured[name]
        held = value <= bound[name]
        axis.plot([low, limit], [row, row], color="0.85", linewidth=9, solid_capstyle="butt", zorder=1)
        shown = min(max(value, low), high) if np.isfinite(value) else high
        axis.plot(shown, row, "o" if held else "X", color=_COLOURS[0 if held else 1], zorder=2)
    axis.set_xscale("log")
    axis.set_xlim(low / 1.5, high)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel("measured (grey: allowed; at the left end: zero)")
    axis.grid(alpha=0.25, axis="x")
    return figure


def plot_conditional(panels: Sequence[Mapping[str, Any]]) -> Figure:
    """Residual map and next-token law of one past, one column a panel.

    Args:
        panels: each with ``title``, the grid ``u`` (G,), ``residual`` e(u), ``density`` N |det J|, ``plain`` N without
            the determinant, ``mass`` of the density, ``plain_mass``, and ``turning_points``.
    """
    figure = Figure(figsize=(5.5 * len(panels), 6.2), layout="constrained")
    axes = figure.subplots(2, len(panels), squeeze=False, sharex="col")
    for (upper, lower), panel in zip(axes.T, panels, strict=True):
        u = panel["u"]
        upper.plot(u, panel["residual"], color=_COLOURS[0])
        upper.plot(u, u, color="grey", linewidth=0.8, linestyle=":", label="e = u")
        for point in panel["turning_points"]:
            upper.axvline(point, color=_COLOURS[1], linewidth=0.8, linestyle="--")
            lower.axvline(point, color=_COLOURS[1], linewidth=0.8, linestyle="--")
        upper.set_title(panel["title"], fontsize=10)
        upper.set_ylabel("residual map e(u)")
        upper.legend(fontsize=8)
        lower.fill_between(u, panel["density"], color=_COLOURS[0], alpha=0.25)
        lower.plot(u, panel["density"], color=_COLOURS[0], label=f"with |det J|: mass {panel['mass']:.3f}")
        lower.plot(
            u, panel["plain"], color=_COLOURS[1], linestyle="--", label=f"without: mass {panel['plain_mass']:.3f}"
        )
        lower.set_xlabel("next token u")
        lower.set_ylabel("density")
        lower.set_ylim(bottom=0)
        lower.legend(fontsize=8)
        for axis in (upper, lower):
            axis.grid(alpha=0.25)
    return figure


def plot_training(history: Mapping[str, Sequence[float]]) -> Figure:
    """Training curves against optimiser steps.

    Args:
        history: ``step``, ``objective``, ``cross_entropy``, ``barrier``, ``smallest_margin``, ``embedding_norm``; one
            number an evaluation each.
    """
    panels = {
        "objective per character (nats)": "objective",
        "held-out cross-entropy (nats)": "cross_entropy",
        "mean barrier b (nats)": "barrier",
        "smallest singular value of J": "smallest_margin",
        "embedding norm (rms)": "embedding_norm",
    }
    figure = Figure(figsize=(13, 2.7), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, colour, (title, name) in zip(axes, _COLOURS, panels.items(), strict=False):
        axis.plot(history["step"], history[name], color=colour, marker="o", markersize=2)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
    return figure


def plot_barriers(factor: Array, boundary: float, barriers: Mapping[Any, Array]) -> Figure:
    """Penalties as the attention is turned up through the degeneracy boundary.

    Args:
        factor: what A is multiplied by, (G,).
        boundary: the factor at which det J = 0.
        barriers: by kind, (G,) each.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axis = figure.subplots()
    styles = ("-", "--", ":", "-.", (0, (5, 1, 1, 1)))
    for colour, style, (kind, values) in zip(_COLOURS, styles, barriers.items(), strict=False):
        axis.plot(factor, np.where(np.isfinite(values), values, np.nan), color=colour, linestyle=style, label=kind)
    axis.axvline(boundary, color="grey", linewidth=0.8)
    axis.annotate("det J = 0", (boundary, axis.get_ylim()[1]), xytext=(4, -12), textcoords="offset points", fontsize=8)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("factor on A (negative: the literal barrier is a reward without lower bound)")
    axis.set_ylabel("penalty (nats)")
    axis.set_title("Past {-1, +1}, token at 0: J = 1 - factor. spectral is +inf beyond the boundary", fontsize=10)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure


def plot_mass(slopes: Array, masses: Array, critical: float) -> Figure:
    """Mass Z of the next-token law against the slope a, with the fold at a sup Var = 1.

    Args:
        slopes: a, (G,).
        masses: Z, (G,).
        critical: the slope at which the first fold appears.
    """
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axis = figure.subplots()
    axis.plot(slopes, masses, color=_COLOURS[0])
    axis.axvline(critical, color=_COLOURS[1], linestyle="--", label=f"first fold, a = {critical:.3f}")
    axis.axhline(1, color="black", linewidth=0.6)
    axis.set_xlabel("slope a")
    axis.set_ylabel("mass Z = mean number of solutions")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure


def plot_masses(exact: Array, estimated: Array, error: Array, signed: Array, signed_error: Array) -> Figure:
    """Estimated masses against exact ones, the signed masses beside them.

    Args:
        exact: masses with the modulus of the determinant, (K,).
        estimated: the same estimated, (K,).
        error: standard errors, (K,).
        signed: estimated masses with the sign, whose exact value is one, (K,).
        signed_error: standard errors, (K,).
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axis = figure.subplots()
    high = 1.05 * float(max(exact.max(), (estimated + 2 * error).max()))
    axis.plot([1, high], [1, high], color="grey", linewidth=1, label="equal")
    axis.axhline(1, color="grey", linewidth=1, linestyle="--", label="one")
    bars: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "capsize": 2}
    axis.errorbar(exact, estimated, 2 * error, color=_COLOURS[0], label="with |det J|", **bars)
    axis.errorbar(exact, signed, 2 * signed_error, color=_COLOURS[1], label="with det J", **bars)
    axis.set_xlabel("mean number of solutions, exact")
    axis.set_ylabel("mass, importance sampling (two standard errors)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    axis.set_title("Several dimensions: the mass counts the solutions", fontsize=10)
    return figure


def plot_posterior(
    posterior: Mapping[str, Array], prior: Mapping[str, Array], truth: Mapping[str, float] | None = None
) -> Figure:
    """Posterior and prior of each number, one panel each, with 50 and 90 % intervals of the posterior.

    Args:
        posterior: draws by label, (S,) each.
        prior: draws of the prior by the same labels; where one is missing its panel shows the posterior alone.
        truth: values to mark, where they are known.
    """
    columns = min(4, len(posterior))
    rows = -(-len(posterior) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(posterior) :]:
        axis.set_axis_off()
    for axis, (label, values) in zip(axes, posterior.items(), strict=False):
        low, high = np.quantile(values, (0.001, 0.999))
        room = 0.6 * (high - low) + 1e-12
        bins = np.linspace(low - room, high + room, 60)
        axis.hist(values, bins, density=True, color=_COLOURS[0], alpha=0.75, label="posterior")
        if label in prior:
            # Of all prior draws, so that those outside the panel count too.
            count, edges = np.histogram(prior[label], bins)
            axis.stairs(count / len(prior[label]) / np.diff(edges), edges, color=_COLOURS[1], label="prior")
        for level, width in ((0.9, 2.0), (0.5, 5.0)):
            ends = np.quantile(values, (0.5 - level / 2, 0.5 + level / 2))
            axis.plot(ends, [0, 0], color="black", linewidth=width, solid_capstyle="butt", clip_on=False)
        if truth is not None and label in truth:
            axis.axvline(truth[label], color=_COLOURS[6], linestyle="--", linewidth=1, label="truth")
        axis.set_title(label, fontsize=9)
        axis.set_yticks([])
        axis.tick_params(labelsize=8)
    axes[0].legend(fontsize=7)
    figure.suptitle("Posterior and prior; bars: 50 and 90 % intervals")
    return figure


def plot_chains(draws: Mapping[str, Array], diverging: Array) -> Figure:
    """Every chain's path, one panel a number, with the divergent transitions marked at the bottom.

    Args:
        draws: by label, (chain, draw) each.
        diverging: (chain, draw).
    """
    figure = Figure(figsize=(9, 1.3 * len(draws) + 0.6), layout="constrained")
    axes = figure.subplots(len(draws), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, values) in zip(axes, draws.items(), strict=True):
        for k, chain in enumerate(values):
            axis.plot(chain, color=_COLOURS[k % len(_COLOURS)], linewidth=0.5, alpha=0.8)
        hit = np.flatnonzero(diverging.any(0))
        axis.plot(hit, np.full(len(hit), values.min()), "|", color="black", markersize=8)
        axis.set_ylabel(label, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.005)
    axes[-1].set_xlabel("draw")
    figure.suptitle(f"{len(diverging)} chains; {int(diverging.sum())} divergences (black marks)")
    return figure


def plot_margin_bands(margin: Array, log_abs_det: Array) -> Figure:
    """Posterior of margin and log-determinant along one sequence.

    Args:
        margin: smallest singular value of J_i, (S, T).
        log_abs_det: log|det J_i|, (S, T).
    """
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True)
    named = ((r"$\sigma_{\min}(J_i)$", margin), (r"$\log|\det J_i|$", log_abs_det))
    for axis, colour, (label, values) in zip(axes, _COLOURS, named, strict=False):
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
    axes[0].axhline(0, color="black", linewidth=0.8, linestyle="--", label="degeneracy boundary")
    axes[0].legend(fontsize=8, ncols=4)
    axes[1].set_xlabel("token")
    figure.suptitle("Posterior along the first sequence")
    return figure


def plot_comparison(differences: Mapping[str, tuple[float, float]]) -> Figure:
    """Models by how much worse they predict a sequence that was left out, with one and two standard errors.

    Args:
        differences: by name, the difference of elpd to the best model and its standard error.
    """
    figure = Figure(figsize=(7, 0.5 * len(differences) + 1.3), layout="constrained")
    axis = figure.subplots()
    rows = np.arange(len(differences))[::-1]
    for row, (difference, error) in zip(rows, differences.values(), strict=True):
        for width, thickness in ((2, 1.2), (1, 3.5)):
            ends = (difference - width * error, difference + width * error)
            axis.plot(ends, (row, row), color=_COLOURS[0], linewidth=thickness, solid_capstyle="butt")
        axis.plot(difference, row, "o", color=_COLOURS[0])
    axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axis.set_yticks(rows, list(differences))
    axis.set_ylim(-0.6, len(differences) - 0.4)
    axis.set_xlabel("elpd behind the best model (nats, all sequences; bars: one and two standard errors)")
    axis.grid(alpha=0.25, axis="x")
    return figure


def plot_rank_bands(ranks: Mapping[str, Mapping[str, Array]], band: tuple[Array, Array, Array], level: float) -> Figure:
    """Simulation-based calibration: the ECDF of normalised ranks minus the uniform one, with its simultaneous band.

    Args:
        ranks: by method and quantity, numbers in (0, 1), (replicates,) each.
        band: points in [0, 1], lower and upper end of the ECDF there, (K,) each.
        level: probability that a calibrated ECDF stays within the band.
    """
    columns = min(4, len(ranks))
    rows = -(-len(ranks) // columns)
    figure = Figure(figsize=(3.6 * columns + 1.6, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    points, low, high = band
    for axis in axes[len(ranks) :]:
        axis.set_axis_off()
    for axis, (method, quantities) in zip(axes, ranks.items(), strict=False):
        axis.fill_between(points, low - points, high - points, color="0.85", label=f"{100 * level:.3g} % band")
        for k, (label, values) in enumerate(quantities.items()):
            ecdf = np.searchsorted(np.sort(values), points, side="right") / len(values)
            style: dict[str, Any] = {"color": _COLOURS[k % len(_COLOURS)], "linewidth": 1.2}
            style["linestyle"] = "-" if k < len(_COLOURS) else "--"
            axis.plot(points, ecdf - points, label=label.replace("_", " "), **style)
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("normalised rank")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("ECDF of ranks - uniform")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right upper")
    return figure


def plot_recovery(
    levels: Array,
    coverage: Mapping[str, Array],
    band: tuple[Array, Array],
    sizes: Sequence[int],
    errors: Mapping[str, Sequence[float]],
) -> Figure:
    """Coverage of central intervals against their level, and the error of the posterior mean against the data.

    Args:
        levels: nominal levels, (K,).
        coverage: by arm, share of the truths held, (K,) each.
        band: what chance alone leaves around the diagonal, low and high, (K,) each.
        sizes: numbers of sequences.
        errors: by posterior, root mean square error of the mean at each size.
    """
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.fill_between(levels, np.maximum(band[0], 0), np.minimum(band[1], 1), color="0.85", label="chance alone")
    left.plot((0, 1), (0, 1), color="black", linewidth=0.8)
    for k, (label, values) in enumerate(coverage.items()):
        left.plot(levels, values, color=_COLOURS[k], marker="o", markersize=3, label=label)
    left.set_xlabel("level of the interval")
    left.set_ylabel("share that holds the truth")
    left.set_aspect("equal")
    for k, (label, numbers) in enumerate(errors.items()):
        right.loglog(sizes, numbers, color=_COLOURS[k], marker="o", label=label)
    first = next(iter(errors.values()))[0]
    slope = first * (np.asarray(sizes, dtype=float) / sizes[0]) ** -0.5
    right.loglog(sizes, slope, color="grey", linestyle=":", label="1 / sqrt(N)")
    right.set_xticks(list(sizes), [str(size) for size in sizes])
    right.minorticks_off()
    right.set_xlabel("sequences N")
    right.set_ylabel("error of the posterior mean of A (rms)")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


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
    for colour, (length, values) in zip(_COLOURS, curves.items(), strict=False):
        left.plot(spreads, values, "o", markersize=4, color=colour, label=f"n = {length}")
    left.axhline(expected, color="grey", linestyle="--", linewidth=1)
    left.annotate("4/27", (0.01, expected), xytext=(0, 3), textcoords="offset points", fontsize=9)
    left.set_xlabel("spread of the past, aV")
    left.set_ylabel("noise that keeps it, aσ²")
    left.legend(fontsize=8)
    bars: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "capsize": 2}
    for k, (label, (lengths, values, error)) in enumerate(critical.items()):
        right.errorbar(1 / lengths + 0.0004 * k, values, 1.96 * error, color=_COLOURS[k], label=label, **bars)
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
    axis.loglog(slopes, np.where(excess > 0, excess, np.nan), color=_COLOURS[0])
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
            colour = _COLOURS[k % len(_COLOURS)]
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
    axis.plot(angles, exact, color=_COLOURS[0], label="2 (1 + cos θ) / (1 + 2 cos θ)³")
    ends = np.isfinite(measured)
    axis.plot(measured_angles[ends], measured[ends], "o", color=_COLOURS[1], label="end of the branch, by continuation")
    axis.axvspan(120, 180, color=_COLOURS[2], alpha=0.15, label="stationary at every noise")
    axis.set_yscale("log")
    axis.set_xlim(0, 180)
    axis.set_xlabel("angle between a token and what it attends to, θ in degrees")
    axis.set_ylabel("largest noise with a stationary spread, |λ|σ²")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def _visible(character: str) -> str:
    """A character as a tick label: white space by a sign, and the dollar sign kept from matplotlib's mathematics."""
    return {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "$": r"\$"}.get(character, character)
