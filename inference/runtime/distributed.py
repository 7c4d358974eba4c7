"""Data-parallel optimisation on ``torch.distributed``: processes share the parts of a step and sum their gradients.

A step is cut into *shards*: parts of its minibatch, each with random numbers that depend on seed, step and shard alone.
What a fit computes then depends on the number of shards and not on how many processes share them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from probattn.errors import InputError

__all__ = ["launched_rank", "my_shards", "process_group", "rank", "shard", "sum_over_processes", "world_size"]


def world_size() -> int:
    """Number of processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def launched_rank() -> int:
    """Number that ``torchrun`` gave this process, 0 without it; known before the processes are joined."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that ``torchrun`` started; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def my_shards(shards: int) -> range:
    """Numbers of the shards of this process.

    Args:
        shards: number of shards of a step.

    Raises:
        InputError: the processes do not divide the shards.
    """
    if shards % world_size():
        raise InputError(
            f"{world_size()} processes cannot share {shards} shards evenly; give --shards a multiple of {world_size()}."
        )
    return range(rank(), shards, world_size())


def shard(data: tuple[Tensor, ...], number: int, shards: int) -> tuple[Tensor, ...]:
    """One shard of a minibatch: every ``shards``-th sequence.

    Args:
        data: tensors whose first axis is the sequences.
        number: number of the shard, from 0.
        shards: number of shards.

    Example:
        >>> shard((torch.arange(5),), 1, 2)
        (tensor([1, 3]),)
    """
    return tuple(part[number::shards] for part in data)


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place.

    Args:
        tensors: tensors of the same shapes in every process.
    """
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
