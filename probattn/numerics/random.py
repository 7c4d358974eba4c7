"""A seed for a block of code that leaves the random state of everyone else alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["isolated_seed"]


@contextmanager
def isolated_seed(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's global generator for the draws inside, and put its state back afterwards.

    Unlike ``torch.manual_seed`` this does not reseed the CUDA generators: those of other devices than ``device`` are
    neither read nor written. For draws that take a ``generator`` argument a ``torch.Generator`` is enough.

    Args:
        seed: seed of the draws inside; None continues from the present state.
        device: a CUDA device whose generator is seeded and put back as well; any other device changes nothing.

    Example:
        >>> before = torch.get_rng_state()
        >>> with isolated_seed(0):
        ...     first = torch.rand(2)
        >>> with isolated_seed(0):
        ...     print(bool((torch.rand(2) == first).all()))
        True
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    cuda = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
            if cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
        yield
