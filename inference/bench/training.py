"""Training steps with the barrier, raced against the same steps without."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from probattn.inference.bench.harness import Row, race

__all__ = ["gpt2_step"]

_GPT2: dict[str, Any] = {"n_layer": 12, "n_embd": 768, "n_head": 12, "n_positions": 1024, "vocab_size": 50257}
_GOAL = 1.3  # times the plain step, from one probe per token


def gpt2_step(device: torch.device, rounds: int) -> list[Row]:
    """Race a step of GPT-2 (124 million parameters) on one sequence of 1024 tokens, barrier at 5 % of the positions.

    The barrier is that of all layers on the residual stream: exact (one_sided), or from one random probe per token
    (logdet). Weights are random, so that blocks are near the identity and the probes need few steps.

    Args:
        device: device to measure on.
        rounds: rounds of the race.

    Returns:
        Two rows.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    from probattn.hf.barrier import attach_barrier

    torch.manual_seed(0)
    dropout: dict[str, Any] = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0)
    model: Any = GPT2LMHeadModel(GPT2Config(**_GPT2, **dropout))
    model.loss_type = "ForCausalLM"  # what transformers finds out by a logged warning
    model.to(device).train()
    tokens = torch.randint(0, _GPT2["vocab_size"], (1, _GPT2["n_positions"]), device=device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(own: Any) -> Callable[[], None]:
        def run() -> None:
            optimiser.zero_grad()
            own(tokens, labels=tokens, use_cache=False).loss.backward()
            optimiser.step()

        return run

    exact, probed = _twin(model), _twin(model)
    attach_barrier(exact, 0.05, "one_sided", positions=0.05)
    attach_barrier(probed, 0.05, "logdet", positions=0.05, probes=1)
    competitors = {"exact": step(exact), "one probe": step(probed), "plain": step(model)}
    seconds = race(competitors, rounds=rounds, budget=360.0)
    rows = []
    for name, goal in (("exact", None), ("one probe", _GOAL)):
        rows.append(
            Row(
                f"training step of GPT-2, {_GPT2['n_layer']} layers, T = 1024, barrier at 5 % of the positions, {name}",
                "the same without",
                seconds[name].least / seconds["plain"].least,
                faster=False,
                goal=goal,
                seconds={part: seconds[part] for part in (name, "plain")},
            )
        )
    return rows


def _twin(model: torch.nn.Module) -> Any:
    """A model of its own, for a barrier of its own, that shares its tensors with another."""
    shared: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(part): part for part in shared})
