"""Residual streams in front of a layer, cut from a text, with the scales of their coordinates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError, require_finite
from probattn.hf.layers import AttentionLayer
from probattn.hf.layers.build import attention_layer
from probattn.hf.streams import residual_streams

__all__ = ["Streams", "layer_streams", "outlying_coordinates", "stream_scales"]

_OUTLYING = 10.0  # times the median coordinate


class Streams(NamedTuple):
    """Data of a fit of a layer.

    Attributes:
        layer: the layer.
        u: residual streams in front of it, ``(N, T, p)``.
        reference: standard deviation of each coordinate about the mean of its sequence, ``(p,)``.
        offset: root mean square over sequences of each coordinate's mean, ``(p,)``.
    """

    layer: AttentionLayer
    u: Tensor
    reference: Tensor
    offset: Tensor


def layer_streams(
    model: Any, ids: Tensor, number: int, *, sequences: int, length: int, given: int, dtype: torch.dtype
) -> Streams:
    """Cut sequences out of a text, spread over it evenly, and run the model on each.

    Args:
        model: causal model of ``transformers``.
        ids: token ids of the text, ``(n,)``.
        number: number of the layer.
        sequences: number N of sequences.
        length: number T of tokens in each.
        given: number of first tokens that the scales leave out.
        dtype: precision of the layer.

    Raises:
        InputError: a text too short, a model or a layer that is not covered, streams that are not finite.
    """
    if len(ids) < sequences * length:
        raise InputError(
            f"the text has {len(ids)} tokens and {sequences} sequences of {length} need {sequences * length}; give a "
            "longer text, or fewer sequences (--sequences) or tokens (--tokens)."
        )
    layer = attention_layer(model, number, dtype=dtype)
    begins = (torch.arange(sequences) * (len(ids) - length)) // max(1, sequences - 1)
    windows = torch.stack([ids[begin : begin + length] for begin in begins.tolist()])
    device = layer.like.device
    found = [residual_streams(model, window.unsqueeze(0).to(device))[0][layer.number] for window in windows]
    u = torch.cat(found).to(dtype)
    require_finite(f"the residual stream in front of layer {layer.number}", u)
    return Streams(layer, u, *stream_scales(u, given))


def stream_scales(u: Tensor, given: int) -> tuple[Tensor, Tensor]:
    """Scales of the coordinates of streams: about the mean of a sequence, and of these means.

    Args:
        u: streams, ``(N, T, p)``.
        given: number of first tokens to leave out.

    Returns:
        Two tensors ``(p,)``, positive.

    Raises:
        InputError: a coordinate that never changes.
    """
    counted = u[:, given:]
    mean = counted.mean(1, keepdim=True)
    reference = (counted - mean).square().mean((0, 1)).sqrt()
    constant = (reference <= 0).nonzero().flatten().tolist()
    if constant:
        raise InputError(f"coordinates {constant[:8]} of the stream are constant in every sequence; give longer ones.")
    return reference, (mean.square().mean((0, 1)) + reference.square() / counted.shape[1]).sqrt()


def outlying_coordinates(u: Tensor, given: int) -> dict[int, float]:
    """Coordinates whose root mean square is more than ten times the median one, with that ratio.

    Args:
        u: streams, ``(N, T, p)``.
        given: number of first tokens to leave out.

    Example:
        >>> u = torch.ones(1, 4, 5)
        >>> u[..., 3] = 50.0
        >>> outlying_coordinates(u, 1)
        {3: 50.0}
    """
    size = u[:, given:].square().mean((0, 1)).sqrt()
    ratio = size / size.median()
    places = (ratio > _OUTLYING).nonzero().flatten().tolist()
    return {place: float(ratio[place]) for place in sorted(places, key=lambda place: -float(ratio[place]))}
