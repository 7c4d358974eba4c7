"""Layers of a model that the barrier acts on, found by what they compute; models whose loss it cannot divide for."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from probattn.errors import InputError
from probattn.hf.layers import AttentionLayer, attention_layer
from probattn.hf.layers.build import find_site
from probattn.hf.layers.families.registry import Site, family_of

__all__ = ["FoundLayer", "first_decoder_layer", "require_causal_head", "residual_layers"]

_KERNELS = ("eager", "sdpa", "flash")


class FoundLayer(NamedTuple):
    """A decoder layer and its attention sublayer.

    Attributes:
        site: its modules.
        layer: the sublayer as an attention, which reads the parameters at each call.
    """

    site: Site
    layer: AttentionLayer


def residual_layers(model: Any) -> list[FoundLayer]:
    """The attention sublayers of a model on its residual stream, each compared with the model's own code.

    Layers of linear attention and attention to an encoder are no such sublayers. A decoder layer that stands in the
    list twice is found once; it runs, and then counts, twice.

    Args:
        model: a model of ``transformers``.

    Returns:
        One entry per decoder layer, in order.

    Raises:
        InputError: a model type that is not covered, an attention function whose masks cannot be read, or a layer that
            does not compute what its model type stands for.
    """
    family = family_of(model)
    kernel = str(getattr(model.config, "_attn_implementation", None) or "eager")
    if not kernel.startswith(_KERNELS):
        raise InputError(
            f"the attention of {type(model).__name__} is {kernel!r}, whose masks cannot be read; load it with "
            "attn_implementation='sdpa'."
        )
    find_site(model, family, 0)  # refuses a model without layers
    body = getattr(model, "base_model", model)
    body = getattr(body, "language_model", body)
    count = len(getattr(body, family.layers))
    found: dict[int, FoundLayer] = {}
    for number in range(count):
        site = find_site(model, family, number)
        if id(site.block) not in found:
            found[id(site.block)] = FoundLayer(site, attention_layer(model, number))
    return list(found.values())


def first_decoder_layer(model: Any) -> nn.Module:
    """The first of the decoder layers, whose input are the embeddings.

    Args:
        model: a model of ``transformers``.

    Raises:
        InputError: no list of as many modules as the configuration has layers.
    """
    body = getattr(model, "base_model", model)
    count = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module[0]
    raise InputError(
        f"{type(model).__name__} has no list of {count} decoder layers, in front of which the embeddings could be "
        "read; pass the module whose first input they are: attach_barrier(..., site=module)."
    )


def require_causal_head(model: Any) -> None:
    """Refuse a model whose loss is no mean over predicted tokens, by which the penalty is divided.

    Args:
        model: a causal language model of ``transformers``, or a body without a head.

    Raises:
        InputError: no model of ``transformers``; one that classifies, rewards, answers, or has an encoder.
    """
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        raise InputError("needs transformers; install probattn[lm].") from None
    name, config = type(model).__name__, getattr(model, "config", None)
    if config is None or not hasattr(model, "base_model"):
        raise InputError(
            f"{name} is no model of transformers; pass one, such as AutoModelForCausalLM.from_pretrained(..)."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{name} has an encoder; the barrier is that of causal language models.")
    causal = {one for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for one in _as_tuple(names)}
    bare = model.base_model is model
    if not bare and not any(kind.__name__ in causal for kind in type(model).__mro__):
        raise InputError(
            f"the loss of {name} is no mean over predicted tokens, by which the penalty could be divided; attach the "
            "barrier to a causal language model (...ForCausalLM, ...LMHeadModel), or to its body model.base_model with "
            "handle.couple(loss)."
        )


def _as_tuple(names: Any) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)
