"""Families of language models whose attention sublayers are covered, by the ``model_type`` of their configuration.

To cover a further one, write a module here with a function that returns the
:class:`~probattn.hf.layers.sublayer.Sublayer` of a layer, decorated with :func:`~.registry.register`, and import it
below.
"""

from probattn.hf.layers.families import gemma, gpt2, gpt_neox, llama, phi, qwen3
from probattn.hf.layers.families.registry import Site, covered, family_of, register

__all__ = ["Site", "covered", "family_of", "gemma", "gpt2", "gpt_neox", "llama", "phi", "qwen3", "register"]
