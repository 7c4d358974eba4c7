"""Llama and its kin: root-mean-square norm, rotation, heads that share keys, sometimes biases or a sliding window."""

from __future__ import annotations

from probattn.hf.layers.families import read
from probattn.hf.layers.families.registry import Site, register
from probattn.hf.layers.sublayer import Sublayer

__all__ = ["describe"]


@register("llama", "mistral", "qwen2")
def describe(site: Site) -> Sublayer:
    """Read the sublayer of a Llama, SmolLM, Mistral or Qwen2 model."""
    attention, config = site.attention, site.attention.config
    # Qwen2 says by layer whether there is a window, Mistral for all of them, Llama has none.
    window = getattr(attention, "sliding_window", config.sliding_window if config.model_type == "mistral" else None)
    output, output_bias = read.output_map(attention, "o_proj", attention.head_dim)
    return Sublayer(
        norm=read.rms_norm(site.block.input_layernorm),
        query=read.projection(attention, "q_proj", attention.head_dim),
        key=read.projection(attention, "k_proj", attention.head_dim),
        value=read.projection(attention, "v_proj", attention.head_dim),
        output=output,
        output_bias=output_bias,
        rotary=read.rotary(site.rotary),
        scale=attention.scaling,
        window=window,
    )
