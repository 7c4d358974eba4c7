"""Language models: what their next-token law is sensitive to, and how long their strings live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, Array, outside_legend, panels

__all__ = ["plot_sensitivity", "plot_survival"]


def plot_sensitivity(
    predictors: Sequence[str],
    correlations: Mapping[str, tuple[Array, Array, Array]],
    margin: Array,
    sensitivity: Array,
    entropy: Array,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Rank correlations of predictors with sensitivity to noise, and one such pair itself, split by entropy.

    Args:
        predictors: labels, P of them, from top to bottom.
        correlations: by noise, the correlations and the ends of their intervals, (P,) each.
        margin: singular-value margin at each step, of any shape.
        sensitivity: KL divergence there in nats, of the same shape; below 1e-12 it is drawn at 1e-12.
        entropy: of the next-token law there, of the same shape.
        axes: for the correlations, and for the pair.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> found = (np.array([0.1]), np.array([0.0]), np.array([0.2]))
        >>> steps = np.array([0.2, 0.5, 0.9])
        >>> figure = plot_sensitivity(["margin"], {"small noise": found}, steps, steps, steps)
        >>> figure.axes[1].get_yscale()
        'log'
    """
    figure, drawn = panels(axes, 2, (11.5, 4.8), columns=2, width_ratios=(1.25, 1))
    left, right = drawn
    blue, red, green, orange = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[4]
    rows = np.arange(len(predictors))[::-1]
    styles = cycle(((blue, "o"), (green, "s"), (red, "^"), (orange, "D")))
    for k, ((noise, (centre, low, high)), (colour, marker)) in enumerate(
        zip(correlations.items(), styles, strict=False)
    ):
        height = rows + 0.18 * ((len(correlations) - 1) / 2 - k)
        left.hlines(height, low, high, color=colour, linewidth=1.4)
        left.plot(centre, height, marker, color=colour, markersize=4, label=noise)
    left.axvline(0, color="black", linewidth=0.8, linestyle="--")
    left.set_yticks(rows, list(predictors))
    left.set_xlim(-1.05, 1.05)
    left.set_xlabel("Spearman's ρ with sensitivity (bars: 95 %, windows resampled)")
    outside_legend(axes, figure, left, "upper center", fontsize=8, columns=4)

    ranked = np.sort(entropy, axis=None)
    sharp = entropy < ranked[(ranked.size - 1) // 2]  # the lower of two medians
    for chosen, colour, marker, label in ((sharp, blue, "o", "below"), (~sharp, red, "^", "above")):
        points = margin[chosen], np.maximum(sensitivity[chosen], 1e-12)
        right.plot(*points, marker, color=colour, markersize=3, alpha=0.6, label=f"entropy {label} its median")
    right.set_yscale("log")
    right.set_xlabel("singular-value margin σ_min(J_i)")
    right.set_ylabel("sensitivity: KL (nats), noise on all embeddings")
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.grid(alpha=0.25)
    return figure


def plot_survival(
    survival: Array,
    error: Array,
    lengths: Array,
    control: Array,
    end: Array,
    log_floor: float = -np.inf,
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Survival of strings by two estimators beside a control, and the probabilities of the end above their floor.

    Args:
        survival: S(1)..S(N) with the end integrated out, (N,).
        error: its standard errors, (N,).
        lengths: of strings drawn directly, (M,); N or more where one was given up. Steps that none reached are
            left out.
        control: S of a model that is not tight, (N,).
        end: probabilities of the end seen along the paths, of any shape; zero is drawn at 1e-300.
        log_floor: logarithm of the proved floor under them; -inf, which is not drawn, where none is proved.
        axes: for survival, and for the probabilities.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> half = 0.5 ** np.arange(1, 4)
        >>> figure = plot_survival(half, 0 * half, np.array([0, 1, 3]), half, np.full(6, 0.5), np.log(0.1))
        >>> len(figure.axes)
        2
    """
    figure, drawn = panels(axes, 2, (11, 4.2), columns=2)
    left, right = drawn
    steps = np.arange(1, len(survival) + 1)
    direct = (lengths[:, None] >= steps).mean(0)
    spread = np.sqrt(direct * (1 - direct) / len(lengths))
    lowest = max(float(survival[-1]), 1e-12) / 3
    left.fill_between(
        steps, np.maximum(survival - 2 * error, lowest), survival + 2 * error, color=COLOURS[0], alpha=0.25
    )
    left.plot(steps, survival, color=COLOURS[0], label="the end integrated out, ± 2 standard errors")
    seen = direct > 0
    bars: dict[str, Any] = {"color": COLOURS[1], "fmt": "o", "markersize": 3, "linewidth": 0.8}
    low = np.minimum(2 * spread, 0.9 * direct)  # so that the bar has an end on a logarithmic axis
    left.errorbar(steps[seen], direct[seen], yerr=(low[seen], 2 * spread[seen]), label="strings drawn directly", **bars)
    left.plot(steps, control, color=COLOURS[2], linestyle="--", label="control: end with 1/(t + 1)²")
    left.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    left.set_yscale("log")
    left.set_ylim(bottom=lowest)
    left.set_xlabel("characters n")
    left.set_ylabel("probability that a string reaches n")
    right.hist(
        np.log10(np.maximum(end, 1e-300)).ravel(), bins=60, color=COLOURS[0], alpha=0.7, label="seen along the paths"
    )
    if np.isfinite(log_floor):
        right.axvline(log_floor / np.log(10), color=COLOURS[4], linewidth=2, label="proved floor δ, in every context")
    right.set_yscale("log")
    right.set_xlabel("log₁₀ of the probability of the end")
    right.set_ylabel("positions")
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure
