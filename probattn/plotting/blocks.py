"""Margins, barriers and masses of single next-token laws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, Array, headline, panel, panels, visible

__all__ = ["plot_barriers", "plot_bounds", "plot_conditional", "plot_margins", "plot_mass", "plot_masses"]


def plot_margins(
    margins: Mapping[str, Array],
    characters: Sequence[str],
    support: Sequence[int],
    *,
    title: str = "Margins along one window of held-out text",
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Margins along one sequence, one panel a kind, with the support tokens marked.

    A panel whose margins are all positive and span more than a factor of 100 has a logarithmic axis.

    Args:
        margins: by kind, (T,) each; NaN and infinity leave a gap.
        characters: what to write under each position, T of them.
        support: positions to mark.
        title: over all panels.
        axes: one panel a kind, from top to bottom; the characters are written under the last.

    Returns:
        The figure.

    Raises:
        InputError: no margins, or a wrong number of axes.

    Example:
        >>> figure = plot_margins({"determinant": np.array([1.0, 1.0, 0.2])}, "cat", [2], title="A word")
        >>> [label.get_text() for label in figure.axes[0].get_xticklabels()]
        ['c', 'a', 't']
    """
    figure, drawn = panels(axes, len(margins), (11, 1.9 * len(margins)), sharex=True)
    positions = np.arange(len(characters))
    chosen = np.asarray(support, dtype=int)
    for axis, colour, (kind, values) in zip(drawn, cycle(COLOURS), margins.items(), strict=False):
        axis.plot(positions, values, color=colour, marker="o", markersize=2.5, linewidth=1)
        axis.plot(chosen, values[chosen], "o", color="black", markersize=7, fillstyle="none", label="support tokens")
        axis.set_ylabel(kind.replace("_", " "))
        axis.margins(x=0.01)
        axis.grid(alpha=0.25)
        axis.ticklabel_format(axis="y", useOffset=False, style="plain")
        positive = values[np.isfinite(values)]
        if positive.size and positive.min() > 0 and positive.max() / positive.min() > 100:
            axis.set_yscale("log")
    drawn[0].legend(loc="best", fontsize=8)
    drawn[-1].set_xticks(
        positions, [visible(character) for character in characters], fontfamily="monospace", fontsize=8
    )
    drawn[-1].set_xlabel("character")
    headline(axes, figure, drawn, title)
    return figure


def plot_bounds(measured: Mapping[str, float], bound: Mapping[str, float], *, ax: Axes | None = None) -> Figure:
    """What was measured against the largest value that it may take, on a logarithmic axis.

    Args:
        measured: by name; zero and what is negative are drawn at the left end, infinity and NaN at the right.
        bound: by name, those to show; what exceeds its bound, or is NaN, is drawn as a red cross.
        ax: where to draw; None for a figure of its own.

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
    for row, name in enumerate(names):
        limit, value = max(bound[name], low), measured[name]
        held = value <= bound[name]
        axis.plot([low, limit], [row, row], color="0.85", linewidth=9, solid_capstyle="butt", zorder=1)
        shown = high if np.isnan(value) else min(max(value, low), high)
        axis.plot(shown, row, "o" if held else "X", color=COLOURS[0 if held else 1], zorder=3, clip_on=False)
    axis.set_xscale("log")
    axis.set_xlim(low / 1.5, high)
    axis.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel("measured (grey: allowed; cross: not; at the left end: zero)")
    axis.grid(alpha=0.25, axis="x")
    return figure


def plot_conditional(laws: Sequence[Mapping[str, Any]], *, axes: Sequence[Axes] | None = None) -> Figure:
    """Residual map and next-token law of one past, one column a past.

    Args:
        laws: each with ``title``, the grid ``u`` (G,), ``residual`` e(u), ``density`` N |det J|, ``plain`` N without
            the determinant, ``mass`` of the density, ``plain_mass``, and ``turning_points``.
        axes: two a past: the residual maps from left to right, then the laws.

    Returns:
        The figure.

    Raises:
        InputError: no past, or a wrong number of axes.

    Example:
        >>> u = np.linspace(-1.0, 1.0, 5)
        >>> law = dict(title="flat", u=u, residual=u, density=u**2, plain=u**2, mass=1.0, plain_mass=1.0)
        >>> figure = plot_conditional([law | {"turning_points": ()}])
        >>> [axis.get_ylabel() for axis in figure.axes]
        ['residual map e(u)', 'density']
    """
    columns = len(laws)
    figure, drawn = panels(axes, 2 * columns, (5.5 * columns, 6.2), columns=max(columns, 1), sharex="col")
    for upper, lower, law in zip(drawn[:columns], drawn[columns:], laws, strict=True):
        u = law["u"]
        upper.plot(u, law["residual"], color=COLOURS[0])
        upper.plot(u, u, color="grey", linewidth=0.8, linestyle=":", label="e = u")
        for point in law["turning_points"]:
            upper.axvline(point, color=COLOURS[1], linewidth=0.8, linestyle="--")
            lower.axvline(point, color=COLOURS[1], linewidth=0.8, linestyle="--")
        upper.set_title(law["title"], fontsize=10)
        upper.set_ylabel("residual map e(u)")
        upper.legend(fontsize=8)
        lower.fill_between(u, law["density"], color=COLOURS[0], alpha=0.25)
        lower.plot(u, law["density"], color=COLOURS[0], label=f"with |det J|: mass {law['mass']:.3f}")
        lower.plot(u, law["plain"], color=COLOURS[1], linestyle="--", label=f"without: mass {law['plain_mass']:.3f}")
        lower.set_xlabel("next token u")
        lower.set_ylabel("density")
        # Room for the legend, which would lie over the folds.
        lower.set_ylim(0, 1.35 * lower.get_ylim()[1])
        lower.legend(fontsize=8, loc="upper right")
        for axis in (upper, lower):
            axis.grid(alpha=0.25)
    return figure


def plot_barriers(
    factor: Array,
    boundary: float,
    barriers: Mapping[Any, Array],
    *,
    title: str = "Past {-1, +1}, token at 0: J = 1 - factor. spectral is +inf beyond the boundary",
    ax: Axes | None = None,
) -> Figure:
    """Penalties as the attention is turned up through the degeneracy boundary.

    Args:
        factor: what A is multiplied by, (G,).
        boundary: the factor at which det J = 0.
        barriers: by kind, (G,) each; NaN and infinity leave a gap. Later ones are thinner, for kinds that coincide.
        title: over the panel.
        ax: where to draw; None for a figure of its own.

    Returns:
        The figure.

    Example:
        >>> factor = np.array([0.0, 0.5, 1.0])
        >>> figure = plot_barriers(factor, 1.0, {"logdet": np.array([0.0, 0.69, np.inf])}, title="Scalar")
        >>> figure.axes[0].get_title()
        'Scalar'
    """
    figure, axis = panel(ax, (8, 3.6))
    styles = ("-", "--", ":", "-.", (0, (5, 1, 1, 1)))
    for k, (kind, values) in enumerate(barriers.items()):
        shown = np.where(np.isfinite(values), values, np.nan)
        colour, style, width = COLOURS[k % len(COLOURS)], styles[k % len(styles)], max(1.0, 2.8 - 0.45 * k)
        axis.plot(factor, shown, color=colour, linestyle=style, linewidth=width, label=kind)
    axis.axvline(boundary, color="grey", linewidth=0.8)
    axis.annotate("det J = 0", (boundary, axis.get_ylim()[1]), xytext=(4, -12), textcoords="offset points", fontsize=8)
    axis.axhline(0, color="black", linewidth=0.6)
    axis.set_xlabel("factor on A (negative: the literal barrier is a reward without lower bound)")
    axis.set_ylabel("penalty (nats)")
    axis.set_title(title, fontsize=10)
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure


def plot_mass(slopes: Array, masses: Array, critical: float, *, ax: Axes | None = None) -> Figure:
    """Mass Z of the next-token law against the slope a, with the fold at a sup Var = 1.

    Args:
        slopes: a, (G,).
        masses: Z, (G,).
        critical: the slope at which the first fold appears.
        ax: where to draw; None for a figure of its own.

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
    axis.set_xlabel("slope a")
    axis.set_ylabel("mass Z = mean number of solutions")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.25)
    return figure


def plot_masses(
    exact: Array,
    estimated: Array,
    error: Array,
    signed: Array,
    signed_error: Array,
    *,
    title: str = "Several dimensions: the mass counts the solutions",
    ax: Axes | None = None,
) -> Figure:
    """Estimated masses against exact ones, the signed masses beside them.

    Args:
        exact: masses with the modulus of the determinant, (K,).
        estimated: the same estimated, (K,).
        error: standard errors, (K,).
        signed: estimated masses with the sign, whose exact value is one, (K,).
        signed_error: standard errors, (K,).
        title: over the panel.
        ax: where to draw; None for a figure of its own.

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
    bars: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "capsize": 2}
    axis.errorbar(exact, estimated, 2 * error, color=COLOURS[0], label="with |det J|", **bars)
    axis.errorbar(exact, signed, 2 * signed_error, color=COLOURS[1], label="with det J", **bars)
    axis.set_xlabel("mean number of solutions, exact")
    axis.set_ylabel("mass, importance sampling (two standard errors)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    axis.set_title(title, fontsize=10)
    return figure
