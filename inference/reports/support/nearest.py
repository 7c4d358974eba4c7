"""The tokens nearest to the boundary: where they are, which head brings them there, which past tokens carry it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from probattn.errors import InputError, require_at_least
from probattn.hf import attention_layer
from probattn.hf.explain import Shares, margin_gradient, past_shares
from probattn.hf.margins import Kind, Map, residual_streams
from probattn.inference.reports.support.measure import MAPS, Reading, variable
from probattn.inference.runtime.progress import log_step

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Nearest", "nearest_tokens", "smallest"]

_LOG = logging.getLogger(__name__)
_CARRIERS = 3  # past tokens that are named
_REAL = 1e-4  # an eigenvalue margin and the spectral margin that agree to this are those of one real eigenvalue


class Nearest(NamedTuple):
    """A support token, and why it is one.

    Attributes:
        token: its position in the text.
        layer: the layer in which it is nearest to the boundary.
        margin: its margin there, with its sign; for "logabsdet" ``log|det J|``.
        beyond: whether it lies beyond the boundary there.
        head: the head that pulls it there most; None: no head does, or the margin has no derivative.
        head_share: this head's part of the pull of all heads that pull.
        own: part of this head's pull that its token's own value and key make.
        past: tokens that carry the covariance by which this head pulls, strongest first, with their parts of its pull;
            the token itself may be one of them.
    """

    token: int
    layer: int
    margin: float
    beyond: bool
    head: int | None
    head_share: float
    own: float
    past: list[tuple[int, float]]


def smallest(reading: Reading, kind: Kind, which: Map) -> tuple[NDArray[Any], NDArray[Any]]:
    """Margin of each token in the layer where it is nearest to the boundary, by ``|margin|``.

    Args:
        reading: margins of a text.
        kind: the margin; for "logabsdet" ``|det J|`` decides, whatever its sign.
        which: the map.

    Returns:
        Margins, ``(n,)``, and the layers as numbers of rows, ``(n,)``.
    """
    values = reading.margins[variable(kind, which)].values  # (L, n)
    rows = _distance(values, kind).argmin(0)
    return values[rows, np.arange(values.shape[1])], rows


def nearest_tokens(reading: Reading, model: Any, count: int = 10) -> dict[Map, dict[Kind, list[Nearest]]]:
    """Find the tokens nearest to the boundary, by every margin and for both maps, and explain them.

    The blocks of these tokens are formed anew in double precision. A head pulls by the derivative of ``|margin|`` by
    its gain, a past token by its share in that, see :mod:`probattn.hf.explain`.

    Args:
        reading: margins of a text.
        model: the model that read it.
        count: number k of tokens in each list.

    Returns:
        Lists of :class:`Nearest`, nearest first, the earlier first among equals; k in each, or all tokens.
    """
    require_at_least("count", count)
    wanted: dict[Map, dict[Kind, list[tuple[int, int]]]] = {
        which: {kind: _ranked(reading, kind, which, count) for kind in reading.kinds} for which in MAPS
    }
    places = sorted({place for lists in wanted.values() for ranked in lists.values() for place in ranked})
    log_step(_LOG, f"explaining the nearest tokens: {len(places)} blocks", 0, len(places))
    reasons: dict[tuple[Map, Kind, int, int], Shares | None] = {}
    done = 0
    for first, last in reading.windows:
        here = [(row, token) for row, token in places if first <= token < last]
        if here:
            streams, _ = residual_streams(model, reading.tokens[None, first:last].to(model.device))
            for row in sorted({row for row, _ in here}):
                tokens = [token for at, token in here if at == row]
                reasons |= _pulls(reading, model, streams, row, tokens, first, wanted)
                done += len(tokens)
                log_step(_LOG, f"explained {done} of {len(places)} blocks", done, len(places))
            del streams
    return {
        which: {
            kind: [_described(reading, kind, which, place, reasons[which, kind, *place]) for place in ranked]
            for kind, ranked in lists.items()
        }
        for which, lists in wanted.items()
    }


def _distance(values: NDArray[Any], kind: Kind) -> NDArray[Any]:
    return values if kind == "logabsdet" else np.abs(values)


def _ranked(reading: Reading, kind: Kind, which: Map, count: int) -> list[tuple[int, int]]:
    """Row of the layer and token of the nearest, one entry per token."""
    margins, rows = smallest(reading, kind, which)
    order = np.argsort(_distance(margins, kind), kind="stable")[:count]
    return [(int(rows[token]), int(token)) for token in order]


def _pulls(
    reading: Reading,
    model: Any,
    streams: Sequence[Tensor],
    row: int,
    tokens: Sequence[int],
    first: int,
    wanted: dict[Map, dict[Kind, list[tuple[int, int]]]],
) -> dict[tuple[Map, Kind, int, int], Shares | None]:
    """Shares in the derivatives of the margins of some tokens of a window in one layer."""
    number = int(reading.margins.layer[row])
    layer = attention_layer(model, number, dtype=torch.float64, check=False).detach()
    u = streams[number][0].double()
    at = torch.tensor([token - first for token in tokens], device=u.device)
    blocks = layer.mean_jacobian(u, at)
    found: dict[tuple[Map, Kind, int, int], Shares | None] = {}
    for token, block in zip(tokens, blocks, strict=True):
        for which, lists in wanted.items():
            for kind, ranked in lists.items():
                if (row, token) in ranked:
                    gradient = _gradient(reading, block, kind, which, row, token)
                    pulls = None if gradient is None else past_shares(layer, u, token - first, gradient)
                    found[which, kind, row, token] = pulls
    return found


def _gradient(reading: Reading, block: Tensor, kind: Kind, which: Map, row: int, token: int) -> Tensor | None:
    """Derivative of ``|margin|``, or of ``log|det|``, by the block; None where there is none."""
    here = {one: float(reading.margins[variable(one, which)].values[row, token]) for one in reading.kinds}
    known = None
    if kind == "spectral":
        if not np.isfinite(here[kind]):
            return None
        known = 1 - here[kind]
    elif kind == "complex" and "spectral" in here and abs(here["complex"] - here["spectral"]) <= _REAL:
        known = 1 - here["spectral"]
    try:
        gradient = margin_gradient(block, kind, update=which == "update", eigenvalue=known).gradient
    except InputError:  # single precision saw a real eigenvalue where double precision sees a pair
        return None
    if kind != "logabsdet" and here[kind] < 0:
        gradient = -gradient
    return gradient if bool(gradient.isfinite().all()) else None


def _described(reading: Reading, kind: Kind, which: Map, place: tuple[int, int], pulls: Shares | None) -> Nearest:
    row, token = place
    margin = float(reading.margins[variable(kind, which)].values[row, token])
    signs = reading.margins[variable("sign", which)].values if kind == "logabsdet" else None  # type: ignore[arg-type]
    beyond = bool(signs[row, token] < 0) if signs is not None else margin < 0
    layer = int(reading.margins.layer[row])
    if pulls is None:
        return Nearest(token, layer, margin, beyond, None, 0.0, 0.0, [])
    heads = -pulls.heads()
    head = int(heads.argmax())
    if float(heads[head]) <= 0:
        return Nearest(token, layer, margin, beyond, None, 0.0, 0.0, [])
    first = next(first for first, last in reading.windows if first <= token < last)
    parts, own = -pulls.past[head].clamp(max=0), max(0.0, -float(pulls.own[head]))
    total = float(parts.sum()) + own
    order = parts.argsort(descending=True, stable=True)[:_CARRIERS].tolist()
    past = [(first + one, float(parts[one]) / total) for one in order if float(parts[one]) > 0]
    share = float(heads[head] / heads.clamp(min=0).sum())
    return Nearest(token, layer, margin, beyond, head, share, own / total, past)
