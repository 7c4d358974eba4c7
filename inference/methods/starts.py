"""Points to begin from, and the curvature there."""

from __future__ import annotations

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.methods.log_density import LogDensity

__all__ = ["curvature_guess", "feasible_start"]


def feasible_start(target: LogDensity, points: int, seed: int, *, spread: float = 0.1, tries: int = 30) -> Tensor:
    """Points around the origin of unconstrained space where density and gradient are finite.

    There the attention is nearly absent and every J_i nearly the identity: the side of the boundary where det J > 0.
    The spread halves until all values are finite.

    Args:
        target: log-density.
        points: number of points.
        seed: random seed.
        spread: standard deviation to begin with.
        tries: largest number of spreads tried.

    Returns:
        ``(points, D)``.

    Raises:
        InputError: no such points are found.

    Example:
        >>> from probattn.models import ScalarModel
        >>> target = LogDensity(ScalarModel(4), torch.ones(3, 4, 1).double())
        >>> feasible_start(target, 5, seed=0).shape
        torch.Size([5, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(points, target.dim, generator=generator, dtype=torch.float64).to(target.origin)
    for attempt in range(tries):
        z = spread * 0.5**attempt * noise
        value, gradient = target.value_and_gradient(z)
        if bool(torch.isfinite(value).all() and torch.isfinite(gradient).all()):
            return z
    raise InputError(
        f"no feasible start: the log-density is not finite within {spread * 0.5 ** (tries - 1):.1g} of the origin; "
        "look for values in the data that are too large for its dtype."
    )


def curvature_guess(target: LogDensity, z: Tensor) -> Tensor:
    """Rough covariance of the posterior from the curvature at some points.

    The inverse of the Hessian's modulus, with no variance above one: the order of magnitude is what a sampler needs to
    begin with.

    Args:
        target: log-density.
        z: points, ``(C, D)``.

    Returns:
        Symmetric and positive definite, ``(C, D, D)``.
    """
    values, vectors = torch.linalg.eigh(target.hessian(z))
    covariance: Tensor = (vectors / values.abs().clamp(min=1.0).unsqueeze(-2)) @ vectors.mT
    return covariance
