"""Figures as parts of a page: the whole of each on a wide screen, its panels one below the other on a narrow one."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from probattn.inference.runtime.files import write_figure

__all__ = ["Box", "Picture", "save_figures"]

_DPI = 96.0  # CSS pixels in an inch
_EDGE = 4.0  # pixels around a panel


class Box(NamedTuple):
    """Part of a picture, in CSS pixels from its upper left corner."""

    left: float
    top: float
    width: float
    height: float

    def __str__(self) -> str:
        return f"{self.left:.1f} {self.top:.1f} {self.width:.1f} {self.height:.1f}"


@dataclass(frozen=True)
class Picture:
    """A figure to be shown on a page.

    Attributes:
        uri: the PNG file as a data URI.
        width: width in CSS pixels.
        height: height in CSS pixels.
        parts: titles, legends and columns of panels, from left to right, each of one box, or of two that belong beside
            each other, labels and panel; empty where the figure has one column.
    """

    uri: str
    width: float
    height: float
    parts: tuple[tuple[Box, ...], ...] = ()


def save_figures(figures: Mapping[str, Figure], folder: Path) -> dict[str, Picture]:
    """Write PNG files and return what a page needs to show them.

    Args:
        figures: figures by file name, without suffix.
        folder: folder for the files; it is created if needed.

    Returns:
        Pictures by the same names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        write_figure(path, figure)
        uri = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        width, height = (float(size) * _DPI for size in figure.get_size_inches())
        pictures[name] = Picture(uri, width, height, _parts(figure))
    return pictures


class _Column(NamedTuple):
    """Panels above each other: their frames, what is drawn of them, whether they have labels of their own."""

    frame: Bbox
    extent: Bbox
    labelled: bool


def _parts(figure: Figure) -> tuple[tuple[Box, ...], ...]:
    """Columns of a figure that was drawn, with the titles and legends that belong to all of them in front."""
    columns = _columns([axes for axes in figure.axes if axes.axison and axes.get_visible()])
    if len(columns) < 2:
        return ()
    shared = [legend.get_window_extent() for legend in figure.legends]
    if figure.get_suptitle():
        shared.insert(0, figure._suptitle.get_window_extent())  # type: ignore[attr-defined]  # no public name
    parts: list[tuple[Box, ...]] = [(_box(figure, extent),) for extent in shared]
    labels: _Column | None = None
    for column in columns:
        if column.labelled or labels is None:
            labels = column
            parts.append((_box(figure, column.extent),))
        else:  # the labels of the column that it shares an axis with, and the panel
            low, high = (f(labels.extent, column.extent) for f in (_lowest, _highest))
            strip = Bbox.from_extents(labels.extent.x0, low, labels.frame.x0, high)
            panel = Bbox.from_extents(column.extent.x0, low, column.extent.x1 + _EDGE, high)
            parts.append((_box(figure, strip, edge=0.0), _box(figure, panel, edge=0.0)))
    return tuple(parts)


def _lowest(*boxes: Bbox) -> float:
    return min(float(box.y0) for box in boxes)


def _highest(*boxes: Bbox) -> float:
    return max(float(box.y1) for box in boxes)


def _columns(drawn: Sequence[Axes]) -> list[_Column]:
    """Panels that stand above each other, from left to right; the bar of a colour map stays with its panel."""
    columns: list[_Column] = []
    for axes in sorted(drawn, key=lambda axes: axes.get_window_extent().x0):
        frame, extent = axes.get_window_extent(), axes.get_tightbbox()
        if extent is None:
            continue
        bar = axes.get_label() == "<colorbar>"
        column = _Column(frame, extent, not bar and _has_labels(axes))
        if columns and (bar or frame.x0 < columns[-1].frame.x1 - 1):
            last = columns.pop()
            column = _Column(
                Bbox.union([last.frame, frame]),
                Bbox.union([last.extent, extent]),
                last.labelled or column.labelled,
            )
        columns.append(column)
    return columns


def _has_labels(axes: Axes) -> bool:
    return any(tick.label1.get_visible() and tick.label1.get_text() for tick in axes.yaxis.get_major_ticks())


def _box(figure: Figure, extent: Bbox, edge: float = _EDGE) -> Box:
    scale = _DPI / figure.dpi
    width, height = (float(size) * _DPI for size in figure.get_size_inches())
    left, right = max(0.0, extent.x0 * scale - edge), min(width, extent.x1 * scale + edge)
    bottom, top = max(0.0, extent.y0 * scale - edge), min(height, extent.y1 * scale + edge)
    return Box(left, height - top, right - left, top - bottom)
