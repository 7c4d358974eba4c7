"""GPT-NeoX and Pythia: LayerNorm, biases, partial rotation; the parallel residual leaves the attention branch alone."""

from __future__ import annotations

from probattn.hf.layers.families import read
from probattn.hf.layers.families.registry import Site, register
from probattn.hf.layers.sublayer import Sublayer
from probattn.hf.layers.tokenwise import Projection

__all__ = ["describe"]


@register("gpt_neox", attention="attention")
def describe(site: Site) -> Sublayer:
    """Read the sublayer of a GPT-NeoX model, whose fused map keeps query, key and value of a head side by side."""
    attention = site.attention
    fused = read.projection(attention, "query_key_value", 3 * attention.head_size)
    weights = fused.weight.chunk(3, 1)  # (H, r, p) each
    biases = (None, None, None) if fused.bias is None else fused.bias.chunk(3, 1)
    query, key, value = (Projection(weight, bias) for weight, bias in zip(weights, biases, strict=True))
    output, output_bias = read.output_map(attention, "dense", attention.head_size)
    return Sublayer(
        norm=read.layer_norm(site.block.input_layernorm),
        query=query,
        key=key,
        value=value,
        output=output,
        output_bias=output_bias,
        rotary=read.rotary(site.rotary),
        scale=attention.scaling,
    )
