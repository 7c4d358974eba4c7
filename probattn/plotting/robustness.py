"""Robustness of trained models: differences between arms, loss against noise, norms and margins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, Array

__all__ = ["plot_arm_differences", "plot_loss_curves", "plot_norms_and_margins"]

_STYLES = tuple((colour, style) for style in ("-", "--", ":", "-.") for colour in COLOURS)


def plot_arm_differences(
    arms: Sequence[str], panels: Mapping[str, tuple[Array, Array, Array]], limits: Mapping[str, float] | None = None
) -> Figure:
    """A forest plot: differences to plain training with their intervals, one panel a family of corruptions.

    Args:
        arms: labels, from top to bottom.
        panels: by title, differences and the ends of their intervals in bits per character, (A,) each; NaN for none.
        limits: by title, a limit to mark beside zero.
    """
    figure = Figure(figsize=(2.6 * len(panels) + 3.2, 0.3 * len(arms) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    rows = np.arange(len(arms))[::-1]
    for axis, (title, (centre, low, high)) in zip(axes, panels.items(), strict=True):
        # Blue where the interval lies below zero, red where above, grey where it holds it.
        colours = np.select([high < 0, low > 0], [COLOURS[0], COLOURS[1]], "#777777").tolist()
        axis.hlines(rows, low, high, color=colours, linewidth=1.6)
        axis.scatter(centre, rows, color=colours, s=16, zorder=3)
        axis.axvline(0, color="black", linewidth=0.8)
        if limits is not None and title in limits:
            axis.axvline(limits[title], color=COLOURS[4], linewidth=1, linestyle="--")
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    axes[0].set_yticks(rows, list(arms))
    figure.supxlabel("difference in bits per character, 95 % intervals; left of zero: better", fontsize=9)
    return figure


def plot_loss_curves(curves: Mapping[str, tuple[Array, Mapping[str, Array]]]) -> Figure:
    """Loss against the strength of a corruption, one panel a family.

    Args:
        curves: by family, levels (L,) and the losses of each arm in bits per character, (L,) each.
    """
    figure = Figure(figsize=(4.2 * len(curves), 3.8), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (family, (levels, losses)) in zip(axes, curves.items(), strict=True):
        for k, (arm, values) in enumerate(losses.items()):
            colour, style = _STYLES[k % len(_STYLES)]
            axis.plot(levels, values, color=colour, linestyle=style, marker="o", markersize=3, label=arm)
        axis.set_xlabel(f"{family}, level")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("held-out loss (bits per character)")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, fontsize=7, ncols=min(4, len(handles[0])), loc="outside upper center")
    return figure


def plot_norms_and_margins(paths: Mapping[str, Array], margins: Mapping[str, Mapping[str, Array]]) -> Figure:
    """How large the embeddings grow in training, and the margins of the heads after it.

    Args:
        paths: root mean square of the embeddings at evenly spread steps, by arm.
        margins: by margin and arm, rising quantiles of which the last but one is the median, (Q,) each, Q >= 4; a thin
            line joins the outer ones, a thick one the third from the end with the last.
    """
    arms = list(paths)
    figure = Figure(figsize=(5 + 4 * len(margins), 0.27 * len(arms) + 2), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(margins), squeeze=False)[0]
    for k, (arm, path) in enumerate(paths.items()):
        colour, style = _STYLES[k % len(_STYLES)]
        first.plot(np.linspace(0, 1, len(path)), path, color=colour, linestyle=style, linewidth=1.2, label=arm)
    first.set_xlabel("part of the training")
    first.set_ylabel("rms of the embeddings")
    first.grid(alpha=0.25)
    figure.legend(*first.get_legend_handles_labels(), fontsize=6, ncols=1, loc="outside left center")
    rows = np.arange(len(arms))[::-1]
    for k, (axis, (title, quantiles)) in enumerate(zip(others, margins.items(), strict=True)):
        values = np.array([quantiles[arm] for arm in arms])
        axis.hlines(rows, values[:, 0], values[:, -1], color=COLOURS[k], linewidth=1)
        axis.hlines(rows, values[:, -3], values[:, -1], color=COLOURS[k], linewidth=3)
        axis.scatter(values[:, -2], rows, color="black", s=10, zorder=3)
        axis.set_title(title, fontsize=9)
        if np.abs(values).max() > 20:
            # Determinants run away by powers of ten where nothing stops them, and may be negative.
            axis.set_xscale("symlog", linthresh=2)
            powers = 10.0 ** np.linspace(0, np.log10(np.abs(values).max()), 4).round()
            ticks = np.unique([0, *powers, *(-powers if values.min() < -20 else ())])
            axis.set_xticks(ticks, [f"{tick:.0e}" if abs(tick) > 100 else f"{tick:g}" for tick in ticks], fontsize=7)
            axis.minorticks_off()
        axis.set_yticks(rows, arms if k == 0 else [""] * len(arms), fontsize=6)
        axis.grid(alpha=0.25)
    return figure
