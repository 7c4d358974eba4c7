"""The minibatch of a step: a function of seed and step alone, so that resuming needs no state of a sampler."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["minibatch"]


def minibatch(data: tuple[Tensor, ...], size: int, step: int, seed: int) -> tuple[Tensor, ...]:
    """Sequences of one optimiser step, without repetition within an epoch.

    Args:
        data: tensors whose first axis is the N sequences.
        size: sequences in a minibatch, at most N.
        step: number of the step, from 0.
        seed: of the order.
    """
    epoch, position = divmod(step, len(data[0]) // size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(data[0]), generator=generator)[position * size : (position + 1) * size]
    return tuple(part[order.to(part.device)] for part in data)
