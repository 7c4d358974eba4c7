"""A view of the queries, keys and values of every attention layer of a ``transformers`` model, while it runs.

An attention function and a mask function are registered under one name and selected in the model; the first delegates
to torch's fused attention (or to the model's own eager code where the logits are capped) and shows its arguments to
whoever observes the layer. The mask function matters: without one under the same name, masks are skipped silently.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from probattn.errors import InputError

__all__ = ["BACKEND", "LayerCall", "Observer", "attention_layers", "observe", "padding_of"]

# Not "...sdpa...": transformers 5.24 takes such a name for torch's own and refuses it where logits are capped.
BACKEND = "probattn"
_SITE = "_probattn_site"
# For each config whose models are observed: the config, its own choice of attention, and by how many observers. By
# identity, as configs have no hash; kept here, as what is set on a config is saved with it.
_CHOICES: dict[int, _Choice] = {}


class LayerCall(NamedTuple):
    """One call of one attention layer.

    Attributes:
        layer: its number.
        query: (batch, H, T, r), after rotation and normalisation.
        key, value: (batch, K, S, .), not repeated for heads that share them.
        mask: which tokens are seen, (batch, 1, T, S) boolean; None: all up to the position itself.
        scale: c.
        window: of a sliding-window layer whose mask does not say it already.
        softcap: tau of capped logits.
        causal: whether the layer looks back only.
        training: whether the model is being trained.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    window: int | None
    softcap: float | None
    causal: bool
    training: bool


class Observer(Protocol):
    """Sees the calls and may add something to a layer's output."""

    def __call__(self, call: LayerCall, output: Tensor) -> Tensor:
        """Return the output, the same in value."""


@dataclass
class _Site:
    """State of an attention layer while it is observed."""

    observers: list[Observer] = field(default_factory=list)
    eager: Callable[..., Any] | None = None


@dataclass
class _Choice:
    """The attention that a config had before its models were observed."""

    config: Any
    before: str
    observers: int = 0


def attention_layers(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """The attention layers of a model by number, with their names.

    Raises:
        InputError: the model does not use the attention interface of ``transformers``, or has no layers in it.
    """
    able = getattr(model, "_can_set_attn_implementation", None)
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if able is None or not able():
        raise InputError(
            f"model type {kind!r} does not use the attention interface of transformers, through which queries, keys "
            "and values are read; use another architecture (GPT-2, Llama, Mistral, Gemma, Qwen, ...), or call "
            "probattn.penalty.attention_penalty in your own attention."
        )
    found = {
        module.layer_idx: (name, module)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layer_idx", None), int)
        and "attention" in type(module).__name__.lower()
        and getattr(module, "is_causal", True)  # attention across to an encoder has the number of its layer too
    }
    if not found:
        raise InputError(f"model type {kind!r} has no numbered attention layers; it cannot be observed.")
    return dict(sorted(found.items()))


def observe(model: Any, observer: Observer) -> Callable[[], None]:
    """Show every attention call of a model to an observer.

    Args:
        model: a ``PreTrainedModel`` whose architecture uses the attention interface. Models that share one config
            object share the choice of attention, which ends with the last observer; those that nobody observes run as
            before.
        observer: called once a layer and pass.

    Returns:
        A function that ends it and restores the model's own attention; a second call does nothing.

    Raises:
        InputError: see :func:`attention_layers`.
    """
    _register()
    layers = attention_layers(model)
    key = id(model.config)
    choice = _CHOICES.get(key) or _Choice(model.config, model.config._attn_implementation)
    model.set_attn_implementation(BACKEND)
    _CHOICES[key] = choice
    choice.observers += 1
    sites = []
    for _, module in layers.values():
        site = module.__dict__.setdefault(_SITE, _Site(eager=_own_eager(module)))
        site.observers.append(observer)
        sites.append((module, site))

    def stop() -> None:
        if not sites:
            return
        for module, site in sites:
            site.observers.remove(observer)
            if not site.observers:
                module.__dict__.pop(_SITE, None)
        sites.clear()
        choice.observers -= 1
        if not choice.observers:
            del _CHOICES[key]
            model.set_attn_implementation(choice.before)

    return stop


def padding_of(mask: Tensor | None, length: int) -> Tensor | None:
    """True for tokens that are not padding, (batch, T), read off the mask: no position sees the key of padding.

    Args:
        mask: (batch, 1, T, S), boolean or additive, or (batch, S) with zeros on padding; None: no padding.
        length: T, the last of the S tokens.
    """
    if mask is None:
        return None
    if mask.dim() == 2:
        return mask[:, -length:].bool()
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return allowed[:, 0, :, mask.shape[-1] - length :].diagonal(dim1=-2, dim2=-1)


def _register() -> None:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        raise InputError("needs transformers; install probattn[lm].") from None
    AttentionInterface.register(BACKEND, _attention)
    AttentionMaskInterface.register(BACKEND, sdpa_mask)


def _own_eager(module: nn.Module) -> Callable[..., Any] | None:
    return getattr(inspect.getmodule(type(module)), "eager_attention_forward", None)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that is registered."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    site: _Site | None = module.__dict__.get(_SITE)
    softcap = options.get("softcap")
    for name in ("s_aux", "position_bias"):
        if options.get(name) is not None and site is not None:
            raise InputError(
                f"{type(module).__name__} uses {name} (attention sinks or learnt biases), for which the barrier is not "
                "derived; use another architecture."
            )
    if softcap is None:
        output, weights = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    else:
        eager = _own_eager(module) if site is None else site.eager
        if eager is None:
            raise InputError(f"{type(module).__name__} caps its logits and has no eager attention to fall back on.")
        additive = _additive(attention_mask, query, key)
        output, weights = eager(module, query, key, value, additive, dropout=dropout, scaling=scaling, **options)
    if site is not None:
        causal = options.get("is_causal")
        length = query.shape[2]
        if attention_mask is None and 1 < length < key.shape[2]:
            # A prompt in a static cache: the slots behind it are still empty, and torch's attention skips them too.
            key, value = key[:, :, :length], value[:, :, :length]
        call = LayerCall(
            module.layer_idx,  # type: ignore[arg-type]
            query,
            key,
            value,
            attention_mask,
            1 / math.sqrt(query.shape[-1]) if scaling is None else float(scaling),
            None if attention_mask is not None else options.get("sliding_window"),
            softcap,
            bool(getattr(module, "is_causal", True) if causal is None else causal),
            module.training,
        )
        for observer in site.observers:
            output = observer(call, output)
    return output, weights


def _additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask to be added to the logits, as eager code expects it."""
    if mask is None:
        length, seen = query.shape[2], key.shape[2]
        if length == 1:
            return None
        mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)[None, None]
    if mask.dtype != torch.bool:
        return mask
    # Eager code takes the softmax in float32, where the lowest number of float64 is infinite: a row that sees nothing
    # would become NaN.
    lowest = max(torch.finfo(query.dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
