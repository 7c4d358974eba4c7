"""Training curves of a language model with the barrier."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, finish, panels

__all__ = ["plot_training"]

_CURVES = {
    "objective per character (nats)": "objective",
    "held-out cross-entropy (nats)": "cross_entropy",
    "mean barrier b (nats)": "barrier",
    "smallest singular value of J": "smallest_margin",
    "rms of the embeddings": "embedding_norm",
}


def plot_training(history: Mapping[str, Sequence[float]], *, axes: Sequence[Axes] | None = None) -> Figure:
    """Draw training curves against optimiser steps.

    Args:
        history: ``step``, ``objective``, ``cross_entropy``, ``barrier``, ``smallest_margin`` and ``embedding_norm``,
            one number per evaluation each.
        axes: five panels, in the order of these names.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> names = ("step", "objective", "cross_entropy", "barrier", "smallest_margin", "embedding_norm")
        >>> figure = plot_training({name: [1.0, 2.0] for name in names})
        >>> len(figure.axes)
        5
    """
    figure, drawn = panels(axes, len(_CURVES), (13, 2.7))
    for axis, colour, (title, name) in zip(drawn, COLOURS, _CURVES.items(), strict=False):
        axis.plot(history["step"], history[name], color=colour, marker="o", markersize=2)
        finish(axis, "step", title=title)
        axis.tick_params(labelsize=8)
    return figure
