"""The loss of a model on held-out windows, clean, corrupted and under attack, and its sensitivity."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probattn.inference.studies.robustness.attacks import attack_characters, attack_embeddings, window_bits
from probattn.inference.studies.robustness.corruptions import (
    CLEAN,
    FAMILIES,
    delete_characters,
    keyboard_neighbours,
    label,
    mistype_characters,
    substitute_characters,
    swap_characters,
)
from probattn.inference.studies.robustness.sensitivity import noise_terms, replacement_sensitivity
from probattn.inference.studies.robustness.training import stream
from probattn.models.corpus import Corpus, Windows
from probattn.models.gpt import CharacterGPT

__all__ = ["MEASURES", "Array", "Text", "evaluate"]

Array = NDArray[np.float64]

#: What is measured beside losses: a share of predictions, and two terms in bits per character under relative noise.
MEASURES = ("sensitivity", "noise bias", "noise first order")
SMALL_NOISE = 0.1  # of which the two terms are measured, as a fraction of the root mean square of the embeddings


class Text(NamedTuple):
    """A training text as corruptions need it.

    Attributes:
        frequency: count of every character, (V,).
        neighbours: neighbours of every letter on a keyboard, (V, 8).
    """

    frequency: Tensor
    neighbours: Tensor

    @classmethod
    def of(cls, corpus: Corpus) -> Text:
        """Read off a corpus what corruptions need.

        Args:
            corpus: text to train on.
        """
        frequency = torch.bincount(corpus.encode(corpus.text), minlength=len(corpus.vocabulary))
        return cls(frequency, keyboard_neighbours(corpus.vocabulary))


def evaluate(model: CharacterGPT, windows: Windows, text: Text, seed: int) -> Mapping[str, Array]:
    """Measure the loss of every window under every corruption, and :data:`MEASURES`.

    Args:
        model: model, on the device of the windows; its parameters are left without gradients.
        windows: held-out text, (W, T).
        text: training text.
        seed: random seed; the draws of a corruption depend on it and on the corruption alone.

    Returns:
        One number per window, (W,) each, by "clean", :func:`label` and the names of :data:`MEASURES`. No entry costs
        more than ten forward passes.
    """
    wanted = [part.requires_grad for part in model.parameters()]
    model.requires_grad_(False)  # gradients run to the embeddings alone
    try:
        found = _evaluate(model, windows, text, seed)
    finally:
        for part, needed in zip(model.parameters(), wanted, strict=True):
            part.requires_grad_(needed)
    return {name: values.double().cpu().numpy() for name, values in found.items()}


def _evaluate(model: CharacterGPT, windows: Windows, text: Text, seed: int) -> dict[str, Tensor]:
    tokens, targets = windows
    with torch.no_grad():
        clean = model.embed(tokens)
        spread = float(clean.square().mean().sqrt())
        found = {CLEAN: window_bits(model, clean, targets)}
    for family, levels in FAMILIES.items():
        if family == "character attack":
            counts = [min(int(level), tokens.shape[1]) for level in levels]
            attacked = attack_characters(model, tokens, targets, counts, text.frequency.to(tokens.device) > 0)[0]
            found |= {label(family, level): bits for level, bits in zip(levels, attacked, strict=True)}
            continue
        for level in levels:
            generator = torch.Generator().manual_seed(stream(family, level, seed))
            if family == "embedding attack":
                bits = attack_embeddings(model, tokens, targets, level)
            else:
                with torch.no_grad():
                    bits = _corrupted(model, windows, text, family, level, clean, spread, generator)
            found[label(family, level)] = bits
    generator = torch.Generator().manual_seed(stream("sensitivity", seed))
    found["sensitivity"] = replacement_sensitivity(model, tokens, text.frequency, generator)
    generator = torch.Generator().manual_seed(stream("noise terms", seed))
    terms = noise_terms(model, tokens, targets, SMALL_NOISE * spread, generator)
    found["noise bias"], found["noise first order"] = terms
    return found


def _corrupted(
    model: CharacterGPT,
    windows: Windows,
    text: Text,
    family: str,
    level: float,
    clean: Tensor,
    spread: float,
    generator: torch.Generator,
) -> Tensor:
    tokens, targets = windows
    if family == "deletions":
        tokens, targets, kept = delete_characters(tokens, targets, level, generator)
        return window_bits(model, model.embed(tokens), targets, kept)
    if family == "swaps":
        tokens = swap_characters(tokens, level, generator)
    elif family == "substitutions":
        tokens = substitute_characters(tokens, level, text.frequency, generator)
    elif family == "typos":
        tokens = mistype_characters(tokens, level, text.neighbours, generator)
    else:
        size = level * spread if family == "relative noise" else level
        return window_bits(model, clean + size * torch.randn(clean.shape, generator=generator).to(clean), targets)
    return window_bits(model, model.embed(tokens), targets)
