"""Support tokens of a text, those that a language model holds nearest to the boundary: one HTML page, numbers as JSON.

The margins are those of the heads, J_i = I - c Cov_i(v, k), in one pass without a cache. A text longer than the model's
context is cut into windows, each of which starts without a past.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import to_hex
from torch import Tensor

from probattn.barrier import MarginKind
from probattn.errors import InputError, require_choice
from probattn.hf.decoding import head_margins
from probattn.hf.hooks import LayerCall, observe
from probattn.inference.runtime.files import finite_or_null
from probattn.models.causal_lm import Tokeniser

__all__ = ["SupportPage", "SupportToken", "TextMargins", "support_page", "text_margins"]

_KINDS: tuple[MarginKind, ...] = ("determinant", "spectral", "singular_value")
_STOPS = 9
_NUMBERS = 1 << 25  # on one page; 180 MB as text
# Characters that would be invisible, as pictures of themselves.
_PICTURES: dict[int, int | str] = {
    **{code: 0x2400 + code for code in range(32)},
    0x7F: 0x2421,
    ord("\t"): "\u21e5",
    ord("\n"): "\u21b5\n",
}
_MEANING: dict[MarginKind, str] = {
    "determinant": "det J, with its sign: zero on the boundary, negative beyond it.",
    "spectral": "1 minus the largest real eigenvalue of I - J: the room before the attention, turned up, meets a "
    "singular block; negative beyond it, infinite where no eigenvalue is real.",
    "singular_value": "The smallest singular value of J, its distance to a singular block: the reciprocal is the "
    "largest factor by which noise at the token grows.",
}


class SupportToken(NamedTuple):
    """A token of small margin, with the layer and the head of that margin."""

    position: int
    text: str
    margin: float
    layer: int
    head: int


@dataclass(frozen=True)
class TextMargins:
    """A text as a model sees it.

    Attributes:
        tokens: tokens of the text, (n,).
        pieces: text of each token.
        windows: first token, and one more than the last, of each stretch that was read on its own.
        layers: numbers of the L layers.
        margins: margins by kind, (L, H, n) each.
    """

    tokens: Tensor
    pieces: Sequence[str]
    windows: Sequence[tuple[int, int]]
    layers: tuple[int, ...]
    margins: Mapping[MarginKind, Tensor]

    def smallest(self, kind: MarginKind) -> Tensor:
        """Over layers and heads, (n,)."""
        return self.margins[kind].amin((0, 1))

    def support(self, kind: MarginKind, k: int) -> list[SupportToken]:
        """The k tokens of smallest margin over layers and heads, nearest first, the earlier first among equals."""
        margins = self.margins[kind]
        least, index = margins.flatten(0, 1).min(0)  # (n,)
        found = []
        for position in least.sort(stable=True).indices[:k].tolist():
            layer, head = divmod(int(index[position]), margins.shape[1])
            text, margin = self.pieces[position], float(least[position])
            found.append(SupportToken(position, text, margin, self.layers[layer], head))
        return found


class SupportPage(NamedTuple):
    """The page, and its numbers as plain JSON values."""

    html: str
    record: dict[str, Any]


def text_margins(text: str, model: Any, tokeniser: Tokeniser) -> TextMargins:
    """Run a text through a model and take the margins of every layer and head.

    Args:
        text: text that is not empty.
        model: a causal language model of ``transformers`` whose architecture uses the attention interface, in
            evaluation mode.
        tokeniser: tokeniser of the model.

    Returns:
        :class:`TextMargins`, in the precision of the model (float32 at least), on the CPU.

    Raises:
        InputError: a text of fewer than two tokens or of too many for one page, tokens that the model does not have, a
            model that cannot be observed or computes NaN.
    """
    tokens = tokeniser.encode(text)
    if len(tokens) == 0:
        raise InputError(
            f"the tokeniser finds no token in {len(text)} characters; give a text, or save the model's own tokeniser "
            "beside it (a folder without one yields an empty tokeniser)."
        )
    if len(tokens) < 2:
        raise InputError("the text is one token; a margin needs a past of at least one: give a longer text.")
    known = int(model.get_input_embeddings().weight.shape[0])
    if int(tokens.max()) >= known:
        raise InputError(
            f"the tokeniser gives token {int(tokens.max())} and the model knows 0..{known - 1}; the two do not belong "
            "together: use the model's own tokeniser."
        )
    context = getattr(model.config, "max_position_embeddings", None) or len(tokens)
    windows = [(start, min(start + context, len(tokens))) for start in range(0, len(tokens), context)]
    found: dict[MarginKind, dict[int, list[Tensor]]] = {kind: {} for kind in _KINDS}

    def see(call: LayerCall, output: Tensor) -> Tensor:
        if call.causal:
            for kind, layers in found.items():
                layers.setdefault(call.layer, []).append(head_margins(call, kind)[0].cpu())
        return output

    stop = observe(model, see)
    try:
        with torch.no_grad():
            for first, last in windows:
                model.base_model(input_ids=tokens[None, first:last].to(model.device), use_cache=False)
                _require_size(found, len(tokens))
    finally:
        stop()
    layers = tuple(sorted(found[_KINDS[0]]))
    margins = {
        kind: torch.stack([torch.cat(parts[layer], -1) for layer in layers])  # (L, H, n)
        for kind, parts in found.items()
    }
    for kind, values in margins.items():
        bad = (values.isnan() | (values == -torch.inf)).nonzero()
        if len(bad):
            layer, head, position = map(int, bad[0])
            raise InputError(
                f"the {kind} margin is {float(values[layer, head, position])} at layer {layers[layer]}, head {head}, "
                f"token {position}; the checkpoint holds numbers that are not finite, or needs --dtype float64."
            )
    return TextMargins(tokens, tokeniser.pieces(tokens), windows, layers, margins)


def support_page(
    text: str,
    model: Any,
    tokeniser: Tokeniser,
    *,
    kind: MarginKind = "singular_value",
    threshold: float | None = None,
    support: int = 10,
    name: str = "model",
    environment: Mapping[str, Any] | None = None,
) -> SupportPage:
    """A text coloured by its margins, on a page that needs nothing else, with the numbers.

    Args:
        text: text as in :func:`text_margins`.
        model: model as in :func:`text_margins`.
        tokeniser: tokeniser of the model.
        kind: margin that the page shows first; all kinds are on it.
        threshold: margin of this kind below which tokens are marked and counted.
        support: number of support tokens to outline.
        name: name of the model.
        environment: date, hardware and versions, from :func:`~probattn.inference.runtime.environment.describe`.

    Returns:
        A :class:`SupportPage`. The record has ``schema`` 1, ``model``, ``ids``, ``tokens``, ``windows``, ``margins`` by
        kind as [layer][head][position] with null for infinity, ``support``, ``below`` (positions) and ``environment``.

    Raises:
        InputError: an unknown kind, support below 1, and whatever :func:`text_margins` raises.

    Example:
        >>> page = support_page("To be, or not to be", model, tokeniser)  # doctest: +SKIP
        >>> page.record["support"][0]["text"]  # doctest: +SKIP
    """
    require_choice("kind", kind, _KINDS)
    if threshold is not None and not np.isfinite(threshold):
        raise InputError(f"threshold is {threshold}; give a finite number, or none.")
    if support < 1:
        raise InputError(f"support is {support}; outline at least one token.")
    seen = text_margins(text, model, tokeniser)
    record = _record(seen, model, kind, threshold, support, name, environment or {})
    return SupportPage(_render(seen, record), record)


def _record(
    seen: TextMargins,
    model: Any,
    kind: MarginKind,
    threshold: float | None,
    support: int,
    name: str,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    low = [] if threshold is None else (seen.smallest(kind) < threshold).nonzero().flatten().tolist()
    return {
        "schema": 1,
        "model": {
            "name": name,
            "type": str(model.config.model_type),
            "layers": list(seen.layers),
            "heads": seen.margins[kind].shape[1],
            "context": getattr(model.config, "max_position_embeddings", None),
        },
        "ids": seen.tokens.tolist(),
        "tokens": list(seen.pieces),
        "windows": [list(window) for window in seen.windows],
        "kind": kind,
        "threshold": threshold,
        "margins": {kind: finite_or_null(values.tolist()) for kind, values in seen.margins.items()},
        "support": finite_or_null([token._asdict() for token in seen.support(kind, support)]),
        "below": low,
        "environment": dict(environment),
    }


def _render(seen: TextMargins, record: Mapping[str, Any]) -> str:
    packed = {
        kind: base64.b64encode(values.numpy().astype("<f4").tobytes()).decode() for kind, values in seen.margins.items()
    }
    colours = [to_hex(colormaps["cividis"](k / (_STOPS - 1))) for k in range(_STOPS)]
    shown = [piece.translate(_PICTURES) or "\u2205" for piece in seen.pieces]
    loader = jinja2.PackageLoader("probattn.inference.reports")
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "support.html"
    )
    return template.render(
        record=record,
        # The line breaks follow their tokens, or an outline would begin on the next line.
        windows=[
            (first, last, [(piece.removesuffix("\n"), piece.endswith("\n")) for piece in shown[first:last]])
            for first, last in seen.windows
        ],
        kinds=_KINDS,
        meaning=_MEANING,
        data={
            "tokens": [piece.replace("\n", "") for piece in shown],
            "windows": record["windows"],
            "layers": record["model"]["layers"],
            "heads": record["model"]["heads"],
            "colours": colours,
            "meaning": _MEANING,
            "margins": packed,
        },
    )


def _require_size(found: Mapping[MarginKind, Mapping[int, list[Tensor]]], length: int) -> None:
    layers = found[_KINDS[0]]
    if not layers:
        raise InputError("the model ran without any layer that looks back; give a causal language model.")
    heads = {part.shape[0] for parts in layers.values() for part in parts}
    if len(heads) > 1:
        raise InputError(f"the layers have {' and '.join(map(str, sorted(heads)))} heads; one number is needed.")
    numbers = len(_KINDS) * len(layers) * heads.pop() * length
    if numbers > _NUMBERS:
        raise InputError(
            f"{length} tokens in {len(layers)} layers make {numbers} margins, more than a page can hold ({_NUMBERS}); "
            f"give a text of at most {length * _NUMBERS // numbers} tokens."
        )
