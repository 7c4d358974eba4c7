"""Small language models of our own, trained on characters, with the margins of their blocks along the training."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.margins import margins
from probattn.inference.runtime.seeds import derived_seed
from probattn.inference.studies.language.plan import EIGENVALUES, VOLUME, Growth
from probattn.models.causal_lm import build_causal_lm
from probattn.models.corpus import Corpus
from probattn.numerics.random import isolated_seed

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["grow"]

_WARMUP = 50  # steps; fewer in a short training


def grow(growth: Growth, corpus: Corpus, seed: int, device: torch.device | None = None) -> tuple[Any, Dataset]:
    """Train a Llama model on characters by plain AdamW, and measure its margins on held-out text along the way.

    Args:
        growth: sizes.
        corpus: text to train on.
        seed: random seed of initial values and batches.
        device: where to train; None: the CPU. Weights and batches are drawn on the CPU, the same for every device.

    Returns:
        The model, in evaluation mode, and the margins, with dimensions (step, sequence, layer, token), and ``loss``,
        the held-out cross-entropy in nats per character, by step.

    Raises:
        InputError: a text that does not fill the windows.
    """
    import xarray

    device = device or torch.device("cpu")
    text = corpus.encode(corpus.text)
    held = corpus.windows(growth.context, heldout=True)
    if len(text) <= growth.context + 1 or len(held.inputs) < growth.measured_windows:
        raise InputError(
            f"corpus {corpus.name}: does not fill {growth.measured_windows} held-out windows of {growth.context} "
            "characters; give a longer text."
        )
    step = len(held.inputs) // growth.measured_windows  # spread over the held-out text
    inputs, targets = (part[::step][: growth.measured_windows].to(device) for part in held)
    with isolated_seed(derived_seed(seed, 1)):
        model: Any = build_causal_lm(
            "llama", len(corpus.vocabulary), growth.layers, growth.dim, growth.heads, growth.context + 1
        )
    model.to(device).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=growth.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = min(_WARMUP, max(1, growth.training_steps // 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda k: _rate(k, warmup, growth.training_steps))
    generator = torch.Generator().manual_seed(derived_seed(seed, 2))
    within = torch.arange(growth.context + 1)
    looks, tables, losses = growth.looked_at(), [], []
    positions = list(range(0, growth.context, growth.stride))
    for number in range(growth.training_steps + 1):
        if number in looks:
            model.eval()
            tables.append(_look(model, inputs, positions))
            losses.append(_loss(model, inputs, targets))
            model.train()
        if number == growth.training_steps:
            break
        begin = torch.randint(len(text) - growth.context, (growth.batch, 1), generator=generator)
        window = text[begin + within].to(device)
        logits = model(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    table: Dataset = xarray.concat(tables, "step", combine_attrs="drop").assign_coords(step=looks)
    table["loss"] = ("step", np.array(losses, dtype=np.float32))
    return model.eval(), table


def _rate(step: int, warmup: int, steps: int) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


def _look(model: Any, inputs: Tensor, positions: list[int]) -> Dataset:
    # Eigenvalues of many small matrices are faster on a processor than on any other device.
    model = model if inputs.device.type == "cpu" else copy.deepcopy(model).cpu()
    found = margins(model, inputs.cpu(), (*VOLUME, *EIGENVALUES), positions=positions, maps=("generator",))
    return found[["sign", "logabsdet", "sigma_min", "spectral", "complex", "rms"]].astype(np.float32)


@torch.no_grad()
def _loss(model: Any, inputs: Tensor, targets: Tensor) -> float:
    logits = model(input_ids=inputs, use_cache=False).logits
    return float(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
