"""Robustness of trained models: differences between arms, loss against noise, norms and margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, STYLES, Array, outside_legend, panels

__all__ = ["plot_arm_differences", "plot_loss_curves", "plot_norms_and_margins"]


def plot_arm_differences(
    arms: Sequence[str],
    families: Mapping[str, tuple[Array, Array, Array]],
    limits: Mapping[str, float] | None = None,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """A forest plot: differences to plain training with their intervals, one panel a family of corruptions.

    Args:
        arms: labels, from top to bottom.
        families: by title, differences and the ends of their intervals in bits per character, (A,) each; NaN for none.
            An interval below zero is blue, one above is red, one that holds it is grey.
        limits: by title, a limit to mark beside zero.
        axes: one panel a family, from left to right; the arms are written beside the first.

    Returns:
        The figure.

    Raises:
        InputError: no family, or a wrong number of axes.

    Example:
        >>> found = (np.array([-0.02]), np.array([-0.03]), np.array([-0.01]))
        >>> figure = plot_arm_differences(["barrier"], {"clean": found})
        >>> figure.axes[0].get_title()
        'clean'
    """
    size = (2.6 * len(families) + 3.2, 0.3 * len(arms) + 1.4)
    figure, drawn = panels(axes, len(families), size, columns=max(len(families), 1), sharey=True)
    rows = np.arange(len(arms))[::-1]
    for axis, (title, (centre, low, high)) in zip(drawn, families.items(), strict=True):
        colours = np.select([high < 0, low > 0], [COLOURS[0], COLOURS[1]], "#777777").tolist()
        axis.hlines(rows, low, high, color=colours, linewidth=1.6)
        axis.scatter(centre, rows, color=colours, s=16, zorder=3)
        axis.axvline(0, color="black", linewidth=0.8)
        if limits is not None and title in limits:
            axis.axvline(limits[title], color=COLOURS[4], linewidth=1, linestyle="--")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    # The first last: panels that share an axis share its labels.
    for axis in reversed(drawn):
        axis.set_yticks(rows, list(arms) if axis is drawn[0] else [""] * len(arms))
        axis.set_ylim(-0.6, len(arms) - 0.4)
    if axes is None:
        words = "difference in bits per character, 95 % intervals; left of zero: better"
        figure.supxlabel(f"{words}; dashed: the limit" if limits else words, fontsize=9)
    else:
        for axis in drawn:
            axis.set_xlabel("difference (bits per character)", fontsize=8)
    return figure


def plot_loss_curves(
    curves: Mapping[str, tuple[Array, Mapping[str, Array]]], *, axes: Sequence[Axes] | None = None
) -> Figure:
    """Loss against the strength of a corruption, one panel a family.

    Args:
        curves: by family, levels (L,) and the losses of each arm in bits per character, (L,) each; NaN leaves a gap.
        axes: one panel a family, from left to right.

    Returns:
        The figure.

    Raises:
        InputError: no family, or a wrong number of axes.

    Example:
        >>> curve = (np.array([0.0, 0.1]), {"plain": np.array([2.0, 2.4])})
        >>> figure = plot_loss_curves({"noise": curve})
        >>> figure.axes[0].get_xlabel()
        'noise, level'
    """
    figure, drawn = panels(axes, len(curves), (4.2 * len(curves), 3.8), columns=max(len(curves), 1))
    for axis, (family, (levels, losses)) in zip(drawn, curves.items(), strict=True):
        for k, (arm, values) in enumerate(losses.items()):
            colour, style = STYLES[k % len(STYLES)]
            axis.plot(levels, values, color=colour, linestyle=style, marker="o", markersize=3, label=arm)
        axis.set_xlabel(f"{family}, level")
        axis.grid(alpha=0.25)
    drawn[0].set_ylabel("held-out loss (bits per character)")
    arms = len(drawn[0].get_legend_handles_labels()[0])
    outside_legend(axes, figure, drawn[0], "upper center", fontsize=7, columns=max(1, min(4, arms)))
    return figure


def plot_norms_and_margins(
    paths: Mapping[str, Array],
    margins: Mapping[str, Mapping[str, Array]],
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """How large the embeddings grow in training, and the margins of the heads after it.

    Args:
        paths: root mean square of the embeddings at evenly spread steps, by arm.
        margins: by margin and arm, rising quantiles of which the last but one is the median, (Q,) each, Q >= 4; a thin
            line joins the outer ones, a thick one the third from the end with the last. Where one exceeds 20 in size,
            the axis is symmetric-logarithmic.
        axes: for the embeddings, then one panel a margin.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> quantiles = {"plain": np.array([0.1, 0.3, 0.5, 0.9])}
        >>> figure = plot_norms_and_margins({"plain": np.array([1.0, 1.2])}, {"smallest singular value": quantiles})
        >>> len(figure.axes)
        2
    """
    arms = list(paths)
    size = (5 + 4 * len(margins), 0.27 * len(arms) + 2)
    figure, (first, *others) = panels(axes, 1 + len(margins), size, columns=1 + len(margins))
    for k, (arm, path) in enumerate(paths.items()):
        colour, style = STYLES[k % len(STYLES)]
        first.plot(np.linspace(0, 1, len(path)), path, color=colour, linestyle=style, linewidth=1.2, label=arm)
    first.set_xlabel("part of the training")
    first.set_ylabel("rms of the embeddings")
    first.grid(alpha=0.25)
    outside_legend(axes, figure, first, "left center", fontsize=6)
    rows = np.arange(len(arms))[::-1]
    for k, (axis, (title, quantiles)) in enumerate(zip(others, margins.items(), strict=True)):
        values = np.array([quantiles[arm] for arm in arms])
        axis.hlines(rows, values[:, 0], values[:, -1], color=COLOURS[k % len(COLOURS)], linewidth=1)
        axis.hlines(rows, values[:, -3], values[:, -1], color=COLOURS[k % len(COLOURS)], linewidth=3)
        axis.scatter(values[:, -2], rows, color="black", s=10, zorder=3)
        axis.set_title(title, fontsize=9)
        if np.abs(values).max() > 20:
            # Determinants run away by powers of ten where nothing stops them, and may be negative.
            axis.set_xscale("symlog", linthresh=2)
            powers = 10.0 ** np.linspace(0, np.log10(np.abs(values).max()), 4).round()
            ticks = np.unique([0, *powers, *(-powers if values.min() < -20 else ())])
            axis.set_xticks(ticks, [f"{tick:.0e}" if abs(tick) > 1000 else f"{tick:g}" for tick in ticks], fontsize=7)
            axis.minorticks_off()
        axis.set_yticks(rows, arms if k == 0 else [""] * len(arms), fontsize=6)
        axis.grid(alpha=0.25)
    return figure
