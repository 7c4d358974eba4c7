"""Language models layer by layer: margins of tokens, profiles beside controls, profiles in training, predictors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from probattn.plotting.style import COLOURS, STYLES, Array, finish, label_rows, outside_legend, panels, words

__all__ = ["plot_layer_map", "plot_layer_profiles", "plot_predictors", "plot_profiles_in_training"]

Interval = tuple[Array, Array, Array]

_MARKERS = ("o", "s", "^", "D")


def plot_layer_map(
    margins: Mapping[str, Array], centre: Mapping[str, float] | None = None, *, axes: Sequence[Axes] | None = None
) -> Figure:
    """Draw margins of one text as maps, layers from bottom to top and tokens from left to right.

    Args:
        margins: margins by title, (L, T) each; NaN stays empty. The colours span the 1 % to the 99 % quantile.
        centre: value in the middle of a scale of two colours, by title; a map without one has one colour.
        axes: one panel per map, from top to bottom.

    Returns:
        The figure.

    Raises:
        InputError: no map, or a wrong number of axes.

    Example:
        >>> figure = plot_layer_map({"log|det J|": np.array([[0.0, -1.0], [2.0, 1.0]])}, {"log|det J|": 0.0})
        >>> figure.axes[0].get_ylabel()
        'layer'
    """
    figure, drawn = panels(axes, len(margins), (9.5, 2.6 * len(margins) + 0.5), columns=1, sharex=True)
    for axis, (title, values) in zip(drawn, margins.items(), strict=True):
        low, high = np.nanquantile(values, (0.01, 0.99))
        middle = None if centre is None else centre.get(title)
        norm = None
        if middle is not None:
            reach = max(abs(low - middle), abs(high - middle), 1e-12)
            norm = TwoSlopeNorm(middle, middle - reach, middle + reach)
        scale = {"norm": norm, "cmap": "RdBu"} if norm else {"vmin": low, "vmax": high, "cmap": "cividis"}
        image = axis.imshow(values, origin="lower", aspect="auto", interpolation="nearest", **scale)
        bar = axis.inset_axes((1.01, 0.0, 0.015, 1.0))  # within the panel, so that it takes no place of others
        figure.colorbar(image, cax=bar, extend="both")
        axis.set_ylabel("layer")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(words(title), fontsize=10)
    drawn[-1].set_xlabel("token")
    return figure


def plot_layer_profiles(
    layers: Sequence[int],
    profiles: Mapping[str, Mapping[str, Interval]],
    level: Mapping[str, float] | None = None,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw a number per layer for several groups, with intervals, one panel per number.

    Args:
        layers: numbers of the layers, L of them.
        profiles: by title and group: estimate and the two ends of its interval, (L,) each. The first group is drawn
            thickest.
        level: value to mark with a thin line, by title.
        axes: one panel per title, from left to right.

    Returns:
        The figure.

    Raises:
        InputError: no panel, or a wrong number of axes.

    Example:
        >>> one = np.array([0.0, 1.0])
        >>> figure = plot_layer_profiles([0, 1], {"median of log|det J|": {"as trained": (one, one - 1, one + 1)}})
        >>> figure.axes[0].get_xlabel()
        'layer'
    """
    figure, drawn = panels(axes, len(profiles), (5.6 * len(profiles), 4.2))
    names = list(dict.fromkeys(name for groups in profiles.values() for name in groups))
    looks = dict(zip(names, cycle(STYLES), strict=False))
    for axis, (title, groups) in zip(drawn, profiles.items(), strict=True):
        for name, (centre, low, high) in groups.items():
            colour, line = looks[name]
            axis.fill_between(layers, low, high, color=colour, alpha=0.2, linewidth=0)
            width = 2.2 if name == names[0] else 1.2
            axis.plot(layers, centre, line, color=colour, linewidth=width, marker=".", markersize=4, label=words(name))
        if level is not None and title in level:
            axis.axhline(level[title], color="black", linewidth=0.8, linestyle=":")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        finish(axis, "layer", title=words(title))
    outside_legend(axes, figure, max(drawn, key=lambda axis: len(axis.lines)), "lower center", columns=3)
    return figure


def plot_profiles_in_training(
    steps: Sequence[int],
    loss: Array,
    profiles: Mapping[str, Array],
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw the loss and numbers per layer along the training of small models.

    Args:
        steps: numbers of steps, S of them, from 0; drawn on a logarithmic scale of steps plus one.
        loss: held-out loss of each run in nats, (R, S).
        profiles: numbers by title, run, step and layer, (R, S, L) each: thin lines for runs, thick ones for their mean.
        axes: one panel for the loss, and one per title.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> figure = plot_profiles_in_training([0, 10], np.array([[4.0, 2.0]]), {"volume": np.zeros((1, 2, 3))})
        >>> len(figure.axes)
        2
    """
    figure, drawn = panels(axes, 1 + len(profiles), (4.6 * (1 + len(profiles)), 3.8))
    time = np.asarray(steps) + 1
    for run in loss:
        drawn[0].plot(time, run, color=COLOURS[0], linewidth=1, marker=".", markersize=4)
    finish(drawn[0], "steps + 1", "held-out loss (nats per character)")
    for axis, (title, values) in zip(drawn[1:], profiles.items(), strict=True):
        layers = values.shape[-1]
        for layer in range(layers):
            colour, line = STYLES[layer % len(STYLES)]
            for run in values[:, :, layer]:
                axis.plot(time, run, line, color=colour, linewidth=0.6, alpha=0.5)
            axis.plot(time, values[:, :, layer].mean(0), line, color=colour, linewidth=2, label=f"layer {layer}")
        finish(axis, "steps + 1", title=words(title), legend=axis is drawn[-1])
    for axis in drawn:
        axis.set_xscale("log")
    return figure


def plot_predictors(
    groups: Mapping[str, tuple[Sequence[str], Mapping[str, Interval]]],
    label: str,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw correlations of predictors with targets, with intervals, one panel per group of predictors.

    Args:
        groups: by title: names of the predictors, P of them from top to bottom, and for each target the correlations
            and the two ends of their intervals, (P,) each.
        label: words under each panel.
        axes: one panel per group, from left to right.

    Returns:
        The figure.

    Raises:
        InputError: no group, or a wrong number of axes.

    Example:
        >>> found = (np.array([0.1]), np.array([0.0]), np.array([0.2]))
        >>> figure = plot_predictors({"generator": (["mean"], {"divergence": found})}, "correlation")
        >>> figure.axes[0].get_xlabel()
        'correlation'
    """
    most = max((len(names) for names, _ in groups.values()), default=0)
    figure, drawn = panels(axes, len(groups), (4.7 * len(groups), 0.3 * most + 1.6))
    for axis, (title, (names, targets)) in zip(drawn, groups.items(), strict=True):
        rows, middle = label_rows(axis, names), (len(targets) - 1) / 2
        for k, (target, (centre, low, high)) in enumerate(targets.items()):
            height = rows + 0.6 / max(1, len(targets)) * (middle - k)
            colour = COLOURS[k % len(COLOURS)]
            axis.hlines(height, low, high, color=colour, linewidth=1.3)
            axis.plot(centre, height, _MARKERS[k % len(_MARKERS)], color=colour, markersize=3.5, label=words(target))
        axis.axvline(0, color="black", linewidth=0.8, linestyle="--")
        finish(axis, label, title=words(title))
    outside_legend(axes, figure, drawn[0], "upper center", columns=4)
    return figure
