"""Figures, each a function of arrays that returns a matplotlib ``Figure``; nothing is shown or saved here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

__all__ = ["plot_barriers", "plot_conditional", "plot_margins", "plot_mass", "plot_training"]

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


def _visible(character: str) -> str:
    """A character as a tick label: white space by a sign, and the dollar sign kept from matplotlib's mathematics."""
    return {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "$": r"\$"}.get(character, character)
