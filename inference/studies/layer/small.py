"""Small attention sublayers with random weights, whose heads have an effect that can be measured."""

from __future__ import annotations

from typing import Any

import torch

from probattn.hf import attention_layer
from probattn.hf.layers import AttentionLayer
from probattn.models.causal_lm import build_causal_lm
from probattn.numerics.random import isolated_seed

__all__ = ["random_layer"]


def random_layer(dim: int, heads: int, length: int, *, strength: float, seed: int) -> AttentionLayer:
    """The attention of a Llama layer with normal weights, in double precision.

    Args:
        dim: number p of features.
        heads: number H of heads, of p / H features each.
        length: largest number of tokens.
        strength: scale of the update of the stream beside normalised tokens.
        seed: random seed of the weights.
    """
    with isolated_seed(seed):
        model: Any = build_causal_lm("llama", 8, 1, dim, heads, length + 1)
        attention = model.model.layers[0].self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            torch.nn.init.normal_(getattr(attention, name).weight, std=dim**-0.5)
        # Heads that copy, as half of the output is the transpose of the value map, change volumes the most.
        torch.nn.init.normal_(attention.o_proj.weight, std=dim**-0.5)
        weight = strength * (attention.o_proj.weight + attention.v_proj.weight.T) / 2**0.5
        attention.o_proj.weight = torch.nn.Parameter(weight.detach())
    return attention_layer(model, 0, dtype=torch.float64).detach()
