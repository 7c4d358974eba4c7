"""Language models: lengths of their strings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, ERROR_BARS, Array, finish, panels

__all__ = ["plot_survival"]


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
    """Draw the survival of strings by two estimators beside a control, and the probabilities of the end.

    Args:
        survival: survival S(1)..S(N) with the end integrated out, (N,).
        error: standard errors of the survival, (N,).
        lengths: lengths of strings drawn directly, (M,); N or more where a string was given up. Their survival is
            drawn at 40 lengths at most, and only where a string reached them.
        control: survival of a model that is not tight, (N,).
        end: probabilities of the end seen along the paths, of any shape; zero is drawn at 1e-300.
        log_floor: logarithm of the proved lower bound of these probabilities; -inf, which is not drawn, without one.
        axes: one panel for the survival, one for the probabilities.

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
    figure, (left, right) = panels(axes, 2, (11, 4.2))
    steps = np.arange(1, len(survival) + 1)
    direct = (lengths[:, None] >= steps).mean(0)
    spread = np.sqrt(direct * (1 - direct) / len(lengths))
    lowest = max(float(survival[-1]), 1e-12) / 3
    below, above = np.maximum(survival - 2 * error, lowest), survival + 2 * error
    left.fill_between(steps, below, above, color=COLOURS[0], alpha=0.25)
    left.plot(steps, survival, color=COLOURS[0], label="the end integrated out, ± 2 standard errors")
    seen = (direct > 0) & (steps % -(-len(steps) // 40) == 0)
    low = np.minimum(2 * spread, 0.9 * direct)  # so that the bar has an end on a logarithmic axis
    bars = (low[seen], 2 * spread[seen])
    left.errorbar(steps[seen], direct[seen], bars, color=COLOURS[1], label="strings drawn directly", **ERROR_BARS)
    left.plot(steps, control, color=COLOURS[2], linestyle="--", label="control: end with 1/(t + 1)²")
    left.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    left.set_yscale("log")
    left.set_ylim(bottom=lowest)
    seen_ends = np.log10(np.maximum(end, 1e-300)).ravel()
    right.hist(seen_ends, bins=60, color=COLOURS[0], alpha=0.7, label="seen along the paths")
    if np.isfinite(log_floor):
        right.axvline(log_floor / np.log(10), color=COLOURS[4], linewidth=2, label="proved floor δ, in every context")
    right.set_yscale("log")
    finish(left, "characters n", "probability that a string reaches n", legend=True)
    finish(right, "log₁₀ of the probability of the end", "positions", legend=True)
    return figure
