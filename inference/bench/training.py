"""Training steps with the barrier, raced against the same steps without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from probattn.inference.bench.harness import Row, race
from probattn.models.gpt import CharacterGPT, GPTConfig
from probattn.penalty import attention_penalty

__all__ = ["character_step", "gpt2_step"]

_GPT2: dict[str, Any] = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}


def gpt2_step(device: torch.device, rounds: int) -> list[Row]:
    """Race a step of GPT-2 (124 million parameters) on one sequence of 1024 tokens, penalty at 5 % of the positions.

    Args:
        device: device to measure on.
        rounds: rounds of the race.

    Returns:
        One row.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    from probattn.hf.barrier import attach_barrier

    torch.manual_seed(0)
    dropout: dict[str, Any] = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    model: Any = GPT2LMHeadModel(GPT2Config(**_GPT2, **dropout))
    model.to(device)
    tokens = torch.randint(0, _GPT2["vocab_size"], (1, _GPT2["n_positions"]), device=device)
    step = _step(model, lambda: model(tokens, labels=tokens, use_cache=False).loss)

    def with_barrier() -> None:
        barrier = attach_barrier(model, 0.05, "one_sided", positions=0.05)
        try:
            step()
        finally:
            barrier.detach()

    seconds = race({"barrier": with_barrier, "plain": step}, rounds=rounds, budget=240.0)
    ratio = seconds["barrier"].least / seconds["plain"].least
    return [
        Row(
            f"training step of GPT-2, {_GPT2['n_layer']} layers, T = 1024, penalty at 5 % of the positions",
            "the same without",
            ratio,
            faster=False,
            goal=1.15,
            seconds=seconds,
        )
    ]


def character_step(device: torch.device, rounds: int) -> list[Row]:
    """Race a step of the character GPT of the robustness study, penalty at all positions of all heads.

    Args:
        device: device to measure on.
        rounds: a quarter of the rounds of the race.

    Returns:
        One row.
    """
    model = CharacterGPT(GPTConfig(96)).to(device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 96, (32, 65), generator=generator).to(device)

    def loss(weight: float) -> Callable[[], torch.Tensor]:
        def compute() -> torch.Tensor:
            logits, heads = model.forward_with_heads(model.embed(tokens[:, :-1]))
            value = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            if weight:
                layers = [attention_penalty(*layer, kind="one_sided").mean() for layer in heads]
                value = value + weight * torch.stack(layers).mean()
            return value

        return compute

    seconds = race({"barrier": _step(model, loss(0.05)), "plain": _step(model, loss(0.0))}, rounds=4 * rounds, warmup=3)
    ratio = seconds["barrier"].least / seconds["plain"].least
    name = "training step of the character GPT (32 x 64, 2 layers, 4 heads of 16), penalty at all positions"
    return [Row(name, "the same without", ratio, faster=False, goal=1.5, seconds=seconds)]


def _step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    return step
