r"""Training of character models with and without the barrier.

All arms of a seed start from the same initial values and see the same batches. Whatever else an arm draws (noise,
positions of a penalty, an attention stage of its own) comes from a separate generator. The objective is

.. math:: \mathrm{CE}(y) + \lambda\, \tfrac1n \sum_i b_i,

with b_i at the input embeddings, through a stage of its own, or on the residual stream in front of the attention of
every layer, averaged over layers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from probattn.embedding_prior import AttentionStage
from probattn.errors import InputError
from probattn.hf.layers import AttentionLayer
from probattn.hf.layers.sublayer import Sublayer
from probattn.hf.layers.tokenwise import Norm, Projection
from probattn.hf.penalty import residual_penalty
from probattn.hf.stream import Stream
from probattn.inference.studies.robustness.arms import RADIUS, Arm, Study
from probattn.inference.studies.robustness.regularisers import (
    adversarial_step,
    cap_products,
    softmax_penalty,
    with_noise,
)
from probattn.models.corpus import Corpus
from probattn.models.gpt import CharacterGPT
from probattn.numerics.random import isolated_seed
from probattn.penalty import choose_positions

__all__ = ["Trained", "batches", "forward_with_streams", "one_thread", "residual_attention", "stream", "train"]


class Trained(NamedTuple):
    """A trained model.

    Attributes:
        model: model after the last finite step.
        stage: stage of the penalty on the embeddings; None without one.
        path: root mean square of the embeddings of the batch, before the first step and after each.
        diverged: step whose objective or gradient was not finite, where the run was stopped; None if it finished.
    """

    model: CharacterGPT
    stage: AttentionStage | None
    path: list[float]
    diverged: int | None


def stream(*key: object) -> int:
    """Derive a seed from a key, the same on every machine and unrelated to the seeds of other keys.

    Args:
        key: strings and numbers.

    Returns:
        A seed below 2^56.
    """
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:7], "big")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch in one thread: fastest for tensors this small, and the same sums in every process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(text: Tensor, study: Study, seed: int, steps: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw random windows of a text and their successors.

    Args:
        text: indices of the characters, (N,).
        study: sizes.
        seed: random seed, which alone decides the windows.
        steps: number of pairs; None for that of the study.

    Yields:
        Inputs and targets, (batch, T) each, one pair per step.
    """
    generator = torch.Generator().manual_seed(stream("batches", seed))
    within = torch.arange(study.context + 1)
    for _ in range(study.steps if steps is None else steps):
        begin = torch.randint(len(text) - study.context, (study.batch, 1), generator=generator)
        window = text[begin + within]
        yield window[:, :-1], window[:, 1:]


def train(
    arm: Arm,
    seed: int,
    corpus: Corpus,
    study: Study,
    *,
    path: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> Trained:
    """Train one model.

    Args:
        arm: way of training.
        seed: random seed of initial values and batches.
        corpus: text to train on.
        study: sizes.
        path: path of the arm that this one follows, see :class:`Trained`; None if it follows none.
        device: device to train on; None for the CPU.

    Returns:
        The model, and how the training went.

    Raises:
        InputError: an arm that follows another without its path, or a text shorter than a window.
    """
    text = corpus.encode(corpus.text)
    if len(text) <= study.context:
        raise InputError(f"corpus {corpus.name}: {len(text)} characters do not hold a window; give a longer text.")
    if arm.steer is not None and (path is None or len(path) != study.steps + 1):
        raise InputError(f"arm {arm.name} follows {arm.steer}: pass its path of {study.steps + 1} numbers.")
    device = device or torch.device("cpu")
    own = seed + arm.reseed
    # Everything else that is random: positions of the penalty, the stage, noise.
    with isolated_seed(stream("arm", own), device):
        model = CharacterGPT(study.gpt(len(corpus.vocabulary)), stream("model", own)).to(device)
        stage = None
        if arm.placement == "embeddings":
            radius, limit = (RADIUS, arm.contraction) if arm.contraction > 0 else (None, None)
            stage = AttentionStage(
                study.dim, rank=study.rank, prior=arm.prior, memory_radius=radius, contraction=limit
            ).to(device)
        study = replace(study, steps=max(1, round(arm.length * study.steps)))
        return _optimise(arm, model, stage, batches(text, study, own), study, path if arm.steer else None)


def _optimise(
    arm: Arm,
    model: CharacterGPT,
    stage: AttentionStage | None,
    data: Iterator[tuple[Tensor, Tensor]],
    study: Study,
    wanted: Sequence[float] | None,
) -> Trained:
    parameters = [*model.parameters(), *(stage.parameters() if stage is not None else ())]
    device = parameters[0].device
    optimiser = torch.optim.AdamW(parameters, lr=study.learning_rate, weight_decay=arm.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, study))
    path: list[float] = []
    for step, (inputs, targets) in enumerate(data):
        inputs, targets = inputs.to(device), targets.to(device)
        if not path:
            path.append(_follow(model, inputs, wanted[0] if wanted is not None else None))
        loss = _objective(arm, model, stage, inputs, targets)
        optimiser.zero_grad()
        loss.backward()
        size = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not bool(torch.isfinite(loss.detach() + size)):
            return Trained(model, stage, path, step)
        optimiser.step()
        schedule.step()
        if arm.cap > 0:
            cap_products(model, arm.cap)
        path.append(_follow(model, inputs, wanted[step + 1] if wanted is not None else None))
    return Trained(model, stage, path, None)


def _rate(step: int, study: Study) -> float:
    if step < study.warmup:
        return (step + 1) / study.warmup
    done = (step - study.warmup) / max(1, study.steps - study.warmup)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def _follow(model: CharacterGPT, inputs: Tensor, wanted: float | None) -> float:
    """Return the root mean square of the embeddings of a batch, after rescaling them to the wanted one if any."""
    found = float(model.embed(inputs).square().mean().sqrt())
    if wanted is None or not found > 0:
        return found
    for part in (model.table, model.positions):
        part.mul_(wanted / found)
    return wanted


def _objective(arm: Arm, model: CharacterGPT, stage: AttentionStage | None, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of a batch in the arm's own sense, with its penalties."""
    u = model.embed(inputs)
    versions = with_noise(u, arm)
    losses = []
    for version in versions:
        logits, streams = forward_with_streams(model, version)
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    if arm.adversarial > 0:
        (gradient,) = torch.autograd.grad(losses[0], versions[0], retain_graph=True)
        logits = model(u=adversarial_step(u, gradient, arm.adversarial))
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
    loss = torch.stack(losses).mean()
    if arm.weight > 0:
        loss = loss + arm.weight * _penalty(arm, model, u, streams, stage)
    if arm.jasmin > 0:
        loss = loss + arm.jasmin * softmax_penalty(model.forward_with_heads(versions[0])[1])
    return loss


def _penalty(
    arm: Arm, model: CharacterGPT, u: Tensor, streams: Sequence[Tensor], stage: AttentionStage | None
) -> Tensor:
    """Return the barrier b, averaged over tokens and layers."""
    first = max(1, round(arm.windows * len(u)))
    if stage is not None:
        return stage.penalty(u[:first], arm.kind, share=arm.positions).mean()
    parts = []
    for number, tokens in enumerate(streams):
        rows = choose_positions(u.shape[1], arm.positions, u.device)
        seen = Stream(tokens[:first], None, None, None)
        parts.append(residual_penalty(residual_attention(model, number), seen, rows, arm.kind).mean())
    return torch.stack(parts).mean()


def forward_with_streams(model: CharacterGPT, u: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Compute the logits, and the residual stream in front of every layer.

    Args:
        model: model.
        u: embeddings, ``(N, T, p)``.

    Returns:
        Logits, ``(N, T, V)``, and one tensor ``(N, T, p)`` per layer.
    """
    streams = []
    for block in model.blocks:
        streams.append(u)
        u, _ = block(u)
    return model.readout(model.norm(u)), streams


def residual_attention(model: CharacterGPT, number: int) -> AttentionLayer:
    """Return the attention of a layer, with its norm, as an attention on the residual stream.

    Args:
        model: model.
        number: number of the layer.
    """
    block: Any = model.blocks[number]

    def read() -> Sublayer:
        norm, heads = block.attention_norm, block.heads
        weights, biases = block.projections.weight.chunk(3), block.projections.bias.chunk(3)
        query, key, value = (
            Projection(weight.unflatten(0, (heads, -1)), bias.unflatten(0, (heads, -1)))
            for weight, bias in zip(weights, biases, strict=True)
        )
        output = block.output.weight.unflatten(1, (heads, -1))  # (p, H, p / H)
        normed = Norm(norm.weight, norm.bias, norm.eps, centred=True)
        return Sublayer(normed, query, key, value, output, output.shape[-1] ** -0.5, output_bias=block.output.bias)

    return AttentionLayer(read, "character GPT", number, block.output.weight.dtype)
