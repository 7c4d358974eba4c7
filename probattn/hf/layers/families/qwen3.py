"""Qwen3: as Llama, with norms of queries and keys."""

from __future__ import annotations

from probattn.hf.layers.families import llama, read
from probattn.hf.layers.families.registry import Site, register
from probattn.hf.layers.sublayer import Sublayer

__all__ = ["describe"]


@register("qwen3")
def describe(site: Site) -> Sublayer:
    """Read the sublayer of a Qwen3 model."""
    return llama.describe(site)._replace(
        query_norm=read.rms_norm(site.attention.q_norm), key_norm=read.rms_norm(site.attention.k_norm)
    )
