"""From a model and the number of a layer to that layer as an attention."""

from __future__ import annotations

from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from probattn.errors import InputError, require_finite
from probattn.hf.layers.families import read
from probattn.hf.layers.families.registry import Family, Site, family_of
from probattn.hf.layers.layer import AttentionLayer
from probattn.hf.layers.sublayer import Sublayer, mapped
from probattn.hf.layers.verify import require_agreement
from probattn.moments.dense import SUPPORTED

__all__ = ["attention_layer", "find_site"]

_OLDEST = "5.24"  # as in pyproject.toml


def attention_layer(model: Any, number: int, *, dtype: torch.dtype | None = None, check: bool = True) -> AttentionLayer:
    """The attention sublayer of a language model as it is, on the residual stream before its norm.

    Args:
        model: a causal model of ``transformers``, or its body.
        number: of the layer; negative numbers count from the last.
        dtype: float32 or float64, in which the layer computes; None: the model's own, and float32 for a model in half
            precision.
        check: compare with the model's own code on a random stream of a few tokens, once.

    Returns:
        An :class:`AttentionLayer`, which reads the parameters at each call.

    Raises:
        InputError: a model type that is not covered, a layer that is not there, modules that are not what the model
            type stands for, parameters that are not finite.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2
        ... )
        >>> layer = attention_layer(LlamaForCausalLM(config), 1)
        >>> layer, layer.jacobian(torch.randn(3, 8)).shape
        (AttentionLayer('llama', layer 1, heads=2, keys=2, dim=8, dtype=torch.float32), torch.Size([3, 8, 8]))
    """
    family = family_of(model)
    site = find_site(model, family, number)
    read.require_causal(site.attention)
    try:
        sublayer = family.describe(site)
    except AttributeError as error:
        raise InputError(
            f"layer {site.number} of {type(model).__name__}: {error}; layers as transformers {_OLDEST} and newer build "
            f"them are read, and {metadata.version('transformers')} is installed."
        ) from error
    if sublayer.heads % sublayer.groups or len(sublayer.query.weight) != sublayer.heads:
        raise InputError(
            f"layer {site.number} of {type(model).__name__} has {len(sublayer.query.weight)} queries, "
            f"{sublayer.groups} keys and {sublayer.heads} heads in its output map; heads must share keys evenly."
        )
    kept = sublayer.output.dtype
    dtype = dtype or (kept if kept in SUPPORTED else torch.float32)
    if dtype not in SUPPORTED:
        raise InputError(f"dtype is {dtype}; log-determinants need float32 or float64.")
    mapped(partial(_require_finite, site.number), sublayer)
    layer = AttentionLayer(partial(_read, family, site), model.config.model_type, site.number, dtype)
    if check:
        require_agreement(model, site, layer.mean, layer.dim, dtype)
    return layer


def find_site(model: Any, family: Family, number: int) -> Site:
    """The modules of a layer.

    Args:
        model: the model.
        family: how its kind keeps its layers.
        number: of the layer; negative numbers count from the last.

    Raises:
        InputError: no such layer, or modules that the model type stands for are missing.
    """
    body = getattr(model, "base_model", model)
    body = getattr(body, "language_model", body)  # of a model that takes pictures too
    layers = getattr(body, family.layers, None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise InputError(f"{type(model).__name__} has no list of layers {family.layers!r}; it cannot be read.")
    if not -len(layers) <= number < len(layers):
        raise InputError(
            f"layer {number} was asked for; {type(model).__name__} has {len(layers)}, 0 to {len(layers) - 1}."
        )
    block = layers[number]
    for name in (family.attention, family.last):
        if name is not None and not isinstance(getattr(block, name, None), nn.Module):
            raise InputError(f"layer {number} of {type(model).__name__} has no module {name!r}; it cannot be read.")
    attention = getattr(block, family.attention)
    last = attention if family.last is None else getattr(block, family.last)
    return Site(block, attention, last, getattr(body, "rotary_emb", None), number % len(layers))


def _read(family: Family, site: Site) -> Sublayer:
    return family.describe(site)


def _require_finite(number: int, part: Tensor) -> Tensor:
    require_finite(f"a parameter of the attention of layer {number}", part.detach())
    return part
