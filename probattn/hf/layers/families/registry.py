"""The register of families, and the refusal of what is not in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from probattn.errors import InputError
from probattn.hf.layers.sublayer import Sublayer

__all__ = ["Describe", "Family", "Site", "covered", "family_of", "register"]


class Site(NamedTuple):
    """Place of an attention sublayer in its model.

    Attributes:
        block: the decoder layer, whose first argument is the residual stream.
        attention: the attention module, with the norm in front of it already applied to its argument.
        last: the module whose output is added to the stream: the attention, or the norm behind it.
        rotary: the model's rotary embedding; None: there is none.
        number: of the layer.
    """

    block: Any
    attention: Any
    last: nn.Module
    rotary: nn.Module | None
    number: int


Describe = Callable[[Site], Sublayer]


class Family(NamedTuple):
    """Layout of the layers in the models of a family.

    Attributes:
        describe: reads the parameters of a site.
        layers: name of the list of decoder layers in the model's body.
        attention: name of the attention module in a decoder layer.
        last: name of the norm behind the attention in a decoder layer; None: there is none.
    """

    describe: Describe
    layers: str
    attention: str
    last: str | None


_FAMILIES: dict[str, Family] = {}


def register(
    *model_types: str, layers: str = "layers", attention: str = "self_attn", last: str | None = None
) -> Callable[[Describe], Describe]:
    """Enter a function that describes the attention sublayers of some model types.

    Args:
        model_types: values of ``config.model_type``.
        layers: see :class:`Family`.
        attention: the same.
        last: the same.
    """

    def enter(describe: Describe) -> Describe:
        for model_type in model_types:
            _FAMILIES[model_type] = Family(describe, layers, attention, last)
        return describe

    return enter


def covered() -> list[str]:
    """The model types that are covered, in alphabetical order."""
    return sorted(_FAMILIES)


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Args:
        model: a model of ``transformers``.

    Raises:
        InputError: no configuration, or a model type that is not covered.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise InputError(
            f"{type(model).__name__} has no config.model_type; pass a model of transformers, such as "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if model_type not in _FAMILIES:
        raise InputError(
            f"model type {model_type!r} is not covered: nothing says how its attention sublayer is put together; "
            f"covered are {', '.join(covered())}. A further family is one short file in probattn/hf/layers/families."
        )
    return _FAMILIES[model_type]
