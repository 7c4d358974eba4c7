"""A text as a language model sees it: the margins of its tokens in every layer, window by window."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from torch import Tensor

from probattn.errors import InputError, require_at_least, require_choice
from probattn.hf.margins import Kind, Map, margins
from probattn.inference.reports.support.pieces import Unit, text_units
from probattn.inference.runtime.progress import log_stage, log_step
from probattn.models.checkpoint import Checkpoint, split_text

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["MAPS", "Reading", "read_margins", "variable"]

_LOG = logging.getLogger(__name__)
MAPS: tuple[Map, ...] = get_args(Map)
_NUMBERS = 1 << 24  # on one page; 90 MB as text
_GROUPS, _STEP = 6, 300  # groups of layers at most, and tokens times layers that are measured without a word


@dataclass(frozen=True)
class Reading:
    """A text and its margins.

    Attributes:
        text: the part of the text that was read.
        tokens: token ids, ``(n,)``.
        units: tokens joined to characters as a reader sees them.
        windows: first token, and one more than the last, of each stretch that was read on its own.
        total: number of tokens in the whole text.
        kinds: margins that were measured.
        margins: dimensions layer and token, the position in the text; see :func:`probattn.hf.margins`. With the
            position in the window, ``position``, its number, ``window``, and the text of the token's unit, ``text``.
    """

    text: str
    tokens: Tensor
    units: Sequence[Unit]
    windows: Sequence[tuple[int, int]]
    total: int
    kinds: tuple[Kind, ...]
    margins: Dataset


def variable(kind: Kind, which: Map) -> str:
    """Name of the variable of a margin in the data set."""
    return kind if which == "generator" else f"update_{kind}"


def read_margins(
    text: str,
    checkpoint: Checkpoint,
    kinds: Sequence[Kind] = get_args(Kind),
    *,
    layers: Sequence[int] | None = None,
    limit: int | None = None,
) -> Reading:
    """Run a text through a model and measure the margins of its tokens.

    Args:
        text: text that is not empty.
        checkpoint: model and tokeniser; the model in the precision and on the device to compute on.
        kinds: margins to measure.
        layers: numbers of the layers; None: all.
        limit: largest number of tokens to read, from the start of the text; None: all of them. A text longer than the
            model's context is cut into windows, each of which starts without a past.

    Returns:
        :class:`Reading`.

    Raises:
        InputError: a text of fewer than two tokens or of too many for one page, tokens that the model does not have, a
            model that is not covered, margins that are not numbers.
    """
    if not kinds:
        raise InputError(f"kinds is empty; name at least one of {', '.join(get_args(Kind))}.")
    for kind in kinds:
        require_choice("kinds", kind, get_args(Kind))
    if limit is not None:
        require_at_least("limit", limit, 2)
    split = split_text(checkpoint, text)
    total = len(split.tokens)
    units = text_units(text, split.spans)
    if limit is not None and limit < total:  # up to a whole character
        units = [unit for unit in units if unit.last <= max(limit, units[0].last)]
        text = "".join(unit.text for unit in units)
    tokens = split.tokens[: units[-1].last]
    model = checkpoint.model
    config = model.config.get_text_config()
    depth = int(config.num_hidden_layers) if layers is None else len(layers)
    _require_size(len(tokens), depth, len(kinds))
    context = getattr(config, "max_position_embeddings", None) or len(tokens)
    windows = [(start, min(start + context, len(tokens))) for start in range(0, len(tokens), context)]
    groups = _groups(range(depth) if layers is None else layers, len(tokens))
    steps = len(windows) * len(groups)
    message = f"measuring margins: {len(tokens)} tokens in {depth} layers, {', '.join(kinds)}"
    if steps > 1:
        log_step(_LOG, message, 0, steps)
    else:
        log_stage(_LOG, message)
    parts = []
    for number, (first, last) in enumerate(windows):
        ids, pieces = tokens[None, first:last].to(model.device), []
        for step, group in enumerate(groups, 1):
            pieces.append(margins(model, ids, kinds, layers=group).isel(sequence=0))
            if steps > 1:
                where = f", window {number + 1} of {len(windows)}" if len(windows) > 1 else ""
                message = f"measured up to layer {group[-1]}{where}"
                log_step(_LOG, message, number * len(groups) + step, steps)
        found = _joined(pieces, "layer").assign(
            window=("token", np.full(last - first, number)), position=("token", np.arange(last - first))
        )
        parts.append(found.assign_coords(token=found.token + first))
    texts = [unit.text for unit in units for _ in range(unit.first, unit.last)]
    whole = _joined(parts, "token").assign(text=("token", np.array(texts, dtype=object)))
    _require_numbers(whole, kinds)
    return Reading(text, tokens, units, windows, total, tuple(kinds), whole)


def _groups(layers: Sequence[int], count: int) -> list[list[int]]:
    """Layers that are measured in one go: all of a short text, a few of a long one, so that progress can be told."""
    # Each group costs a forward pass of its own, which is little beside its margins.
    size = max(-(-len(layers) // _GROUPS), _STEP // count)
    return [list(layers[first : first + size]) for first in range(0, len(layers), size)]


def _joined(parts: list[Dataset], axis: str) -> Dataset:
    import xarray

    if len(parts) == 1:
        return parts[0]
    # What has no layer, such as the surprisal, is the same in all groups of layers.
    how: dict[str, Any] = {"data_vars": "minimal", "coords": "minimal", "compat": "override"}
    return xarray.concat(parts, axis, combine_attrs="override", **how)


def _require_size(count: int, layers: int, kinds: int) -> None:
    numbers = len(MAPS) * kinds * layers * count
    if numbers > _NUMBERS:
        most = max(2, count * _NUMBERS // numbers)
        raise InputError(
            f"{count} tokens in {layers} layers make {numbers} margins, more than a page can hold ({_NUMBERS}); read "
            f"fewer tokens (--limit {most}) or fewer layers (--layers)."
        )


def _require_numbers(found: Dataset, kinds: Sequence[Kind]) -> None:
    for which in MAPS:
        for kind in kinds:
            values = found[variable(kind, which)]
            if bool(values.isnull().any()):
                layer, token = (int(part[0]) for part in np.nonzero(np.isnan(values.values)))
                raise InputError(
                    f"the {kind} margin is NaN in layer {int(found.layer[layer])} at token {int(found.token[token])}; "
                    "the numbers of the model run out of the range of its precision: compute in --dtype float64."
                )
