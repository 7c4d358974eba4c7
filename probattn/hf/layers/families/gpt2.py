"""GPT-2: LayerNorm and biases; positions enter with the embeddings, so that nothing is rotated."""

from __future__ import annotations

from probattn.hf.layers.families import read
from probattn.hf.layers.families.registry import Site, register
from probattn.hf.layers.sublayer import Sublayer
from probattn.hf.layers.tokenwise import Projection

__all__ = ["describe"]


@register("gpt2", layers="h", attention="attn")
def describe(site: Site) -> Sublayer:
    """Read the sublayer of a GPT-2 model, whose queries, keys and values come from one map."""
    attention = site.attention
    fused = read.projection(attention, "c_attn", attention.head_dim)  # 3 H heads
    biases = (None, None, None) if fused.bias is None else fused.bias.chunk(3)
    parts = zip(fused.weight.chunk(3), biases, strict=True)
    query, key, value = (Projection(weight, bias) for weight, bias in parts)
    output, output_bias = read.output_map(attention, "c_proj", attention.head_dim)
    return Sublayer(
        norm=read.layer_norm(site.block.ln_1),
        query=query,
        key=key,
        value=value,
        output=output,
        output_bias=output_bias,
        scale=attention.scaling,
    )
