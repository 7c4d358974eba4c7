"""A small language model in a folder, with a text, for the tests that fit one of its layers."""

import numpy as np
import torch

from probattn.models.causal_lm import CharacterTokeniser, build_causal_lm
from probattn.models.corpus import UNKNOWN

CHARACTERS = (*"abcdefgh .", UNKNOWN)
SMALL = {"tokens": 8, "positions": 4, "layer": 0}


def write_small_folder(path):
    """Write a Llama of two layers with 8 features, its tokeniser, and ``text.txt``; returns the folder."""
    torch.manual_seed(0)
    build_causal_lm("llama", len(CHARACTERS), 2, 8, 2, 32).save_pretrained(path)
    CharacterTokeniser(CHARACTERS).save(path)
    generator = np.random.default_rng(0)
    (path / "text.txt").write_text("".join(generator.choice(list("abcdefgh ."), 200)), encoding="utf-8")
    return path
