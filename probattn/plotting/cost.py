"""Costs of competitors against size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, finish, panels, words

__all__ = ["plot_cost"]


def plot_cost(curves: Mapping[str, Mapping[str, Sequence[float]]], *, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw the seconds of competitors against several sizes, on logarithmic scales.

    Args:
        curves: by name of the size, a mapping with ``at`` for the sizes measured, and the seconds of each competitor
            by name.
        axes: one panel per size, from left to right.

    Returns:
        The figure.

    Raises:
        InputError: no curve, or a wrong number of axes.

    Example:
        >>> figure = plot_cost({"length T": {"at": [64, 128], "torch": [0.1, 0.3]}})
        >>> figure.axes[0].get_yscale()
        'log'
    """
    figure, drawn = panels(axes, len(curves), (3.8 * len(curves), 3.6), sharey=True)
    for axis, (name, curve) in zip(drawn, curves.items(), strict=True):
        others = [competitor for competitor in curve if competitor != "at"]
        for competitor, colour, marker in zip(others, cycle(COLOURS), cycle("osD^v"), strict=False):
            axis.plot(
                curve["at"], curve[competitor], color=colour, marker=marker, markersize=4, label=words(competitor)
            )
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(list(curve["at"]), [f"{value:g}" for value in curve["at"]])
        finish(axis, words(name))
    finish(drawn[0], ylabel="seconds, forward and backward", legend=True)
    return figure
