"""Controls for margins of language models: other weights, other output maps, another order of the words.

In hundreds of dimensions a random block is inside the boundary too, so that margins say something about training only
beside those of a control.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.layers import AttentionLayer, attention_layer
from probattn.hf.layers.build import find_site
from probattn.hf.layers.families.registry import family_of
from probattn.hf.layers.sublayer import Sublayer
from probattn.hf.streams import Text
from probattn.numerics.random import isolated_seed

__all__ = ["Control", "controlled_layer", "redrawn", "shuffled", "turned_model"]

Control = Literal["none", "random_weights", "turned_output", "turned_outputs", "exchanged_output", "shuffled_text"]
"""Names of the controls:

- ``random_weights``: a model of the same kind with weights as it would begin its training.
- ``turned_output``: the output map of the layer in question is turned by a random rotation of the stream, which itself
  is the model's own.
- ``turned_outputs``: the output maps of all layers are turned in the model, so that the streams are others.
- ``exchanged_output``: the layer has the output map of another layer, on the model's own stream.
- ``shuffled_text``: the tokens of each sequence in random order, behind a token that begins the text.
"""


def redrawn(model: Any, seed: int) -> Any:
    """A model of the same kind with weights as it would begin its training."""
    with isolated_seed(seed):
        fresh = type(model)(model.config)
    weight = next(model.parameters())
    return fresh.to(weight.device, weight.dtype).eval()


def shuffled(model: Any, text: Text, seed: int) -> Text:
    """The text with its tokens in random order; a first token that is the model's mark of a beginning stays."""
    generator = torch.Generator().manual_seed(seed)
    begin = getattr(model.config, "bos_token_id", None)
    ids = text.ids.cpu().clone()
    for number, row in enumerate(ids):
        places = torch.arange(len(row)) if text.mask is None else text.mask[number].cpu().nonzero().squeeze(-1)
        places = places[1:] if begin is not None and int(row[places[0]]) == begin else places
        ids[number, places] = row[places[torch.randperm(len(places), generator=generator)]]
    return text._replace(ids=ids.to(text.ids.device))


def controlled_layer(model: Any, number: int, count: int, control: Control, seed: int) -> AttentionLayer:
    """The layer as a control has it.

    Args:
        model: the causal model.
        number: of the layer, from 0.
        count: number of layers.
        control: name of the control.
        seed: random seed of its rotations and of the order of its layers.
    """
    layer = attention_layer(model, number).detach()
    if control in {"turned_output", "turned_outputs"}:
        return _turned(layer, seed + number)
    if control == "exchanged_output":
        return _with_output_of(layer, attention_layer(model, _partner(number, count, seed)).detach())
    return layer


@contextmanager
def turned_model(model: Any, count: int, seed: int) -> Iterator[None]:
    """Turn the output of the attention in all layers of a model, as ``turned_outputs`` has it, until the end."""
    family, hooks = family_of(model), []
    try:
        for number in range(count):
            attention = find_site(model, family, number).attention
            hooks.append(attention.register_forward_hook(_Turn(seed + number)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Turn:
    """A hook that turns what an attention module returns."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def __call__(self, module: Any, args: Any, output: Any) -> Any:
        mean = output[0] if isinstance(output, tuple) else output
        turned = mean @ _rotation(mean.shape[-1], self._seed).to(mean).mT
        return (turned, *output[1:]) if isinstance(output, tuple) else turned


def _rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, uniform over the group (Mezzadri, 2007, Notices of the AMS 54)."""
    generator = torch.Generator().manual_seed(seed)
    orthogonal, upper = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    turn: Tensor = orthogonal * upper.diagonal().sign()
    return turn


def _turned(layer: AttentionLayer, seed: int) -> AttentionLayer:
    own = layer.sublayer
    turn = _rotation(layer.dim, seed).to(own.output)
    bias = None if own.output_bias is None else turn @ own.output_bias
    turned: Sublayer = own._replace(output=torch.einsum("ij,jhd->ihd", turn, own.output), output_bias=bias)
    return replace(layer, read=lambda: turned)


def _with_output_of(layer: AttentionLayer, other: AttentionLayer) -> AttentionLayer:
    own, theirs = layer.sublayer, other.sublayer
    if own.output.shape != theirs.output.shape:
        raise InputError(
            f"control exchanged_output needs output maps of one shape; layers {layer.number} and {other.number} have "
            f"{tuple(own.output.shape)} and {tuple(theirs.output.shape)}."
        )
    exchanged: Sublayer = own._replace(output=theirs.output.to(own.output), output_bias=theirs.output_bias)
    return replace(layer, read=lambda: exchanged)


def _partner(number: int, count: int, seed: int) -> int:
    """The layer whose output map a layer is given: no layer keeps its own (Sattolo's cycle)."""
    if count < 2:
        raise InputError("control exchanged_output needs a model of at least two layers.")
    order = list(range(count))
    generator = torch.Generator().manual_seed(seed)
    for last in range(count - 1, 0, -1):
        other = int(torch.randint(last, (1,), generator=generator))
        order[last], order[other] = order[other], order[last]
    return order[number]
