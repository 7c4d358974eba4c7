"""Gemma 2 and 3: gains of 1 + weight, norms in front and behind, capped logits (2), norms of queries and keys (3)."""

from __future__ import annotations

from functools import partial

from probattn.hf.layers.families import llama, read
from probattn.hf.layers.families.registry import Site, register
from probattn.hf.layers.sublayer import Sublayer

__all__ = ["describe_gemma2", "describe_gemma3"]

_norm = partial(read.rms_norm, one_plus=True)


@register("gemma2", last="post_attention_layernorm")
def describe_gemma2(site: Site) -> Sublayer:
    """Read the sublayer of a Gemma 2 model."""
    return llama.describe(site)._replace(
        norm=_norm(site.block.input_layernorm),
        output_norm=_norm(site.last),
        softcap=site.attention.attn_logit_softcapping,
    )


@register("gemma3", "gemma3_text", last="post_attention_layernorm")
def describe_gemma3(site: Site) -> Sublayer:
    """Read the sublayer of a Gemma 3 model; local and global layers rotate by different frequencies.

    Its cap on the logits is in the configuration, and its attention does not use it.
    """
    return llama.describe(site)._replace(
        norm=_norm(site.block.input_layernorm),
        query_norm=_norm(site.attention.q_norm),
        key_norm=_norm(site.attention.k_norm),
        output_norm=_norm(site.last),
        rotary=read.rotary(site.rotary, layer_type=site.attention.layer_type),
    )
