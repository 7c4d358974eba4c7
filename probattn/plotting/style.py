"""Elements that all figures share: colours, panels, the dress of a panel, legends, characters as labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from probattn.errors import InputError

__all__ = [
    "COLOURS",
    "ERROR_BARS",
    "STYLES",
    "Array",
    "finish",
    "headline",
    "label_rows",
    "outside_legend",
    "panel",
    "panels",
    "visible",
    "words",
]

Array = NDArray[np.float64]

# Okabe and Ito's palette, told apart by every kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# Colour and line of many curves: where the colours begin again, the line changes.
STYLES = tuple((colour, line) for line in ("-", "--", ":", "-.") for colour in COLOURS)

# Points with bars and no line between them.
ERROR_BARS: Mapping[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 4, "capsize": 2}

_SMALL = 8  # points: legends and the ticks of small panels


def panels(
    axes: Sequence[Axes] | None,
    count: int,
    figsize: tuple[float, float],
    columns: int | None = None,
    **grid: Any,
) -> tuple[Figure, list[Axes]]:
    """Return the panels to draw on: the caller's, or those of a new figure, row by row.

    Args:
        axes: axes of the caller, exactly ``count``; None for a new figure, known to no window.
        count: number of panels needed. A grid that is larger leaves its last places empty.
        figsize: width and height in inches of a new figure.
        columns: number of columns of a new figure; None for one row.
        grid: other options of ``Figure.subplots``, such as ``sharex``.

    Returns:
        The figure of the first panel, and the panels.

    Raises:
        InputError: nothing to draw, or a wrong number of axes.

    Example:
        >>> figure, drawn = panels(None, 3, (4, 3), columns=2)
        >>> len(drawn), len(figure.axes)
        (3, 4)
    """
    if count < 1:
        raise InputError("there is nothing to draw: the data hold no panel; give at least one.")
    if axes is None:
        columns = columns or count
        figure = Figure(figsize=figsize, layout="constrained")
        made = figure.subplots(-(-count // columns), columns, squeeze=False, **grid).ravel().tolist()
        for empty in made[count:]:
            empty.set_axis_off()
        return figure, made[:count]
    drawn = list(axes)
    if len(drawn) != count or not all(isinstance(axis, Axes) for axis in drawn):
        raise InputError(
            f"axes must be a flat sequence of {count} matplotlib axes, one per panel; it has {len(drawn)}."
        )
    # Twice, since the axes of a subfigure name that; its own figure is the whole.
    return drawn[0].figure.figure, drawn


def panel(ax: Axes | None, figsize: tuple[float, float]) -> tuple[Figure, Axes]:
    """Return one panel to draw on: the caller's, or that of a new figure.

    Args:
        ax: axes of the caller; None for a new figure.
        figsize: width and height in inches of a new figure.

    Returns:
        The figure, and the panel.

    Raises:
        InputError: ``ax`` is not a matplotlib axes.

    Example:
        >>> figure, axis = panel(None, (4, 3))
        >>> panel(axis, (9, 9))[0] is figure
        True
    """
    figure, (axis,) = panels(None if ax is None else (ax,), 1, figsize)
    return figure, axis


def finish(axis: Axes, xlabel: str = "", ylabel: str = "", title: str = "", *, legend: bool = False) -> None:
    """Give a panel its words, its grid and its legend, in the sizes that all figures share.

    Args:
        axis: panel.
        xlabel: words under the horizontal axis; empty leaves them as they are.
        ylabel: words beside the vertical axis; empty leaves them as they are.
        title: words over the panel; empty leaves them as they are.
        legend: True draws a legend into the panel.

    Example:
        >>> _, axis = panel(None, (4, 3))
        >>> finish(axis, "step", "loss (nats)")
        >>> axis.get_xlabel(), axis.get_ylabel()
        ('step', 'loss (nats)')
    """
    if xlabel:
        axis.set_xlabel(xlabel)
    if ylabel:
        axis.set_ylabel(ylabel)
    if title:
        axis.set_title(title, fontsize=10)
    if legend:
        axis.legend(fontsize=_SMALL)
    axis.grid(alpha=0.25)


def label_rows(axis: Axes, names: Sequence[str], *, shown: bool = True) -> NDArray[np.intp]:
    """Prepare a panel for one row per name, the first on top.

    Args:
        axis: panel.
        names: names of the rows, written by :func:`words`.
        shown: False leaves the names out, for a panel right of one that shows them.

    Returns:
        Heights of the rows, (R,).

    Example:
        >>> _, axis = panel(None, (4, 3))
        >>> label_rows(axis, ["first", "second"]).tolist()
        [1, 0]
    """
    rows = np.arange(len(names))[::-1]
    axis.set_yticks(rows, [words(name) for name in names], fontsize=9)
    axis.tick_params(axis="y", labelleft=shown)
    axis.set_ylim(-0.6, len(names) - 0.4)
    return rows


def headline(axes: Sequence[Axes] | None, figure: Figure, drawn: Sequence[Axes], title: str) -> None:
    """Put a title over all panels; on the caller's axes, whose figure is not ours to write on, over the first.

    Args:
        axes: axes of the caller, or None.
        figure: figure as :func:`panels` returns it.
        drawn: panels as :func:`panels` returns them.
        title: words of the title.

    Example:
        >>> figure, drawn = panels(None, 2, (4, 3))
        >>> headline(None, figure, drawn, "both")
        >>> figure.get_suptitle()
        'both'
    """
    if axes is None:
        figure.suptitle(title, fontsize=11)
    else:
        drawn[0].set_title(title, fontsize=10)


def outside_legend(
    axes: Sequence[Axes] | None, figure: Figure, first: Axes, where: str = "right upper", *, columns: int = 1
) -> None:
    """Put the legend of the first panel beside the panels; on the caller's axes, into that panel.

    Args:
        axes: axes of the caller, or None.
        figure: figure as :func:`panels` returns it.
        first: panel whose labels are shown.
        where: side of the figure, such as "upper center".
        columns: number of columns of a legend beside the panels.

    Example:
        >>> figure, (axis,) = panels(None, 1, (4, 3))
        >>> _ = axis.plot([0, 1], label="line")
        >>> outside_legend(None, figure, axis)
        >>> len(figure.legends)
        1
    """
    if axes is None:
        handles = first.get_legend_handles_labels()
        figure.legend(*handles, fontsize=_SMALL, ncols=columns, loc=f"outside {where}")
    else:
        first.legend(fontsize=_SMALL)


def visible(character: str) -> str:
    r"""Return a character as a tick label: white space as a sign, and the dollar sign kept from mathematics.

    Args:
        character: one character.

    Returns:
        Text of the label.

    Example:
        >>> visible("a"), visible(" "), visible("\n")
        ('a', '␣', '↵')
    """
    return {" ": "\u2423", "\n": "\u21b5", "\t": "\u21e5", "$": r"\$"}.get(character, character)


_WORDS = {
    "abs": "absolute",
    "kl": "KL divergence",
    "log10": "log\u2081\u2080 of the",
    "logabsdet": "log|det J|",
    "logdet": "log-determinant",
    "max": "largest",
    "nuts": "NUTS",
    "p1": "in one dimension",
    "p2": "in two dimensions",
    "rho": "rank correlation",
    "svi": "SVI",
}
_PHRASES = {"one_sided": "one-sided", "singular_value": "singular value", "full_rank": "full-rank"}


def words(name: str) -> str:
    """Return a name as words: spaces for underscores, and no abbreviations.

    Args:
        name: name of a kind, a quantity or an arm.

    Returns:
        Text of the label.

    Example:
        >>> words("singular_value"), words("max_logdet_error"), words("one_sided")
        ('singular value', 'largest log-determinant error', 'one-sided')
    """
    for phrase, told in _PHRASES.items():
        name = name.replace(phrase, told)
    return " ".join(_WORDS.get(part, part) for part in name.split("_"))
