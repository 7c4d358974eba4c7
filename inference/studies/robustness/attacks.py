r"""Worst cases within a budget: projected gradient ascent on the embeddings, and greedy substitution of characters.

Both maximise the mean loss of a window, and return the worst point that they visited, so that a longer attack that
begins with a shorter one never finds less. A gradient counts as two forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from probattn.errors import require_at_least, require_positive
from probattn.inference.studies.robustness.regularisers import adversarial_step
from probattn.models.gpt import CharacterGPT

__all__ = ["STEPS", "attack_characters", "attack_embeddings", "window_bits"]

#: Gradient steps of an attack on embeddings: nine forward passes with the last evaluation.
STEPS = 4


def window_bits(model: CharacterGPT, u: Tensor, targets: Tensor, kept: Tensor | None = None) -> Tensor:
    """Compute the mean cross-entropy of each window in bits per character.

    Args:
        model: model.
        u: embeddings, ``(N, T, p)``.
        targets: characters to predict, ``(N, T)``.
        kept: True at the positions that count, ``(N, T)``; None: all.

    Returns:
        Losses, ``(N,)``, in the precision of the model.
    """
    loss = F.cross_entropy(model(u=u).transpose(1, 2), targets, reduction="none") / math.log(2)
    return loss.mean(1) if kept is None else (loss * kept).sum(1) / kept.sum(1)


def attack_embeddings(
    model: CharacterGPT,
    tokens: Tensor,
    targets: Tensor,
    radius: float,
    *,
    steps: int = STEPS,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Search the worst embeddings within a ball around each, in proportion to its norm.

    .. math:: \max_{|\delta_i| \le \epsilon |u_i|} \mathrm{CE}(u + \delta)

    by steps of length 2 epsilon / steps along the normalised gradient of each token, projected onto the ball; the first
    step goes to its surface, as in the one-step attack.

    Args:
        model: model.
        tokens: characters, ``(N, T)``.
        targets: characters to predict, ``(N, T)``.
        radius: epsilon.
        steps: number of gradients.
        generator: random generator on the CPU for the start in the ball; None starts at its centre.

    Returns:
        Bits per character of each window at the worst point visited, the clean one included, ``(N,)``. Time:
        ``2 steps + 1`` forward passes.

    Raises:
        InputError: a radius that is not positive, or no step.
    """
    require_positive("radius", radius)
    require_at_least("steps", steps)
    with torch.no_grad():
        clean = model.embed(tokens)
    limit = radius * clean.norm(dim=-1, keepdim=True)
    shift = torch.zeros_like(clean)
    if generator is not None:
        draw = torch.randn(clean.shape, generator=generator).to(clean)
        shift = limit * F.normalize(draw, dim=-1) * torch.rand(limit.shape, generator=generator).to(clean)
    worst = torch.full((len(tokens),), -torch.inf, device=clean.device, dtype=clean.dtype)
    for step in range(steps):
        u = (clean + shift).requires_grad_()
        bits = window_bits(model, u, targets)
        (gradient,) = torch.autograd.grad(bits.sum(), u)
        worst = torch.maximum(worst, bits.detach())
        size = radius if step == 0 else 2 * radius / steps
        moved = adversarial_step(clean, gradient, size) - clean + shift
        shift = moved * (limit / moved.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
    with torch.no_grad():
        return torch.maximum(worst, window_bits(model, clean + shift, targets))


def attack_characters(
    model: CharacterGPT, tokens: Tensor, targets: Tensor, counts: Sequence[int], allowed: Tensor
) -> tuple[list[Tensor], Tensor]:
    r"""Substitute characters one by one where the loss grows most to first order.

    .. math:: \max_{i, v} \; g_i^\top (E[v] - E[y_i]), \qquad g_i = \partial \mathrm{CE} / \partial u_i

    (HotFlip: Ebrahimi et al., 2018, arXiv 1712.06751). A position is changed once.

    Args:
        model: model.
        tokens: characters, ``(N, T)``.
        targets: characters to predict, ``(N, T)``; they stay the true ones.
        counts: numbers of substitutions at which to stop, rising, the last one at most T.
        allowed: True for the characters that may be put in, ``(V,)``.

    Returns:
        Bits per character of each window at the worst text of at most that many substitutions, ``(N,)`` per count; and
        that of the last count, ``(N, T)``. Time for all counts: three forward passes per substitution, at most.

    Raises:
        InputError: counts that do not rise from at least 1 to at most T.
    """
    for before, count in zip((0, *counts), counts, strict=False):
        require_at_least("number of substitutions", count, before + 1)
    require_at_least("T, the length of a window", tokens.shape[1], counts[-1])
    rows = torch.arange(len(tokens), device=tokens.device)
    text, hidden = tokens.clone(), torch.zeros_like(tokens, dtype=torch.bool)
    banned = torch.where(allowed, 0.0, -torch.inf).to(model.table)
    with torch.no_grad():
        worst, kept = window_bits(model, model.embed(tokens), targets), tokens.clone()
    found = []
    for count in range(1, counts[-1] + 1):
        u = model.embed(text).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(window_bits(model, u, targets).sum(), u)
        with torch.no_grad():
            gain = gradient @ model.table.mT + banned  # (N, T, V)
            gain = gain - (gradient * model.table[text]).sum(-1, keepdim=True)
            gain = gain.scatter(2, text.unsqueeze(2), -torch.inf).masked_fill(hidden.unsqueeze(2), -torch.inf)
            best = gain.flatten(1).argmax(1)
            place, character = best // len(model.table), best % len(model.table)
            text[rows, place], hidden[rows, place] = character, True
            bits = window_bits(model, model.embed(text), targets)
            kept = torch.where((bits > worst).unsqueeze(1), text, kept)
            worst = torch.maximum(worst, bits)
        if count in counts:
            found.append(worst)
    return found, kept
