"""Margins, barriers and masses of single next-token laws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, Array, visible

__all__ = ["plot_barriers", "plot_bounds", "plot_conditional", "plot_margins", "plot_mass", "plot_masses"]


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
    for axis, colour, (kind, values) in zip(axes, COLOURS, margins.items(), strict=False):
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
    axes[-1].set_xticks(positions, [visible(character) for character in characters], fontfamily="monospace", fontsize=8)
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
        axis.plot(shown, row, "o" if held else "X", color=COLOURS[0 if held else 1], zorder=2)
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
        upper.plot(u, panel["residual"], color=COLOURS[0])
        upper.plot(u, u, color="grey", linewidth=0.8, linestyle=":", label="e = u")
        for point in panel["turning_points"]:
            upper.axvline(point, color=COLOURS[1], linewidth=0.8, linestyle="--")
            lower.axvline(point, color=COLOURS[1], linewidth=0.8, linestyle="--")
        upper.set_title(panel["title"], fontsize=10)
        upper.set_ylabel("residual map e(u)")
        upper.legend(fontsize=8)
        lower.fill_between(u, panel["density"], color=COLOURS[0], alpha=0.25)
        lower.plot(u, panel["density"], color=COLOURS[0], label=f"with |det J|: mass {panel['mass']:.3f}")
        lower.plot(
            u, panel["plain"], color=COLOURS[1], linestyle="--", label=f"without: mass {panel['plain_mass']:.3f}"
        )
        lower.set_xlabel("next token u")
        lower.set_ylabel("density")
        lower.set_ylim(bottom=0)
        lower.legend(fontsize=8)
        for axis in (upper, lower):
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
    for colour, style, (kind, values) in zip(COLOURS, styles, barriers.items(), strict=False):
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
    axis.plot(slopes, masses, color=COLOURS[0])
    axis.axvline(critical, color=COLOURS[1], linestyle="--", label=f"first fold, a = {critical:.3f}")
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
    axis.errorbar(exact, estimated, 2 * error, color=COLOURS[0], label="with |det J|", **bars)
    axis.errorbar(exact, signed, 2 * signed_error, color=COLOURS[1], label="with det J", **bars)
    axis.set_xlabel("mean number of solutions, exact")
    axis.set_ylabel("mass, importance sampling (two standard errors)")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    axis.set_title("Several dimensions: the mass counts the solutions", fontsize=10)
    return figure
