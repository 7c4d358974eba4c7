"""Measured numbers beside published ones: the sign change, the selective scale, and the growth of Jacobians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS, ERROR_BARS, Array, finish, panels

__all__ = ["plot_published"]

_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹"  # dimensions of one digit
_PARTS = (("all tokens", "-", "o"), ("first token held fixed", "--", "s"), ("diagonal block", ":", "^"))


def plot_published(
    places: Mapping[int, float],
    forms: Mapping[int, tuple[float, float]],
    scales: Mapping[int, tuple[Array, Array]],
    growth: Mapping[int, tuple[Array, Array, Array, Array]],
    *,
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw the sign change of det J, the scale of selectivity and the growth of Jacobians against the length.

    Args:
        places: measured place of the sign change over gamma_c, by length n.
        forms: its finite-n form and the leading order, by length n.
        scales: lengths (K,) and beta* ``(draws, K)``, by dimension d.
        growth: lengths (K,) and norms ``(texts, K)`` of the whole Jacobian, of it with the first token held fixed, and
            of the diagonal blocks, by layer; empty leaves the panel out.
        axes: three panels, two without growth.

    Returns:
        The figure.

    Raises:
        InputError: a wrong number of axes.

    Example:
        >>> n = np.array([10.0, 100.0])
        >>> figure = plot_published({16: 0.63}, {16: (0.63, 0.632)}, {3: (n, np.stack([n, 2 * n]))}, {})
        >>> [axis.get_ylabel() for axis in figure.axes]
        ['sign change of det J, γ / γ_c', 'scale of selectivity, β*']
    """
    count = 3 if growth else 2
    figure, drawn = panels(axes, count, (4.6 * count, 4.2))
    lengths = np.array(sorted(places))
    drawn[0].plot(lengths, [forms[n][0] for n in lengths], color="black", linewidth=1, label="finite n, derived here")
    drawn[0].plot(lengths, [forms[n][1] for n in lengths], "--", color="grey", label="1 − log log n / log n")
    drawn[0].plot(lengths, [places[n] for n in lengths], "o", color=COLOURS[0], label="measured")
    drawn[0].set_xscale("log", base=2)
    finish(drawn[0], "tokens n", "sign change of det J, γ / γ_c", legend=True)
    for colour, (dim, (n, values)) in zip(COLOURS, scales.items(), strict=False):
        middle, spread = np.log(values).mean(0), np.log(values).std(0) / np.sqrt(len(values))
        bars = np.exp(middle) * (np.exp(1.96 * spread) - 1)
        drawn[1].errorbar(n, np.exp(middle), bars, color=colour, label=f"sphere of R{_SUPERSCRIPTS[dim]}", **ERROR_BARS)
        line = np.exp(middle.mean()) * (n / np.exp(np.log(n).mean())) ** (2 / (dim - 1))
        drawn[1].plot(n, line, color=colour, linewidth=1, label=f"slope {2 / (dim - 1):g}")
    drawn[1].set_xscale("log", base=2)
    drawn[1].set_yscale("log")
    finish(drawn[1], "keys n", "scale of selectivity, β*", legend=True)
    if growth:
        _draw_growth(drawn[2], growth)
    return figure


def _draw_growth(axis: Axes, growth: Mapping[int, tuple[Array, Array, Array, Array]]) -> None:
    for colour, (layer, (n, *norms)) in zip(COLOURS, growth.items(), strict=False):
        for (words, line, marker), values in zip(_PARTS, norms, strict=True):
            middle = np.exp(np.log(values).mean(0))
            label = f"layer {layer}" if words == _PARTS[0][0] else None
            axis.plot(n, middle, line, marker=marker, markersize=3, color=colour, label=label)
    for words, line, marker in _PARTS:
        axis.plot([], [], line, marker=marker, markersize=3, color="grey", label=words)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    finish(axis, "tokens n", "norm of the Jacobian")
    # Between the blocks and the whole, where no curve runs.
    axis.legend(fontsize=7, ncols=2, loc="lower left", bbox_to_anchor=(0.0, 0.2))
