"""Robustness of trained models: differences between arms, loss against noise, norms and margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, STYLES, Array, finish, label_rows, outside_legend, panels, words

__all__ = ["plot_arm_differences", "plot_loss_curves", "plot_norms_and_margins"]

_BETTER, _WORSE, _OPEN = COLOURS[0], COLOURS[1], "#777777"


def plot_arm_differences(
    arms: Sequence[str],
    families: Mapping[str, tuple[Array, Array, Array]],
    limits: Mapping[str, float] | None = None,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw differences to plain training with their intervals, one panel per family of corruptions.

    Args:
        arms: labels of the arms, from top to bottom.
        families: differences and the two ends of their intervals in bits per character, (A,) each, by title; NaN for
            none. An interval below zero is blue, one above is orange, one that contains zero is grey.
        limits: values to mark beside zero, by title.
        axes: one panel per family, from left to right; the arms are written beside the first.

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
    figure, drawn = panels(axes, len(families), size, sharey=True)
    for axis, (title, (centre, low, high)) in zip(drawn, families.items(), strict=True):
        rows = label_rows(axis, arms, shown=axis is drawn[0])
        colours = np.select([high < 0, low > 0], [_BETTER, _WORSE], _OPEN).tolist()
        axis.hlines(rows, low, high, color=colours, linewidth=1.6)
        axis.scatter(centre, rows, color=colours, s=16, zorder=3)
        axis.axvline(0, color="black", linewidth=0.8)
        if limits is not None and title in limits:
            axis.axvline(limits[title], color=COLOURS[4], linewidth=1, linestyle="--")
        finish(axis, "" if axes is None else "difference (bits per character)", title=words(title))
        axis.tick_params(axis="x", labelsize=8)
    if axes is None:
        limit = "; dashed: limit" if limits else ""
        figure.supxlabel(f"difference in bits per character (95 %; left of zero: better{limit})", fontsize=10)
    return figure


def plot_loss_curves(
    curves: Mapping[str, tuple[Array, Mapping[str, Array]]], *, axes: Sequence[Axes] | None = None
) -> Figure:
    """Draw loss against the strength of a corruption, one panel per family.

    Args:
        curves: levels (L,) and the losses of each arm in bits per character, (L,) each, by family; NaN leaves a gap.
        axes: one panel per family, from left to right.

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
    figure, drawn = panels(axes, len(curves), (4.2 * len(curves), 3.8))
    for axis, (family, (levels, losses)) in zip(drawn, curves.items(), strict=True):
        for k, (arm, values) in enumerate(losses.items()):
            colour, style = STYLES[k % len(STYLES)]
            axis.plot(levels, values, color=colour, linestyle=style, marker="o", markersize=3, label=words(arm))
        finish(axis, f"{words(family)}, level")
    finish(drawn[0], ylabel="held-out loss (bits per character)")
    arms = len(drawn[0].get_legend_handles_labels()[0])
    outside_legend(axes, figure, drawn[0], "upper center", columns=max(1, min(3, arms)))
    return figure


def plot_norms_and_margins(
    paths: Mapping[str, Array],
    margins: Mapping[str, Mapping[str, Array]],
    before: Mapping[str, float] | None = None,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw the growth of the embeddings in training, and the margins of the layers after it.

    Args:
        paths: root mean square of the embeddings at evenly spread steps, by arm.
        margins: rising quantiles by margin and arm, the last but one of them the median, (Q,) each, Q >= 4; a thin
            line joins the outer ones, a thick one the third from the end with the last. Where one exceeds 20 in size,
            the axis is symmetric-logarithmic.
        before: median before training by margin, a dotted line.
        axes: one panel for the embeddings, then one per margin.

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
    size = (10 + 3 * len(margins), 0.3 * len(arms) + 2)
    ratios = (1.6, *(1 for _ in margins))
    figure, (first, *others) = panels(axes, 1 + len(margins), size, width_ratios=ratios)
    for k, (arm, path) in enumerate(paths.items()):
        colour, style = STYLES[k % len(STYLES)]
        first.plot(np.linspace(0, 1, len(path)), path, color=colour, linestyle=style, linewidth=1.2, label=words(arm))
    finish(first, "share of the training", "rms of the embeddings")
    outside_legend(axes, figure, first, "left center")
    for k, (axis, (title, quantiles)) in enumerate(zip(others, margins.items(), strict=True)):
        rows = label_rows(axis, arms, shown=k == 0)
        values = np.array([quantiles[arm] for arm in arms])
        axis.hlines(rows, values[:, 0], values[:, -1], color=COLOURS[k % len(COLOURS)], linewidth=1)
        axis.hlines(rows, values[:, -3], values[:, -1], color=COLOURS[k % len(COLOURS)], linewidth=3)
        axis.scatter(values[:, -2], rows, color="black", s=10, zorder=3)
        if np.abs(values).max() > 20:
            # Determinants run away by powers of ten where nothing stops them, and may be negative.
            axis.set_xscale("symlog", linthresh=2)
            powers = 10.0 ** np.linspace(0, np.log10(np.abs(values).max()), 4)[1:].round()
            ticks = np.unique([0, *powers, *(-powers if values.min() < -20 else ())])
            axis.set_xticks(ticks, [f"{tick:.0e}" if abs(tick) > 1000 else f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
        if before is not None and title in before:
            axis.axvline(before[title], color="black", linewidth=0.8, linestyle=":")
        finish(axis, title=words(title))
        axis.tick_params(axis="x", labelsize=8)
    return figure
