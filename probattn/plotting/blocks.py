"""Margins, barriers and masses of single next-token distributions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, ERROR_BARS, Array, finish, label_rows, panel, panels, visible, words

__all__ = ["plot_barriers", "plot_bounds", "plot_conditional", "plot_margins", "plot_mass", "plot_masses"]


def plot_margins(
    margins: Mapping[str, Array],
    characters: Sequence[str],
    support: Sequence[int],
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw margins along one sequence, one panel per kind, with the support tokens circled.

    A panel whose margins are all positive and span more than a factor of 100 has a logarithmic axis.

    Args:
        margins: margins by kind, (T,) each; NaN and infinity leave a gap.
        characters: labels of the positions, T of them.
        support: positions to circle.
        axes: one panel per kind, from top to bottom; the characters are written under the last.

    Returns:
        The figure.

    Raises:
        InputError: no margins, or a wrong number of axes.

    Example:
        >>> figure = plot_margins({"determinant": np.array([1.0, 1.0, 0.2])}, "cat", [2])
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['c', 'a', 't']
    """
    figure, drawn = panels(axes, len(margins), (11, 1.9 * len(margins)), columns=1, sharex=True)
    positions = np.arange(len(characters))
    chosen = np.asarray(support, dtype=int)
    for axis, colour, (kind, values) in zip(drawn, cycle(COLOURS), margins.items(), strict=False):
        axis.plot(positions, values, color=colour, marker="o", markersize=2.5, linewidth=1)
        axis.plot(chosen, values[chosen], "o", color="black", markersize=7, fillstyle="none", label="support tokens")
        finish(axis, ylabel=words(kind))
        axis.margins(x=0.01)
        axis.ticklabel_format(axis="y", useOffset=False, style="plain")
        positive = values[np.isfinite(values)]
        if positive.size and positive.min() > 0 and positive.max() / positive.min() > 100:
            axis.set_yscale("log")
    finish(drawn[0], legend=True)
    labels = [visible(character) for character in characters]
    drawn[-1].set_xticks(positions, labels, fontfamily="monospace", fontsize=8)
    drawn[-1].set_xlabel("character")
    return figure


def plot_bounds(measured: Mapping[str, float], bound: Mapping[str, float], *, ax: Axes | None = None) -> Figure:
    """Draw measured values against the largest that they may take, on a logarithmic axis.

    Args:
        measured: values by name; zero and negative ones are drawn at the left end, infinity and NaN at the right.
        bound: bounds by name, those to show; a value beyond its bound, or NaN, is drawn as a red cross.
        ax: panel to draw on; None for a new figure.

    Returns:
        The figure.

    Example:
        >>> figure = plot_bounds({"error": 3e-16}, {"error": 1e-10})
        >>> figure.axes[0].get_xscale()
        'log'
    """
    names = list(bound)
    figure, axis = panel(ax, (7.5, 1.2 + 0.28 * len(names)))
    sizes = [abs(value) for name in names for value in (measured[name], bound[name]) if 0 < abs(value) < np.inf]
    low, high = (min(sizes) / 10, max(sizes) * 10) if sizes else (1e-3, 1.0)
    for row, name in zip(label_rows(axis, names), names, strict=True):
        limit, value = max(bound[name], low), measured[name]
        held = value <= bound[name]
        axis.plot([low, limit], [row, row], color="0.85", linewidth=9, solid_capstyle="butt", zorder=1)
        shown = high if np.isnan(value) else min(max(value, low), high)
        axis.plot(shown, row, "o" if held else "X", color=COLOURS[0 if held else 1], zorder=3, clip_on=False)
    axis.set_xscale("log")
    axis.set_xlim(low / 1.5, high)
    finish(axis, "measured (grey: allowed; cross: beyond; at the left end: zero)")
    return figure


def plot_conditional(contexts: Sequence[Mapping[str, Any]], *, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw the residual map and the next-token density of each context, one column per context.

    Args:
        contexts: mappings with ``title``, the grid ``u`` (G,), ``residual`` e(u), ``density`` N ``|det J|``, ``plain``
            N without the determinant, their integrals ``mass`` and ``plain_mass``, and the ``turning_points`` of e.
        axes: two panels per context: the residual maps from left to right, then the densities.

    Returns:
        The figure.

    Raises:
        InputError: no context, or a wrong number of axes.

    Example:
        >>> u = np.linspace(-1.0, 1.0, 5)
        >>> flat = dict(title="flat", u=u, residual=u, density=u**2, plain=u**2, mass=1.0, plain_mass=1.0)
        >>> figure = plot_conditional([flat | {"turning_points": ()}])
        >>> [axis.get_ylabel() for axis in figure.axes]
        ['residual map e(u)', 'density']
    """
    columns = len(contexts)
    figure, drawn = panels(axes, 2 * columns, (5.5 * columns, 6.2), columns=columns, sharex="col")
    for upper, lower, given in zip(drawn[:columns], drawn[columns:], contexts, strict=True):
        u = given["u"]
        upper.plot(u, given["residual"], color=COLOURS[0])
        upper.plot(u, u, color="grey", linewidth=0.8, linestyle=":", label="e = u")
        for point in given["turning_points"]:
            upper.axvline(point, color=COLOURS[1], linewidth=0.8, linestyle="--")
            lower.axvline(point, color=COLOURS[1], linewidth=0.8, linestyle="--")
        lower.fill_between(u, given["density"], color=COLOURS[0], alpha=0.25)
        lower.plot(u, given["density"], color=COLOURS[0], label=f"with |det J|: mass {given['mass']:.3f}")
        without = f"without: mass {given['plain_mass']:.3f}"
        lower.plot(u, given["plain"], color=COLOURS[1], linestyle="--", label=without)
        # Room for the legend, which would lie over the folds.
        lower.set_ylim(0, 1.35 * lower.get_ylim()[1])
        finish(upper, ylabel="residual map e(u)", title=given["title"], legend=True)
        finish(lower, "next token u", "density", legend=True)
    return figure


def plot_barriers(
    factor: Array,
    boundary: float,
    barriers: Mapping[Any, Array],
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw penalties as the attention is turned up through the degeneracy boundary.

    Args:
        factor: multiples of A, (G,).
        boundary: multiple at which det J = 0.
        barriers: penalties by kind, (G,) each; NaN and infinity leave a gap. Later ones are thinner, for kinds that
            coincide.
        ax: panel to draw on; None for a new figure.

    Returns:
        The figure.

    Example:
        >>> factor = np.array([0.0, 0.5, 1.0])
        >>> figure = plot_barriers(factor, 1.0, {"one_sided": np.array([0.0, 0.69, np.inf])})
        >>> figure.axes[0].get_legend_handles_labels()[1]
        ['one-sided']
    """
    figure, axis = panel(ax, (8, 3.6))
    styles = ("-", "--", ":", "-.", (0, (5, 1, 1, 1)))
    for k, (kind, values) in enumerate(barriers.items()):
        shown = np.where(np.isfinite(values), values, np.nan)
        colour, style, width = COLOURS[k % len(COLOURS)], styles[k % len(styles)], max(1.0, 2.8 - 0.45 * k)
        axis.plot(factor, shown, color=colour, linestyle=style, linewidth=width, label=words(kind))
    axis.axvline(boundary, color="grey", linewidth=0.8)
    axis.annotate("det J = 0", (boundary, axis.get_ylim()[1]), xytext=(4, -12), textcoords="offset points", fontsize=8)
    axis.axhline(0, color="black", linewidth=0.6)
    finish(axis, "multiple of A (negative: the literal barrier has no lower bound)", "penalty (nats)", legend=True)
    return figure


def plot_mass(slopes: Array, masses: Array, critical: float, *, ax: Axes | None = None) -> Figure:
    """Draw the mass Z of the next-token density against the slope a, with the fold at a sup Var = 1.

    Args:
        slopes: slopes a, (G,).
        masses: masses Z, (G,).
        critical: slope at which the first fold appears.
        ax: panel to draw on; None for a new figure.

    Returns:
        The figure.

    Example:
        >>> figure = plot_mass(np.array([0.5, 1.0, 2.0]), np.array([1.0, 1.0, 1.6]), 1.0)
        >>> figure.axes[0].get_legend_handles_labels()[1]
        ['first fold, a = 1.000']
    """
    figure, axis = panel(ax, (6, 3.4))
    axis.plot(slopes, masses, color=COLOURS[0])
    axis.axvline(critical, color=COLOURS[1], linestyle="--", label=f"first fold, a = {critical:.3f}")
    axis.axhline(1, color="black", linewidth=0.6)
    finish(axis, "slope a", "mass Z = mean number of solutions", legend=True)
    return figure


def plot_masses(
    exact: Array,
    estimated: Array,
    error: Array,
    signed: Array,
    signed_error: Array,
    *,
    ax: Axes | None = None,
) -> Figure:
    """Draw estimated masses against exact ones, with the signed masses beside them.

    Args:
        exact: exact masses with the modulus of the determinant, (K,).
        estimated: estimates of the same, (K,).
        error: standard errors of the estimates, (K,).
        signed: estimated masses with the sign of the determinant, whose exact value is one, (K,).
        signed_error: standard errors of the signed masses, (K,).
        ax: panel to draw on; None for a new figure.

    Returns:
        The figure.

    Example:
        >>> two, small = np.array([1.0, 2.0]), np.array([0.1, 0.1])
        >>> figure = plot_masses(two, two, small, np.ones(2), small)
        >>> figure.axes[0].get_xlabel()
        'mean number of solutions, exact'
    """
    figure, axis = panel(ax, (6.4, 4.4))
    high = 1.05 * float(max(exact.max(), (estimated + 2 * error).max()))
    axis.plot([1, high], [1, high], color="grey", linewidth=1, label="equal")
    axis.axhline(1, color="grey", linewidth=1, linestyle="--", label="one")
    axis.errorbar(exact, estimated, 2 * error, color=COLOURS[0], label="with |det J|", **ERROR_BARS)
    axis.errorbar(exact, signed, 2 * signed_error, color=COLOURS[1], label="with det J", **ERROR_BARS)
    finish(axis, "mean number of solutions, exact", "mass by importance sampling (± 2 standard errors)", legend=True)
    return figure
