r"""Margins of every token in every layer of a language model, on the residual stream.

For each attention sublayer with mean mu and blocks :math:`M_i = \partial \mu_i / \partial u_i` two maps are looked at,

.. math:: \text{generator: } u - \mu(u), \quad J_i = I - M_i; \qquad \text{update: } u + \mu(u), \quad J_i = I + M_i,

the map whose determinant makes the density, and what the network itself does. A small margin is not bad and a large one
is not good: a head that attends to one token alone, or to all of them alike, has a covariance near zero and J near the
identity, so that a large margin is also what a dead head looks like.

Everything is exact to a stated tolerance (:mod:`probattn.hf.spectra`): determinants from one LU factorisation per
token, the smallest singular value by block Lanczos with that factorisation (relative error at most 1e-5 in float32,
1e-10 in float64), eigenvalues by Arnoldi's method (1e-4, 1e-9), dense matrices where these are not certain. On
SmolLM2-135M (90 blocks of six layers, T = 512) computing in float32 instead of float64 changed log|det| by 1.1e-4 at
most, attribution by 2e-4, the other margins by 7e-6, and no sign.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import Tensor

from probattn.errors import InputError, require_at_least, require_choice
from probattn.hf.controls import Control, controlled_layer, redrawn, shuffled, turned_model
from probattn.hf.measure import Request, measure_layer
from probattn.hf.provenance import provenance, weights_digest
from probattn.hf.spectra import Kind, Map
from probattn.hf.streams import (
    Text,
    predictions,
    read_text,
    require_prefix,
    residual_streams,
    seen_by,
    text_streams,
    unpacked,
)
from probattn.moments.dense import SUPPORTED

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["Control", "Kind", "Map", "margins", "residual_streams"]

_LOG = logging.getLogger(__name__)


@torch.no_grad()
def margins(
    model: Any,
    input_ids: Any,
    kinds: Sequence[Kind] = ("logabsdet", "sigma_min", "spectral", "complex"),
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | float | None = None,
    attention_mask: Any = None,
    position_ids: Any = None,
    sequence_ids: Any = None,
    prefix_length: Any = None,
    past_key_values: None = None,
    window: int | None = None,
    stride: int | None = None,
    maps: Sequence[Map] = ("generator", "update"),
    attribution: bool = False,
    control: Control = "none",
    seed: int = 0,
    dtype: torch.dtype | None = None,
    memory: int | None = None,
    rank: int | None = None,
) -> Dataset:
    """Measure the margins of tokens in the layers of a causal language model.

    Args:
        model: a causal model of ``transformers`` whose layers :func:`~probattn.hf.layers.attention_layer` covers, on
            any device.
        input_ids: token ids, ``(sequences, T)`` or ``(T,)``; a tensor, an array or a list.
        kinds: quantities to compute: "logabsdet" (with its sign), "sigma_min", "spectral" and "complex", see
            :func:`probattn.stability_margin`.
        layers: numbers of the layers; None: all.
        positions: positions of the tokens, increasing, or a share of them between 0 and 1 drawn by ``seed``; None: all.
        attention_mask: 0 on padding, on either side, as the model takes it; padding has NaN everywhere.
        position_ids: positions of the tokens as the model takes them, ``(sequences, T)``.
        sequence_ids: several sequences packed into one row: the number of the sequence of each token, negative on
            padding. Each sequence is measured by itself.
        prefix_length: number of first tokens that see each other, as in models that read a prompt in both directions;
            one number or one per sequence. The blocks are the derivatives of a token's mean by the token itself.
        past_key_values: refused; a cache holds no residual stream, so give the whole text and the new ``positions``.
        window: number of tokens that the model is given at a time, for texts that are longer; None: all.
        stride: tokens between the beginnings of two windows; None: half a window. Behind the first window a token is
            measured with at least ``window - stride`` tokens before it.
        maps: "generator" (I - M) and "update" (I + M); variables of the second begin with ``update_``.
        attribution: whether to add the heads' contributions -tr(J^-1 M^h) to the generator's volume.
        control: a name of :data:`probattn.hf.controls.Control`.
        seed: random seed of the controls and of a share of positions.
        dtype: float32 or float64, in which margins are computed; None: the model's own, and float32 for a model in
            half precision.
        rank: estimate log|det| from this many directions of each head's covariance instead of computing it exactly, see
            :mod:`probattn.hf.layers.low_rank`; on SmolLM2-135M rank 8 errs by 0.6 % of the spread of log|det| (update:
            1.3 %). None: exact.
        memory: bytes for the matrices of the tokens that are measured together; None: 64 MiB on a CPU, a quarter of
            what is free, 4 GiB at most, on a GPU. Halved where the device runs out of memory.

    Returns:
        A dataset with dimensions (sequence, layer, token) and, with ``attribution``, head: the quantities asked for,
        ``rms`` of the stream, ``sink`` (attention of a token to the first one, mean over heads) and, without layer,
        ``surprisal`` of a token given those before it and ``entropy`` of the prediction after it, in nats, and
        ``past``, the number of tokens that stand before it, -1 on padding. The first tokens, which draw much attention,
        are left out by ``.sel(token=slice(16, None))`` or ``.where(found.past >= 16)``. Attributes record model, digest
        of its weights, precision, tolerances, how many numbers were left to dense matrices, control and versions. Opens
        as a data frame with ``.to_dataframe()`` and is saved with ``.to_netcdf(path, engine="h5netcdf")``. Time
        O(m^2 r + m^3) per token and layer with m = min(p, H dv); memory linear in T.

    Raises:
        InputError: ids that are no whole numbers or too many for the model, an unknown kind, map or control, a layer or
            position that is not there, a model that is not covered or has parameters that are not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> found = margins(LlamaForCausalLM(config), [[1, 2, 3]], kinds=("logabsdet",))
        >>> dict(found.sizes), bool((found.sign > 0).all())
        ({'sequence': 1, 'layer': 2, 'token': 3}, True)
    """
    from xarray import Dataset

    for kind in kinds:
        require_choice("kinds", kind, get_args(Kind))
    for one in maps:
        require_choice("maps", one, get_args(Map))
    require_choice("control", control, get_args(Control))
    if rank is not None:
        require_at_least("rank", rank, 1)
    if past_key_values is not None:
        raise InputError(
            "past_key_values is given; a cache has keys and values but no residual stream. Give the whole text as "
            "input_ids, and the new tokens as positions."
        )
    request = Request(kinds, maps, attribution, _precision(model, dtype), control, seed, memory, rank)
    digest = weights_digest(model)
    cut = _window(window, stride)
    given = read_text(model, input_ids, attention_mask, position_ids, prefix_length, longest=cut and cut[0])
    where = _positions_of(positions, given.ids.shape[1], seed)
    if control == "random_weights":
        model = redrawn(model, seed)
        digest = weights_digest(model)
    counts: dict[str, int] = {}
    if sequence_ids is not None:
        found = _packed(model, given, sequence_ids, layers, where, cut, request, counts)
    else:
        found = _in_windows(model, given, layers, where, cut, request, counts)
    content: dict[str, Any] = {}
    for name, values in found.items():
        axes = ("sequence", "layer", "token", "head")[: values.dim()]
        content[name] = (axes if values.dim() > 2 else ("sequence", "token"), values.numpy())
    numbers = _layers_of(layers, _count(model))
    coordinates = {"layer": np.array(numbers), "token": np.array(where)}
    attributes = provenance(model, request, digest, counts)
    if cut is not None:
        attributes |= {"window": cut[0], "stride": cut[1]}
    return Dataset(content, coords=coordinates, attrs=attributes)


def _packed(
    model: Any,
    text: Text,
    sequence_ids: Any,
    layers: Sequence[int] | None,
    where: list[int],
    window: tuple[int, int] | None,
    request: Request,
    counts: dict[str, int],
) -> dict[str, Tensor]:
    """Measure packed sequences, each by itself, and put the numbers where their tokens stand."""
    if text.mask is not None or text.prefix is not None:
        raise InputError(
            "sequence_ids does not go together with attention_mask or prefix_length; mark padding by a negative number."
        )
    apart, row, column = unpacked(text, sequence_ids)
    row, column = row[:, where], column[:, where]
    asked = sorted(set(column[column >= 0].tolist()))
    if not asked:
        raise InputError("positions hold padding only, by sequence_ids; choose tokens of a sequence.")
    found = _in_windows(model, apart, layers, asked, window, request, counts)
    place = torch.full((apart.ids.shape[1] + 1,), 0)
    place[asked] = torch.arange(len(asked))
    hidden, at = row < 0, place[column]
    result = {}
    for name, values in found.items():
        moved = values if values.dim() == 2 else values.movedim(2, 1)  # (sequences, P, layers, ...)
        picked = moved[row.clamp(min=0), at]  # (B, P, ...)
        shape = (*hidden.shape, *[1] * (picked.dim() - 2))
        if picked.is_floating_point():
            picked = picked.masked_fill(hidden.view(shape), torch.nan)
        result[name] = picked if values.dim() == 2 else picked.movedim(1, 2).contiguous()
    result["past"] = result["past"].masked_fill(hidden, -1)
    result["input_ids"] = text.ids.cpu()[:, where]
    return result


def _in_windows(
    model: Any,
    text: Text,
    layers: Sequence[int] | None,
    where: list[int],
    window: tuple[int, int] | None,
    request: Request,
    counts: dict[str, int],
) -> dict[str, Tensor]:
    """Measure a text in windows, each token in the first that holds it."""
    if request.control == "shuffled_text":
        text = shuffled(model, text, request.seed)
    length = text.ids.shape[1]
    if window is None or length <= window[0]:
        return _measured(model, text, layers, torch.tensor(where), request, counts)
    if text.mask is not None or text.prefix is not None or text.positions is not None:
        raise InputError("window does not go together with padding, position_ids or prefix_length; leave them out.")
    size, stride = window
    parts, done = [], 0
    for begin in range(0, length, stride):
        begin, end = min(begin, length - size), min(begin + size, length)
        rows = [position - begin for position in where if done <= position < end]
        if rows:
            found = _measured(model, text.columns(begin, begin + size), layers, torch.tensor(rows), request, counts)
            parts.append(found)
        done = end
        if end == length:
            break
    return {name: torch.cat([part[name] for part in parts], 2 if parts[0][name].dim() > 2 else 1) for name in parts[0]}


def _measured(
    model: Any,
    text: Text,
    layers: Sequence[int] | None,
    rows: Tensor,
    request: Request,
    counts: dict[str, int],
) -> dict[str, Tensor]:
    """All quantities of a text, ``(B, layers, P, ...)`` or ``(B, P)``, on the CPU; padding has NaN."""
    count = _count(model)
    turned = turned_model(model, count, request.seed) if request.control == "turned_outputs" else nullcontext()
    numbers = _layers_of(layers, count)
    with turned:
        streams, logits = text_streams(model, text)
    hidden = None if text.mask is None else (text.mask == 0)[:, rows.to(text.mask.device)].cpu()
    found: dict[str, list[Tensor]] = {}
    for number in numbers:
        layer = controlled_layer(model, number, count, request.control, request.seed).to(request.dtype)
        u = streams[number].to(layer.like)
        if text.prefix is not None and number == numbers[0]:
            require_prefix(model, layer, text, u)
        for name, values in measure_layer(seen_by(layer, text), u, rows.to(u.device), request, counts).items():
            values = values.cpu()
            if hidden is not None:
                values = values.masked_fill(hidden.view(*hidden.shape, *[1] * (values.dim() - 2)), torch.nan)
            found.setdefault(name, []).append(values)
    result = {name: torch.stack(parts, 1) for name, parts in found.items()}
    rows = rows.to(text.ids.device)
    result |= {name: values.cpu() for name, values in predictions(logits, text, rows).items()}
    return result | {"past": text.past[:, rows].cpu(), "input_ids": text.ids[:, rows].cpu()}


def _precision(model: Any, dtype: torch.dtype | None) -> torch.dtype:
    own: torch.dtype = next(model.parameters()).dtype
    if dtype is None:
        if own in SUPPORTED:
            return own
        _LOG.info("the model is in %s; its margins are computed in float32", str(own).removeprefix("torch."))
        return torch.float32
    if dtype not in SUPPORTED:
        raise InputError(f"dtype is {dtype}; log-determinants need float32 or float64.")
    return dtype


def _window(window: int | None, stride: int | None) -> tuple[int, int] | None:
    if window is None:
        if stride is not None:
            raise InputError("stride is given without window; give the number of tokens of a window too.")
        return None
    require_at_least("window", window, 2)
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= stride <= window:
        raise InputError(f"stride is {stride}; it must lie between 1 and window = {window}.")
    return window, stride


def _positions_of(positions: Sequence[int] | float | None, length: int, seed: int) -> list[int]:
    if positions is None:
        return list(range(length))
    if isinstance(positions, float):
        if not 0 < positions <= 1:
            raise InputError(f"positions is {positions}; a share of the positions must lie above 0 and at most at 1.")
        count = max(1, round(positions * length))
        drawn = torch.randperm(length, generator=torch.Generator().manual_seed(seed))[:count]
        return sorted(drawn.tolist())
    return _increasing("positions", positions, length)


def _count(model: Any) -> int:
    """Number of layers."""
    return int(model.config.get_text_config().num_hidden_layers)


def _layers_of(layers: Sequence[int] | None, count: int) -> list[int]:
    return list(range(count)) if layers is None else _increasing("layers", layers, count)


def _increasing(name: str, asked: Sequence[int], count: int) -> list[int]:
    try:
        found = [int(one) for one in asked]
    except (TypeError, ValueError):
        found = []
    if not found or sorted(set(found)) != found or not 0 <= found[0] <= found[-1] < count:
        raise InputError(f"{name} is {asked}; it must hold increasing whole numbers from 0 to {count - 1}.")
    return found
