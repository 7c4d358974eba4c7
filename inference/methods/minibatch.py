"""The minibatch of a step and the gradient of a loss over it, as functions of seed and step alone.

Resuming needs no state of a sampler, and processes that share a step need no communication but a sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from probattn.inference.runtime.distributed import my_shards, shard, sum_over_processes
from probattn.inference.runtime.seeds import derived_seed
from probattn.numerics.random import isolated_seed

__all__ = ["minibatch", "sharded_gradient"]


def minibatch(data: tuple[Tensor, ...], size: int, step: int, seed: int) -> tuple[Tensor, ...]:
    """Sequences of one optimiser step, without repetition within an epoch.

    Args:
        data: tensors whose first axis is the N sequences.
        size: number of sequences in a minibatch, at most N.
        step: number of the step, from 0.
        seed: random seed of the order.

    Returns:
        The same tensors with ``size`` sequences each.

    Example:
        >>> data = (torch.arange(6),)
        >>> torch.cat([minibatch(data, 2, step, seed=0)[0] for step in range(3)]).sort().values
        tensor([0, 1, 2, 3, 4, 5])
    """
    epoch, position = divmod(step, len(data[0]) // size)
    generator = torch.Generator().manual_seed(derived_seed(seed, epoch))
    order = torch.randperm(len(data[0]), generator=generator)[position * size : (position + 1) * size]
    return tuple(part[order.to(part.device)] for part in data)


def sharded_gradient(
    backward: Callable[[tuple[Tensor, ...]], Tensor | float],
    parameters: Sequence[Tensor],
    batch: tuple[Tensor, ...],
    shards: int,
    seed: int,
) -> float:
    """Mean of a loss over the sequences of a minibatch; its gradient is left in the parameters.

    The minibatch is cut into shards, each with a random seed of its own, which processes share.

    Args:
        backward: loss of some sequences, scaled as if they were the whole minibatch; adds its gradient to the
            parameters.
        parameters: tensors whose ``grad`` is replaced.
        batch: sequences of the step.
        shards: number of parts, at most the number of sequences; the result depends on it and not on the number of
            processes.
        seed: random seed of the step.

    Returns:
        The loss.

    Raises:
        InputError: the processes do not divide the shards.
    """
    value = torch.zeros((), dtype=torch.float64, device=batch[0].device)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for number in my_shards(shards):
        part = shard(batch, number, shards)
        weight = len(part[0]) / len(batch[0])
        for parameter in parameters:
            parameter.grad = None
        with isolated_seed(derived_seed(seed, number), batch[0].device):
            value += weight * backward(part)
        for gradient, parameter in zip(gradients, parameters, strict=True):
            if parameter.grad is not None:
                gradient += weight * parameter.grad
    sum_over_processes([value, *gradients])
    for gradient, parameter in zip(gradients, parameters, strict=True):
        parameter.grad = gradient
    return float(value)
