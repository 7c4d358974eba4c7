"""What the figures share: colours, the kind of array, panels to draw on, characters as labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from probattn.errors import InputError

__all__ = ["COLOURS", "STYLES", "Array", "headline", "outside_legend", "panel", "panels", "visible"]

Array = NDArray[np.float64]

# Okabe and Ito's palette, told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Colour and line of many curves: where the colours begin again, the line changes.
STYLES = tuple((colour, line) for line in ("-", "--", ":", "-.") for colour in COLOURS)


def panels(
    axes: Sequence[Axes] | None, count: int, figsize: tuple[float, float], columns: int = 1, **grid: Any
) -> tuple[Figure, list[Axes]]:
    """The panels to draw on: the caller's, or those of a new figure, row by row.

    Args:
        axes: the caller's, exactly ``count``; None for a new figure, which no one else holds and no window shows.
        count: panels needed. A grid that is larger leaves its last places empty.
        figsize: inches, of a new figure.
        columns: of a new figure.
        grid: what ``Figure.subplots`` takes besides, as ``sharex``.

    Returns:
        The figure (that of the first panel), and the panels.

    Raises:
        InputError: nothing to draw, or the caller's axes are not as many as needed.

    Example:
        >>> figure, drawn = panels(None, 3, (4, 3), columns=2)
        >>> len(drawn), len(figure.axes)
        (3, 4)
    """
    if count < 1:
        raise InputError("there is nothing to draw: the data hold no panel; give at least one.")
    if axes is None:
        figure = Figure(figsize=figsize, layout="constrained")
        made = figure.subplots(-(-count // columns), columns, squeeze=False, **grid).ravel().tolist()
        for empty in made[count:]:
            empty.set_axis_off()
        return figure, made[:count]
    drawn = list(axes)
    if len(drawn) != count or not all(isinstance(axis, Axes) for axis in drawn):
        raise InputError(f"axes must be a flat sequence of {count} matplotlib axes, one a panel; it has {len(drawn)}.")
    # Twice, since the axes of a subfigure name that; its own figure is the whole.
    return drawn[0].figure.figure, drawn


def panel(ax: Axes | None, figsize: tuple[float, float]) -> tuple[Figure, Axes]:
    """One panel: the caller's, or that of a new figure.

    Args:
        ax: the caller's; None for a new figure.
        figsize: inches, of a new figure.

    Returns:
        Its figure, and the panel.

    Raises:
        InputError: ``ax`` is not a matplotlib axes.

    Example:
        >>> figure, axis = panel(None, (4, 3))
        >>> panel(axis, (9, 9))[0] is figure
        True
    """
    figure, (axis,) = panels(None if ax is None else (ax,), 1, figsize)
    return figure, axis


def headline(axes: Sequence[Axes] | None, figure: Figure, drawn: Sequence[Axes], title: str) -> None:
    """Put a title over all panels; on the caller's axes, whose figure is not ours to write on, over the first.

    Args:
        axes: what the caller gave.
        figure: as :func:`panels` returns it.
        drawn: as :func:`panels` returns them.
        title: the words.

    Example:
        >>> figure, drawn = panels(None, 2, (4, 3))
        >>> headline(None, figure, drawn, "both")
        >>> figure.get_suptitle()
        'both'
    """
    if axes is None:
        figure.suptitle(title)
    else:
        drawn[0].set_title(title, fontsize=10)


def outside_legend(
    axes: Sequence[Axes] | None, figure: Figure, first: Axes, where: str, fontsize: float, columns: int = 1
) -> None:
    """Put the first panel's legend beside the panels; on the caller's axes, into that panel.

    Args:
        axes: what the caller gave.
        figure: as :func:`panels` returns it.
        first: the panel whose labels are shown.
        where: the side, as "upper center".
        fontsize: in points.
        columns: of the legend beside the panels.

    Example:
        >>> figure, (axis,) = panels(None, 1, (4, 3))
        >>> _ = axis.plot([0, 1], label="line")
        >>> outside_legend(None, figure, axis, "upper center", 8)
        >>> len(figure.legends)
        1
    """
    if axes is None:
        handles = first.get_legend_handles_labels()
        figure.legend(*handles, fontsize=fontsize, ncols=columns, loc=f"outside {where}")
    else:
        first.legend(fontsize=fontsize)


def visible(character: str) -> str:
    r"""A character as a tick label: white space by a sign, and the dollar sign kept from matplotlib's mathematics.

    Args:
        character: one.

    Returns:
        What to write.

    Example:
        >>> visible("a"), visible(" "), visible("\n")
        ('a', '␣', '↵')
    """
    return {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "$": r"\$"}.get(character, character)
