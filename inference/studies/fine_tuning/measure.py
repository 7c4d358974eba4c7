"""Loss of true continuations after clean, corrupted and attacked contexts, and margins on the residual stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from probattn.hf.margins import margins
from probattn.inference.studies.fine_tuning.pairs import Encode, Pair, corrupt_text
from probattn.inference.studies.fine_tuning.plan import CLEAN, FAMILIES, OTHER
from probattn.inference.studies.robustness.corruptions import label
from probattn.inference.studies.robustness.evaluation import Array
from probattn.inference.studies.robustness.regularisers import adversarial_step
from probattn.inference.studies.robustness.training import stream

__all__ = ["continuation_bits", "measure_margins", "measure_model"]

_STEPS = 4  # of an attack: nine forward passes with the last evaluation


def continuation_bits(model: Any, u: Tensor, continuation: Tensor) -> Tensor:
    """Compute the mean cross-entropy of a continuation in bits per token.

    Args:
        model: causal language model.
        u: embeddings of the context, ``(1, T, p)``.
        continuation: tokens to predict, ``(C,)``.

    Returns:
        The loss, 0-dimensional.
    """
    goal = continuation.to(u.device)
    whole = torch.cat([u, model.get_input_embeddings()(goal)[None]], 1)
    logits = model(inputs_embeds=whole).logits[0, u.shape[1] - 1 : -1]
    return F.cross_entropy(logits.float(), goal) / math.log(2)


def measure_model(
    model: Any, pairs: Sequence[Pair], others: Sequence[Pair], encode: Encode, context: int, reference: str, seed: int
) -> dict[str, Array]:
    """Measure the loss of continuations under every corruption of their contexts.

    Args:
        model: causal language model in evaluation mode; its parameters are left without gradients.
        pairs: contexts and continuations from the text that is like the training text.
        others: the same from another kind of text.
        encode: tokeniser.
        context: number of tokens of a context at most; the last ones are kept.
        reference: text whose frequencies substitutions follow.
        seed: random seed of the corruptions.

    Returns:
        Bits per token of each continuation, by "clean", corruption, and "another text".
    """
    model.requires_grad_(False)
    device = next(model.parameters()).device

    def embedded(text: str) -> Tensor:
        ids = torch.tensor(list(encode(text))[-context:], device=device)
        found: Tensor = model.get_input_embeddings()(ids[None])
        return found

    found: dict[str, list[float]] = {}
    for number, pair in enumerate(pairs):
        clean = embedded(pair.text)
        found.setdefault(CLEAN, []).append(_bits(model, clean, pair))
        for family, levels in FAMILIES.items():
            for level in levels:
                generator = torch.Generator().manual_seed(stream(family, level, seed, number))
                if family == "embedding attack":
                    bits = _attacked(model, clean, pair.continuation, level)
                elif family == "relative noise":
                    size = level * float(clean.square().mean().sqrt())
                    noise = torch.randn(clean.shape, generator=generator).to(clean)
                    bits = _bits(model, clean + size * noise, pair)
                else:
                    text = corrupt_text(pair.text, family, level, reference, generator)
                    bits = _bits(model, embedded(text), pair)
                found.setdefault(label(family, level), []).append(bits)
    found[OTHER] = [_bits(model, embedded(pair.text), pair) for pair in others]
    return {name: np.array(values) for name, values in found.items()}


@torch.no_grad()
def _bits(model: Any, u: Tensor, pair: Pair) -> float:
    return float(continuation_bits(model, u, pair.continuation))


def _attacked(model: Any, clean: Tensor, continuation: Tensor, radius: float) -> float:
    """Worst loss found within a ball around each embedding of the context, in proportion to its norm."""
    limit = radius * clean.norm(dim=-1, keepdim=True)
    shift, worst = torch.zeros_like(clean), -math.inf
    for step in range(_STEPS):
        u = (clean + shift).requires_grad_()
        bits = continuation_bits(model, u, continuation)
        (gradient,) = torch.autograd.grad(bits, u)
        worst = max(worst, float(bits.detach()))
        shift = shift + adversarial_step(clean, gradient, radius if step == 0 else 2 * radius / _STEPS) - clean
        shift = shift * (limit / shift.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
    with torch.no_grad():
        return max(worst, float(continuation_bits(model, clean + shift, continuation)))


def measure_margins(model: Any, ids: Tensor, positions: int = 4) -> dict[str, float]:
    """Measure determinants and smallest singular values on the residual stream.

    Args:
        model: causal language model in evaluation mode.
        ids: tokens of one text, ``(T,)``.
        positions: number of positions, the last ones.

    Returns:
        Quantiles over positions and layers, and the share of negative determinants, by name.
    """
    where = list(range(max(0, len(ids) - positions), len(ids)))
    found = margins(model, ids[None], ("logabsdet", "sigma_min"), positions=where, maps=("generator",))
    smallest = found["sigma_min"].values
    return {
        "determinant_negative": float((found["sign"].values < 0).mean()),
        "logabsdet_0.5": float(np.median(found["logabsdet"].values)),
        "singular_value_0.1": float(np.quantile(smallest, 0.1)),
        "singular_value_0.5": float(np.median(smallest)),
    }
