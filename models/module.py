"""Common base of the models: parameters kept out of Pyro's global store, one dtype and device, a batch size."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from probattn.errors import InputError

__all__ = ["SequenceModel"]


class SequenceModel(PyroModule):
    """Pyro module whose priors follow ``.to(dtype)`` and ``.to(device)`` and whose parameters are its own.

    Attributes:
        unit: the number one as a buffer, float64 unless the module is converted; priors take its dtype and device.
    """

    unit: Tensor

    def __init__(self) -> None:
        # Pyro decides at construction whether a module can keep its parameters to itself instead of in the global
        # store.
        with pyro.settings.context(module_local_params=True):
            super().__init__()
        self.register_buffer("unit", torch.ones((), dtype=torch.float64))

    def parameter(self, name: str, prior: dist.TorchDistribution) -> Tensor:
        """Sample a parameter outside the plate.

        Args:
            name: name of the sample site.
            prior: prior distribution of the parameter.

        Returns:
            The value, ``(*event)``, with batch axes ``(particles, 1)`` in front where there are particles.
        """
        value: Tensor = pyro.sample(name, prior)
        event = value.shape[value.dim() - len(prior.event_shape) :]
        particles = value.shape[: value.dim() - len(prior.event_shape)]
        # Pyro's Predictive conditions on draws that lack the plate's axis of size one.
        return value.reshape(*particles, 1, *event) if len(particles) == 1 else value

    @staticmethod
    def batch_size(u: Tensor | None, sequences: int | None) -> int:
        """Number N of sequences, read off the observed ones or given for those to be drawn.

        Args:
            u: observed sequences, ``(N, T, p)`` or ``(particles, N, T, p)``; None where they are to be drawn.
            sequences: number of sequences to draw where u is None.

        Returns:
            N.

        Raises:
            InputError: u has another number of axes, or neither argument gives a positive number.
        """
        if u is not None:
            if u.dim() not in (3, 4):
                raise InputError(f"u has shape {tuple(u.shape)}; it must be (N, T, p) or (particles, N, T, p).")
            return u.shape[-3]
        if sequences is None or sequences < 1:
            raise InputError(f"sequences is {sequences}; without observed u, give the number of sequences to draw.")
        return sequences
