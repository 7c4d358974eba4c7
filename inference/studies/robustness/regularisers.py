"""Competitors of the barrier in training: perturbed embeddings, a cap on attention products, a penalty on softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from probattn.inference.studies.robustness.arms import Arm
from probattn.models.gpt import CharacterGPT, Heads

__all__ = [
    "adversarial_step",
    "cap_products",
    "product_norms",
    "softmax_jacobian_norm",
    "softmax_penalty",
    "with_noise",
]


def with_noise(u: Tensor, arm: Arm) -> list[Tensor]:
    """Add the noise of an arm to the embeddings of a batch.

    Args:
        u: embeddings, ``(N, T, p)``.
        arm: way of training.

    Returns:
        Embeddings to average the loss over, ``(N, T, p)`` each: two with symmetric noise, otherwise one.
    """
    small = 1 / math.sqrt(u.shape[1] * u.shape[2])
    if arm.symmetric_noise > 0:
        noise = arm.symmetric_noise * small * (2.0 * torch.randint(2, u.shape, device=u.device).to(u) - 1)
        return [u + noise, u - noise]
    if arm.neftune > 0:
        u = u + arm.neftune * small * (2 * torch.rand_like(u) - 1)
    if arm.relative_noise > 0:
        u = u + arm.relative_noise * u.detach().square().mean().sqrt() * torch.randn_like(u)
    return [u]


def adversarial_step(u: Tensor, gradient: Tensor, size: float) -> Tensor:
    r"""Move every embedding up the gradient by a fraction of its own norm.

    .. math:: u_i + \epsilon |u_i| \, g_i / |g_i|

    Args:
        u: embeddings, ``(N, T, p)``.
        gradient: gradient of the loss, ``(N, T, p)``; where it is zero the embedding stays.
        size: epsilon.

    Returns:
        Embeddings, ``(N, T, p)``; the step itself is held fixed in the backward pass.
    """
    length: Tensor = size * u.detach().norm(dim=-1, keepdim=True)
    return u + length * F.normalize(gradient.detach(), dim=-1, eps=1e-30)


def product_norms(model: CharacterGPT) -> tuple[Tensor, Tensor]:
    r"""Spectral norms of the two products that bound an attention.

    .. math:: c\,|W_K^{h\top} W_Q^h|, \qquad |W_O^h W_V^h|

    Args:
        model: model.

    Returns:
        Norms, ``(layers, H)`` each.
    """
    blocks: Any = model.blocks
    pairs = []
    for block in blocks:
        query, key, value = (part.unflatten(0, (block.heads, -1)) for part in block.projections.weight.chunk(3))
        output = block.output.weight.unflatten(1, (block.heads, -1)).movedim(1, 0)  # (H, p, r)
        pairs.append((query.shape[1] ** -0.5 * _norm(key.mT, query), _norm(output, value)))
    logits, values = zip(*pairs, strict=True)
    return torch.stack(logits), torch.stack(values)


def _norm(left: Tensor, right: Tensor) -> Tensor:
    """Spectral norm of a product of thin factors, (H, p, r) and (H, r, p), from one matrix of size r."""
    root = torch.linalg.qr(left, mode="r").R  # left = Q R, and Q keeps norms
    found: Tensor = torch.linalg.matrix_norm(root @ right, 2)
    return found


@torch.no_grad()
def cap_products(model: CharacterGPT, cap: float) -> None:
    """Scale both factors of every product back where its norm exceeds the cap.

    Args:
        model: model, changed in place.
        cap: largest spectral norm.
    """
    blocks: Any = model.blocks
    for block, logits, values in zip(blocks, *product_norms(model), strict=True):
        shrink = [(cap / norms).clamp(max=1.0).sqrt()[:, None, None] for norms in (logits, values)]
        for part, factor in zip(block.projections.weight.chunk(3), (shrink[0], shrink[0], shrink[1]), strict=True):
            part.unflatten(0, (block.heads, -1)).mul_(factor)
        block.output.weight.unflatten(1, (block.heads, -1)).mul_(shrink[1].movedim(0, 1))


def softmax_jacobian_norm(weights: Tensor) -> Tensor:
    r"""Bound on the spectral norm of the Jacobian of a softmax by its two largest weights.

    .. math:: |\mathrm{diag}(\alpha) - \alpha \alpha^\top| \le \alpha_{(1)} (1 - \alpha_{(1)} + \alpha_{(2)})

    It is exact for weights that are uniform or lie on two tokens (Yudin et al., 2025, arXiv 2507.07814).

    Args:
        weights: attention weights, ``(..., S)`` with S at least 2.

    Returns:
        The bound, ``(...)``.

    Example:
        >>> softmax_jacobian_norm(torch.tensor([0.5, 0.5, 0.0]))
        tensor(0.5000)
    """
    first, second = weights.topk(2, -1).values.unbind(-1)
    return first * (1 - first + second)


def softmax_penalty(heads: Sequence[Heads]) -> Tensor:
    """Average the largest bound of a head's tokens over windows, heads and layers.

    Args:
        heads: queries and keys of every layer.

    Returns:
        A number, 0-dimensional.
    """
    found = []
    for own in heads:
        scores = own.query @ own.key.mT * own.query.shape[-1] ** -0.5  # (N, H, T, T)
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        weights = torch.softmax(scores.masked_fill(unseen, -torch.inf), -1)
        found.append(softmax_jacobian_norm(weights[..., 1:, :]).amax(-1).mean())  # the first token sees itself alone
    return torch.stack(found).mean()
