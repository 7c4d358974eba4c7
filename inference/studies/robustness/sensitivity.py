r"""Why a loss moves under noise: the part of first order, which has mean zero, and the bias, which is the harm.

In the expansion of the loss L of a window under normal noise d,

.. math:: L(u + d) - L(u) = \nabla L^\top d + \tfrac12 d^\top H d + \ldots

the first term has mean zero and the mean of the second is the bias.

A margin of the Jacobian bounds the first; the expected loss is raised by the second alone (after arXiv 2605.29816).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.errors import require_at_least, require_positive
from probattn.inference.studies.robustness.attacks import window_bits
from probattn.inference.studies.robustness.corruptions import substitute_characters
from probattn.models.gpt import CharacterGPT

__all__ = ["NoiseTerms", "noise_terms", "replacement_sensitivity"]


class NoiseTerms(NamedTuple):
    """Effects of noise on the loss of each window, in bits per character.

    Attributes:
        bias: E L(u + d) - L(u), estimated from pairs of noise with both signs, ``(N,)``.
        first_order: standard deviation of the linear part, ``size |grad L|``, ``(N,)``.
    """

    bias: Tensor
    first_order: Tensor


def noise_terms(
    model: CharacterGPT, tokens: Tensor, targets: Tensor, size: float, generator: torch.Generator, pairs: int = 2
) -> NoiseTerms:
    r"""Measure the bias and the first-order term of noise on the embeddings.

    .. math:: \frac1{2K} \sum_k L(u + d_k) + L(u - d_k) - 2 L(u)

    Args:
        model: model.
        tokens: characters, ``(N, T)``.
        targets: characters to predict, ``(N, T)``.
        size: standard deviation of the noise.
        generator: random generator on the CPU.
        pairs: number K of pairs.

    Returns:
        Both terms. Time: ``2 K + 2`` forward passes.

    Raises:
        InputError: a size that is not positive, or no pair.
    """
    require_positive("size", size)
    require_at_least("pairs", pairs)
    u = model.embed(tokens).detach().requires_grad_()
    bits = window_bits(model, u, targets)
    (gradient,) = torch.autograd.grad(bits.sum(), u)
    bias = torch.zeros_like(bits)
    with torch.no_grad():
        for _ in range(pairs):
            noise = size * torch.randn(u.shape, generator=generator).to(u)
            both = window_bits(model, u + noise, targets) + window_bits(model, u - noise, targets)
            bias += (both - 2 * bits) / (2 * pairs)
    return NoiseTerms(bias.detach(), size * gradient.flatten(1).norm(dim=1))


@torch.no_grad()
def replacement_sensitivity(
    model: CharacterGPT, tokens: Tensor, frequency: Tensor, generator: torch.Generator
) -> Tensor:
    r"""Measure how often one replaced character changes a prediction.

    .. math:: \frac1{T - i} \sum_{j \ge i} 1\{\arg\max f_j(y) \ne \arg\max f_j(y^{(i)})\}

    with one random position i per window, in the spirit of the sensitivity of Vasudeva et al. (2024, arXiv 2403.06925),
    whose models have a single prediction.

    Args:
        model: model.
        tokens: characters, ``(N, T)``.
        frequency: count of every character in the training text, ``(V,)``.
        generator: random generator on the CPU.

    Returns:
        Share of the predictions from the replaced character on that change, ``(N,)``. Time: two forward passes.
    """
    place = torch.randint(tokens.shape[1], (len(tokens), 1), generator=generator).to(tokens.device)
    others = substitute_characters(tokens.gather(1, place), 1.0, frequency, generator)
    changed = tokens.scatter(1, place, others)
    differ = model(tokens).argmax(-1) != model(changed).argmax(-1)
    later = torch.arange(tokens.shape[1], device=tokens.device) >= place
    share: Tensor = (differ & later).sum(1) / later.sum(1)
    return share
