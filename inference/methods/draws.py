"""What every method that samples hands on: draws in unconstrained space with what is known about each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from probattn.errors import InputError
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.runtime.isolation import isolated

__all__ = ["RELIABLE", "Draws", "approximation", "curvature_guess", "feasible_start"]

RELIABLE = 0.7  # largest k-hat at which importance weights are of use (Vehtari et al., 1507.02646)
_PROPOSALS = 4


@dataclass(frozen=True)
class Draws:
    """Draws of a posterior or of an approximation to it.

    Attributes:
        method: "nuts", "laplace", "svi" or "map".
        z: (chain, draw, D).
        stats: by ArviZ name, (chain, draw) each.
        notes: numbers and words about the run.
    """

    method: str
    z: Tensor
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, str | int | float] = field(default_factory=dict)


def feasible_start(target: LogDensity, points: int, seed: int, *, spread: float = 0.1, tries: int = 30) -> Tensor:
    """Points around the origin of unconstrained space where density and gradient are finite, (points, D).

    There the attention is nearly absent and every J_i nearly the identity: the side of the boundary where det J > 0.
    The spread halves until all is finite.

    Args:
        target: the posterior.
        points: how many.
        seed: of the draws.
        spread: standard deviation to begin with.
        tries: halvings at most.

    Raises:
        InputError: none is found.
    """
    unit = target.model.unit
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(points, target.dim, generator=generator, dtype=torch.float64).to(unit)  # type: ignore[arg-type]
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
    """A first guess of the posterior's covariance around points z, (C, D), from the curvature there, (C, D, D).

    The inverse of the Hessian's modulus, with no variance above one: the order of magnitude is what a sampler needs to
    begin with.
    """
    values, vectors = torch.linalg.eigh(target.hessian(z))
    covariance: Tensor = (vectors / values.abs().clamp(min=1.0).unsqueeze(-2)) @ vectors.mT
    return covariance


def approximation(
    target: LogDensity,
    method: str,
    law: Distribution,
    *,
    draws: int,
    seed: int,
    correct: bool,
    notes: Mapping[str, str | int | float],
    tails: bool = True,
) -> Draws:
    r"""Draws of a fitted law q, corrected by importance resampling where that can be trusted.

    The guide's own k-hat is the shape of the generalised Pareto law fitted to the largest weights pi(z) / q(z): how
    good q is. For the correction half of the proposals come from q and half from a Student t with q's mean and
    covariance, so that q may be too narrow; their weights under the mixture of both are smoothed in the same way. With
    ``correct`` and the mixture's k-hat at most 0.7 the draws are resampled by these weights, and what is left of the
    error of q is Monte Carlo error; otherwise they are draws of q.

    Args:
        target: the posterior pi.
        method: name of the result.
        law: q on R^D.
        draws: how many to keep.
        seed: of the draws.
        correct: whether to resample.
        tails: whether to propose from the Student t as well, which needs the density of q anywhere; False leaves the
            correction to q alone.
        notes: kept, with ``khat_guide``, ``corrected``, and where there are weights ``khat`` and ``importance_ess``
            (the independent draws that the kept ones are worth) added.

    Raises:
        InputError: the density is finite nowhere.
    """
    notes = dict(notes)
    with isolated(target.data[0].device, seed=seed), torch.no_grad():
        z = law.sample((_PROPOSALS * draws if correct else draws,))
        log_q, lp = law.log_prob(z), target.evaluate(z)["lp"]
        if not bool(torch.isfinite(lp).any()):
            raise InputError(f"{method}: the density is finite at no draw of the approximation; use --method nuts.")
        notes["khat_guide"] = _smoothed(lp - log_q)[1]
        stats = {"lp": lp[None, :draws], "log_q": log_q[None, :draws]}
        if correct:
            proposals, mixed = z, log_q
            if tails:
                half = len(z) // 2
                wide = _student(z)
                far = wide.sample((half,))
                proposals = torch.cat([z[:half], far])
                own = torch.cat([log_q[:half], law.log_prob(far)])
                mixed = torch.logaddexp(own, wide.log_prob(proposals)) - math.log(2)
                lp = torch.cat([lp[:half], target.evaluate(far)["lp"]])
            weights, khat = _smoothed(lp - mixed)
            notes["khat"] = khat
            if khat <= RELIABLE:
                chosen = torch.multinomial(weights, draws, replacement=True)
                worth = 1 / (float(weights.square().sum() / weights.sum() ** 2) + 1 / draws)
                notes |= {"corrected": 1, "importance_ess": worth}
                stats = {"lp": lp[None, chosen], "log_q": mixed[None, chosen]}
                return Draws(method, proposals[None, chosen], stats, notes)
    return Draws(method, z[None, :draws], stats, {**notes, "corrected": 0})


def _smoothed(log_ratio: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed weights and k-hat; a ratio that is not finite has weight 0."""
    from arviz_stats.base import array_stats

    ratio = log_ratio.double().cpu().numpy()
    # psislw is made for leave-one-out, where the weights are the inverse of the likelihood: it changes the sign itself.
    finite = np.where(np.isfinite(ratio), ratio, ratio[np.isfinite(ratio)].min() - 700)
    if np.ptp(finite) < 1e-8:  # q is pi to rounding, and has no tail of weights to fit
        return torch.full_like(log_ratio, 1 / len(ratio)), -math.inf
    smoothed, khat = array_stats.psislw(-finite)
    return torch.from_numpy(np.exp(smoothed)).to(log_ratio), float(khat)


def _student(z: Tensor) -> Distribution:
    """A multivariate t with 5 degrees of freedom around the mean of draws, with their covariance as its scale."""
    covariance = torch.cov(z.mT).reshape(z.shape[-1], z.shape[-1])
    factor = torch.linalg.cholesky(covariance)
    return dist.MultivariateStudentT(torch.full((), 5.0).to(z), z.mean(0), factor)
