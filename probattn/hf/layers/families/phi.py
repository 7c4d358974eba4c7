"""Phi 1, 1.5 and 2: LayerNorm, biases, partial rotation, parallel residual, sometimes norms of queries and keys."""

from __future__ import annotations

from probattn.hf.layers.families import read
from probattn.hf.layers.families.registry import Site, register
from probattn.hf.layers.sublayer import Sublayer

__all__ = ["describe"]


@register("phi")
def describe(site: Site) -> Sublayer:
    """Read the sublayer of a Phi model."""
    attention = site.attention
    output, output_bias = read.output_map(attention, "dense", attention.head_dim)
    return Sublayer(
        norm=read.layer_norm(site.block.input_layernorm),
        query=read.projection(attention, "q_proj", attention.head_dim),
        key=read.projection(attention, "k_proj", attention.head_dim),
        value=read.projection(attention, "v_proj", attention.head_dim),
        query_norm=read.layer_norm(attention.q_layernorm) if attention.qk_layernorm else None,
        key_norm=read.layer_norm(attention.k_layernorm) if attention.qk_layernorm else None,
        output=output,
        output_bias=output_bias,
        rotary=read.rotary(site.rotary),
        scale=attention.scaling,
    )
