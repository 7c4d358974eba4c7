"""The model and the data of a fit of a layer: the residual streams that a language model makes of a text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.methods.cost import free_bytes
from probattn.models.checkpoint import open_checkpoint, split_text
from probattn.models.layer import LayerModel
from probattn.models.layer_options import StreamOptions
from probattn.models.layer_streams import Streams, layer_streams, outlying_coordinates
from probattn.models.layer_update import update_prior
from probattn.models.reading import read_regular

__all__ = ["LayerProblem", "pose_layer"]

_LOG = logging.getLogger(__name__)
_MOST = 2**30  # bytes of a text
_SEQUENCES = 8
_NAMED = 8  # outlying coordinates that are named


class LayerProblem(NamedTuple):
    """Model, data and facts about the data.

    Attributes:
        model: model of the streams.
        u: streams, ``(N, T, p)``.
        facts: what a result must say of them, plain JSON values by name.
    """

    model: LayerModel
    u: Tensor
    facts: dict[str, Any]


def pose_layer(
    options: StreamOptions, *, sequences: int, jacobian: bool, seed: int, device: torch.device, dtype: torch.dtype
) -> LayerProblem:
    """Load the model, cut the text and extract the streams in front of the layer.

    Args:
        options: model, layer, text and noise.
        sequences: number of sequences; 0 takes 8.
        jacobian: keep the log-determinants in the likelihood.
        seed: random seed of the choice of positions.
        device: where to compute.
        dtype: precision of the layer.

    Raises:
        InputError: a model, layer or text that cannot be used, or more memory than is free.
    """
    text = _read(options.text)
    checkpoint = open_checkpoint(options.model)
    ids = split_text(checkpoint, text).tokens
    assert options.layer is not None
    streams = layer_streams(
        checkpoint.model.to(device),
        ids,
        options.layer,
        sequences=sequences or _SEQUENCES,
        length=options.tokens,
        given=options.given,
        dtype=dtype,
    )
    _require_memory(streams, options, device)
    outlying = outlying_coordinates(streams.u, options.given)
    if outlying:
        words = ", ".join(f"{place} ({ratio:.0f} times the median)" for place, ratio in list(outlying.items())[:_NAMED])
        more = f" and {len(outlying) - _NAMED} more" if len(outlying) > _NAMED else ""
        _LOG.warning(
            "coordinates %s%s of the stream are far larger than the others; the noise is measured in each coordinate's "
            "own spread, with an offset per sequence%s",
            words,
            more,
            "; --noise diagonal infers one scale for each" if options.noise == "scalar" else "",
        )
    update = None
    if options.update_rank:
        update = update_prior(
            streams.layer,
            streams.u,
            rank=options.update_rank,
            heads=sorted(options.update_heads) or None,
            spread=options.update_spread,
            given=options.given,
        )
    model = LayerModel(
        streams.layer,
        options.tokens,
        given=options.given,
        noise=options.noise,
        noise_rank=options.noise_rank,
        reference=streams.reference,
        offset=streams.offset,
        gain_spread=1.0 if options.signed else 0.5,
        temperature_spread=0.25 if options.temperature else None,
        share_spread=0.25 if _has_own_share(streams) else None,
        signed=options.signed,
        positions=options.positions or None,
        position_seed=seed,
        jacobian=jacobian,
        update=update,
    )
    model.to(device)
    facts = {
        "name": f"{checkpoint.name}, layer {streams.layer.number}",
        "shape": list(streams.u.shape),
        "text": str(options.text),
        "tokens": len(ids),
        "rms": float(streams.u[:, options.given :].square().mean().sqrt()),
        "outlying_coordinates": {str(place): ratio for place, ratio in outlying.items()},
    }
    return LayerProblem(model, streams.u, facts)


def _has_own_share(streams: Streams) -> bool:
    """True if the share of the update is more than a common factor of the gains."""
    sublayer = streams.layer.sublayer
    return sublayer.output_norm is not None or sublayer.output_bias is not None


def _read(path: Path | None) -> str:
    try:
        text = read_regular(Path(str(path)), f"text {path}", most=_MOST).decode("utf-8")
    except FileNotFoundError:
        raise InputError(f"text {path}: no such file; check the path.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"text {path}: not UTF-8 (byte {error.start}); convert it.") from None
    if not text.strip():
        raise InputError(f"text {path}: empty; give a text.")
    return text


def _require_memory(streams: Streams, options: StreamOptions, device: torch.device) -> None:
    """Refuse covariances of one sequence that do not fit, with their gradients."""
    sublayer = streams.layer.sublayer
    rows = options.positions or options.tokens
    heads, size = sublayer.output.shape[1:]
    each = rows * heads * size * sublayer.query.weight.shape[1] * streams.u.element_size()
    needed, free = 6 * each, free_bytes(device)
    if needed > free:
        raise InputError(
            f"positions is {options.positions}: the covariances of one sequence need about {needed / 2**30:.1f} GiB, "
            f"and {free / 2**30:.1f} GiB are free; take fewer positions (--positions) or tokens (--tokens)."
        )
