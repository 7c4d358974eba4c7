"""One page of the support tokens of a text, which needs nothing else, and the same as plain JSON values."""

from __future__ import annotations

import base64
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
import numpy as np

from probattn.hf.margins import Kind, Map
from probattn.inference.reports.support.measure import MAPS, Reading, variable
from probattn.inference.reports.support.nearest import Nearest, nearest_tokens, smallest
from probattn.inference.reports.support.pieces import shown_text, text_direction
from probattn.inference.reports.support.words import KINDS, MAP_WORDS, sensitivity_words
from probattn.inference.runtime.files import finite_or_null
from probattn.models.checkpoint import Checkpoint

__all__ = ["SupportPage", "support_page"]

_LETTERS = 32  # on either side of a token in the list, in whole units


class SupportPage(NamedTuple):
    """The page, and its numbers as plain JSON values."""

    html: str
    record: dict[str, Any]


class _Entry(NamedTuple):
    """A support token as the page lists it."""

    nearest: Nearest
    label: str
    margin: str
    before: str
    here: str
    after: str
    head_share: int
    own: int
    past: list[tuple[int, str, int]]


def support_page(
    reading: Reading,
    checkpoint: Checkpoint,
    *,
    count: int = 10,
    environment: Mapping[str, Any] | None = None,
) -> SupportPage:
    """Show a text by its margins: the text coloured, the nearest tokens and why, a map of all layers and tokens.

    Args:
        reading: margins of the text, from :func:`~probattn.inference.reports.support.measure.read_margins`.
        checkpoint: the model that read it.
        count: number of support tokens to list.
        environment: date, hardware and versions, from :func:`~probattn.inference.runtime.environment.describe`.

    Returns:
        A :class:`SupportPage`. The record has ``schema`` 2, ``model``, ``ids``, ``tokens`` (the text of each token's
        unit), ``units`` (first token and one more than the last), ``windows``, ``total`` tokens of the whole text,
        ``smallest`` and ``nearest`` by map and margin, ``beyond`` (how many blocks lie beyond the boundary),
        ``surprisal``, ``entropy`` and ``environment``; null stands for numbers that are not finite.
    """
    nearest = nearest_tokens(reading, checkpoint.model, count)
    record = _record(reading, checkpoint, nearest, environment or {})
    return SupportPage(_render(reading, checkpoint, nearest, record), record)


def _record(
    reading: Reading,
    checkpoint: Checkpoint,
    nearest: Mapping[Map, Mapping[Kind, Sequence[Nearest]]],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    found, config = reading.margins, checkpoint.model.config
    layers = found.layer.values

    def least(kind: Kind, which: Map) -> dict[str, Any]:
        values, rows = smallest(reading, kind, which)
        return {"margin": values.tolist(), "layer": layers[rows].tolist()}

    computed = str(next(checkpoint.model.parameters()).dtype).removeprefix("torch.")
    content = {
        "schema": 2,
        "model": {
            "name": checkpoint.name,
            "type": str(config.model_type),
            "weights_sha256": found.attrs.get("weights_sha256"),
            "layers": layers.tolist(),
            "heads": int(getattr(config.get_text_config(), "num_attention_heads", 0)),
            "context": getattr(config.get_text_config(), "max_position_embeddings", None),
            "stored": str(checkpoint.stored).removeprefix("torch."),
            "computed": computed,
        },
        "ids": reading.tokens.tolist(),
        "tokens": found.text.values.tolist(),
        "units": [[unit.first, unit.last] for unit in reading.units],
        "windows": [list(window) for window in reading.windows],
        "total": reading.total,
        "kinds": list(reading.kinds),
        "smallest": {which: {kind: least(kind, which) for kind in reading.kinds} for which in MAPS},
        "nearest": {
            which: {kind: [one._asdict() for one in entries] for kind, entries in lists.items()}
            for which, lists in nearest.items()
        },
        "beyond": {which: {kind: int(_beyond(reading, kind, which).sum()) for kind in reading.kinds} for which in MAPS},
        "surprisal": found.surprisal.values.tolist(),
        "entropy": found.entropy.values.tolist(),
        "environment": dict(environment),
    }
    plain: dict[str, Any] = finite_or_null(content)
    return plain


def _beyond(reading: Reading, kind: Kind, which: Map) -> Any:
    """Blocks beyond the boundary, ``(L, n)`` boolean."""
    if kind == "logabsdet":
        return reading.margins["sign" if which == "generator" else "update_sign"].values < 0
    if kind == "sigma_min":  # it has no sign
        return np.zeros(reading.margins[kind].shape, dtype=bool)
    return reading.margins[variable(kind, which)].values < 0


def _render(
    reading: Reading,
    checkpoint: Checkpoint,
    nearest: Mapping[Map, Mapping[Kind, Sequence[Nearest]]],
    record: Mapping[str, Any],
) -> str:
    found = reading.margins
    texts = [
        shown_text(unit.text) if unit.text else checkpoint.tokeniser.name(int(reading.tokens[unit.first]))
        for unit in reading.units
    ]
    labels = _labels(reading, texts)
    loader = jinja2.PackageLoader("probattn.inference.reports")
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "support.html"
    )
    entries = {
        which: {kind: [_entry(reading, one, labels, texts) for one in part] for kind, part in lists.items()}
        for which, lists in nearest.items()
    }
    data = {
        "labels": labels,
        "units": record["units"],
        "windows": record["windows"],
        "layers": record["model"]["layers"],
        "kinds": {kind: KINDS[kind].as_data() for kind in reading.kinds},
        "maps": MAP_WORDS,
        "margins": {
            which: {kind: _packed(found[variable(kind, which)].values) for kind in reading.kinds} for which in MAPS
        },
        "beyond": {
            which: {kind: _packed(_beyond(reading, kind, which), "u1") for kind in reading.kinds} for which in MAPS
        },
        "sink": _packed(found.sink.values),
        "rms": _packed(found.rms.values),
        "surprisal": record["surprisal"],
        "entropy": record["entropy"],
        "nearest": {
            which: {kind: [one.token for one in part] for kind, part in lists.items()}
            for which, lists in nearest.items()
        },
    }
    return template.render(
        record=record,
        windows=_windows(reading, texts),
        labels=labels,
        entries=entries,
        kinds={kind: KINDS[kind] for kind in reading.kinds},
        maps=MAP_WORDS,
        direction=text_direction(reading.text),
        sensitivity=sensitivity_words(),
        data=data,
    )


def _labels(reading: Reading, texts: Sequence[str]) -> list[str]:
    """A label for each token: the text of its unit, and its place among the tokens of a unit of several."""
    found = []
    for unit, text in zip(reading.units, texts, strict=True):
        size = unit.last - unit.first
        found += [text] if size == 1 else [f"{text} {k + 1}/{size}" for k in range(size)]
    return found


def _windows(reading: Reading, texts: Sequence[str]) -> list[tuple[int, int, list[tuple[int, str, str]]]]:
    """First and last token of each window with its units: number, text, line break behind it."""
    pieces = [
        # A line break follows its picture, or an outline would begin on the next line.
        (number, text, "\n" if unit.text.endswith("\n") else "")
        for number, (unit, text) in enumerate(zip(reading.units, texts, strict=True))
    ]
    starts = [unit.first for unit in reading.units]
    return [
        (first, last, pieces[bisect_left(starts, first) : bisect_left(starts, last)]) for first, last in reading.windows
    ]


def _entry(reading: Reading, one: Nearest, labels: Sequence[str], texts: Sequence[str]) -> _Entry:
    number = next(k for k, unit in enumerate(reading.units) if unit.first <= one.token < unit.last)
    window = next(window for window in reading.windows if window[0] <= one.token < window[1])
    inside = [k for k, unit in enumerate(reading.units) if window[0] <= unit.first < window[1]]
    before, cut_before = _nearby([texts[k] for k in reversed(range(inside[0], number))])
    after, cut_after = _nearby([texts[k] for k in range(number + 1, inside[-1] + 1)])
    return _Entry(
        nearest=one,
        label=labels[one.token],
        margin=_number(one.margin),
        before=("…" if cut_before else "") + "".join(reversed(before)),
        here=texts[number],
        after="".join(after) + ("…" if cut_after else ""),
        head_share=round(100 * one.head_share),
        own=round(100 * one.own),
        past=[(token, labels[token], round(100 * share)) for token, share in one.past if share >= 0.01],
    )


def _nearby(texts: Sequence[str]) -> tuple[list[str], bool]:
    """The first few of some texts, and whether there are more."""
    found: list[str] = []
    while len(found) < len(texts) and sum(map(len, found)) + len(texts[len(found)]) <= _LETTERS:
        found.append(texts[len(found)])
    return found, len(found) < len(texts)


def _number(value: float) -> str:
    """A margin in four digits; with a real minus sign, as the page's script writes them."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "\u2212∞"
    text = f"{value:.2e}" if value != 0 and abs(value) < 1e-3 else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
    return text.replace("-", "\u2212")


def _packed(values: Any, kind: str = "<f4") -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(kind).tobytes()).decode()
