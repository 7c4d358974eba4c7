r"""Fine-tuning of a causal language model of ``transformers``.

All arms of a seed see the same batches; whatever else an arm draws comes from another generator. The objective is the
cross-entropy, with noise or one adversarial step on the embeddings, or with the one-sided barrier

.. math:: \mathrm{CE}(y) + \lambda\, \tfrac1N \sum_i \max(0, -\log|\det J_i|), \qquad
    J_i = I - \partial\mu_i/\partial u_i

on the residual stream in front of the attention of each layer.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.barrier import attach_barrier
from probattn.inference.studies.fine_tuning.plan import Arm, Sizes
from probattn.inference.studies.robustness.regularisers import adversarial_step
from probattn.inference.studies.robustness.training import stream
from probattn.numerics.random import isolated_seed

__all__ = ["fine_tune", "token_batches"]


def token_batches(tokens: Tensor, sizes: Sizes, seed: int) -> Iterator[Tensor]:
    """Draw random windows of a text in tokens.

    Args:
        tokens: the text, ``(N,)``.
        sizes: sizes.
        seed: random seed, which alone decides the windows.

    Yields:
        Windows, ``(batch, T)``, once per step.

    Raises:
        InputError: a text shorter than a window.
    """
    if len(tokens) < sizes.length:
        raise InputError(f"the text has {len(tokens)} tokens, fewer than a window of {sizes.length}.")
    generator = torch.Generator().manual_seed(stream("tokens", seed))
    within = torch.arange(sizes.length)
    for _ in range(sizes.steps):
        begin = torch.randint(len(tokens) - sizes.length + 1, (sizes.batch, 1), generator=generator)
        yield tokens[begin + within]


def fine_tune(model: Any, arm: Arm, seed: int, tokens: Tensor, sizes: Sizes) -> tuple[Any, int | None]:
    """Fine-tune a copy of a model.

    Args:
        model: causal language model; it is left as it was.
        arm: way of tuning.
        seed: random seed of batches and noise.
        tokens: training text, ``(N,)``.
        sizes: sizes.

    Returns:
        The tuned copy in evaluation mode, and the step at which its objective was not finite, where it was stopped;
        None if it finished.
    """
    own = copy.deepcopy(model).requires_grad_(True)
    if not arm.tuned:
        return own.eval(), None
    device = next(own.parameters()).device
    with isolated_seed(stream("fine-tuning", seed), device):
        handle = None
        if arm.weight > 0:
            handle = attach_barrier(own, arm.weight, "one_sided", sizes.positions, layers=sizes.layers)
        diverged = _optimise(own.train(), arm, token_batches(tokens, sizes, seed), sizes, device)
        if handle is not None:
            handle.detach()
    return own.eval(), diverged


def _optimise(model: Any, arm: Arm, data: Iterator[Tensor], sizes: Sizes, device: torch.device) -> int | None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=sizes.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, sizes))
    for step, ids in enumerate(data):
        ids = ids.to(device)
        u = model.get_input_embeddings()(ids)
        if arm.neftune > 0:
            u = u + arm.neftune / math.sqrt(u.shape[1] * u.shape[2]) * (2 * torch.rand_like(u) - 1)
        loss = model(inputs_embeds=u, labels=ids).loss
        if arm.adversarial > 0:
            (gradient,) = torch.autograd.grad(loss, u, retain_graph=True)
            moved = adversarial_step(u, gradient, arm.adversarial)
            loss = (loss + model(inputs_embeds=moved, labels=ids).loss) / 2
        optimiser.zero_grad()
        loss.backward()
        size = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not bool(torch.isfinite(loss.detach() + size)):
            return step
        optimiser.step()
        schedule.step()
    return None


def _rate(step: int, sizes: Sizes) -> float:
    if step < sizes.warmup:
        return (step + 1) / sizes.warmup
    return max(0.0, 1 - (step - sizes.warmup) / max(1, sizes.steps - sizes.warmup))
