"""Pyro's state is one per process; a fit borrows it and gives it back as it was.

Pyro keeps its effect handlers, settings and random numbers in module-level variables, so two threads inside it at once
would see each other's. Whoever calls Pyro here does it inside :func:`isolated`, one thread at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from pyro.nn import PyroModule
from torch import nn

from probattn.distributions import unwatched_folds
from probattn.errors import InputError
from probattn.numerics.random import isolated_seed

__all__ = ["isolated", "require_local_parameters"]

_PYRO = threading.RLock()


def require_local_parameters(model: nn.Module) -> None:
    """Refuse a Pyro module that would keep its parameters in the global store.

    Raises:
        InputError: the module was constructed without ``module_local_params``.
    """
    if isinstance(model, PyroModule) and not hasattr(model._pyro_context, "param_state"):
        raise InputError(
            f"{type(model).__name__} keeps its parameters in Pyro's global store; construct it under "
            "pyro.settings.context(module_local_params=True)."
        )


@contextmanager
def isolated(device: torch.device | None = None, seed: int | None = None) -> Iterator[None]:
    """Run Pyro with parameters kept in their modules and the random state put back afterwards.

    Args:
        device: a CUDA device whose random state is seeded and put back as well.
        seed: seed of the draws inside; None continues from the present state.
    """
    # Folds at the draws are a finding of the diagnosis; proposals beyond one are the samplers' business.
    with _PYRO, isolated_seed(seed, device), pyro.settings.context(module_local_params=True), unwatched_folds():
        yield
