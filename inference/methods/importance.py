"""Draws of a fitted distribution, corrected by importance resampling where that can be trusted."""

from __future__ import annotations

import logging
import math
import time

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution

from probattn.errors import InputError
from probattn.inference.methods.draws import Draws, Info
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.runtime.isolation import isolated
from probattn.inference.runtime.progress import log_step

__all__ = ["RELIABLE", "draw_corrected"]

RELIABLE = 0.7  # largest k-hat at which importance weights are of use (Vehtari et al., 2024, arXiv 1507.02646)
_PROPOSALS = 4  # proposals per draw kept
_LEAST = 100  # proposals; a tail of fewer has no shape
_PARTS = 100  # in which proposals are evaluated, so that progress can be told
_QUIET = 2.0  # seconds between two words on progress; quicker work is done without any
_LOG = logging.getLogger(__name__)


def draw_corrected(
    target: LogDensity,
    method: str,
    guide: Distribution,
    *,
    draws: int,
    seed: int,
    correct: bool,
    info: Info,
    tails: bool = True,
) -> Draws:
    r"""Draws of a guide q, corrected by importance resampling where that can be trusted.

    The guide's own k-hat is the shape of the generalised Pareto distribution fitted to the largest weights
    pi(z) / q(z): it says how good q is. For the correction half of the proposals come from q and half from a Student t
    with q's mean and covariance, so that q may be too narrow (a defensive mixture; Hesterberg, 1995,
    doi:10.1080/00401706.1995.10484303),

    .. math:: w(z) = \frac{\pi(z)}{\tfrac12 q(z) + \tfrac12 t_5(z)} ,

    and their weights are smoothed in the same way. Where the mixture's k-hat is at most 0.7 the draws are resampled by
    these weights, and what is left of the error of q is Monte Carlo error. Source: Vehtari et al. (2024, arXiv
    1507.02646).

    Args:
        target: log-density log pi.
        method: name of the method in the result.
        guide: fitted distribution q on R^D.
        draws: number of draws kept.
        seed: random seed.
        correct: resample by importance weights where the k-hat of the mixture is at most 0.7.
        info: numbers and words about the fit, passed on to the result.
        tails: propose from the Student t as well, which needs the density of q at points that q did not draw; False
            corrects by draws of q alone.

    Returns:
        One chain. Its info has ``khat_guide``, ``corrected`` (0 or 1), with ``correct`` also ``khat``, and where the
        draws were resampled ``importance_ess``, the number of independent draws that they are worth.

    Raises:
        InputError: the density is finite at no draw.
    """
    with isolated(target.data[0].device, seed=seed), torch.no_grad():
        z = guide.sample((max(_LEAST, _PROPOSALS * draws if correct else draws),))
        log_q, lp = guide.log_prob(z), _evaluated(target, z)
        if not bool(torch.isfinite(lp).any()):
            raise InputError(f"{method}: the density is finite at no draw of the approximation; use --method nuts.")
        info = {**info, "khat_guide": _smoothed(lp - log_q)[1], "corrected": 0}
        plain = {"lp": lp[None, :draws], "log_q": log_q[None, :draws]}
        if not correct:
            return Draws(method, z[None, :draws], plain, info)
        proposals, mixed = z, log_q
        if tails:
            half = len(z) // 2
            wide = _student(z)
            far = wide.sample((half,))
            proposals = torch.cat([z[:half], far])
            own = torch.cat([log_q[:half], guide.log_prob(far)])
            mixed = torch.logaddexp(own, wide.log_prob(proposals)) - math.log(2)
            lp = torch.cat([lp[:half], _evaluated(target, far)])
        weights, khat = _smoothed(lp - mixed)
        info["khat"] = khat
        if not khat <= RELIABLE:
            return Draws(method, z[None, :draws], plain, info)
        chosen = torch.multinomial(weights, draws, replacement=True)
        worth = 1 / (float(weights.square().sum() / weights.sum() ** 2) + 1 / draws)
        info |= {"corrected": 1, "importance_ess": worth}
        return Draws(method, proposals[None, chosen], {"lp": lp[None, chosen], "log_q": mixed[None, chosen]}, info)


def _evaluated(target: LogDensity, z: Tensor) -> Tensor:
    """Evaluate log pi at points ``(S, D)``, ``(S,)``, with words on the progress where it takes long."""
    found, done, told = [], 0, time.monotonic()
    for part in z.split(max(_LEAST, -(-len(z) // _PARTS))):
        found.append(target.evaluate(part)["lp"])
        done += len(part)
        if time.monotonic() - told > _QUIET:
            log_step(_LOG, f"weighing draws: {done} of {len(z)}", done, len(z))
            told = time.monotonic()
    return torch.cat(found)


def _smoothed(log_ratio: Tensor) -> tuple[Tensor, float]:
    """Pareto-smoothed weights and k-hat; a ratio that is not finite has weight 0."""
    from arviz_stats.base import array_stats

    ratio = log_ratio.double().cpu().numpy()
    finite = np.where(np.isfinite(ratio), ratio, ratio[np.isfinite(ratio)].min() - 700)
    if np.ptp(finite) < 1e-8:  # q is pi to rounding, and has no tail of weights to fit
        return torch.full_like(log_ratio, 1 / len(ratio)), -math.inf
    # psislw is made for leave-one-out, where the weights are the inverse of the likelihood: it changes the sign itself.
    smoothed, khat = array_stats.psislw(-finite)
    return torch.from_numpy(np.exp(smoothed)).to(log_ratio), float(khat)


def _student(z: Tensor) -> Distribution:
    """A multivariate t with 5 degrees of freedom around the mean of draws, with their covariance as its scale."""
    covariance = torch.cov(z.mT).reshape(z.shape[-1], z.shape[-1])
    factor = torch.linalg.cholesky(covariance)
    return dist.MultivariateStudentT(torch.full((), 5.0).to(z), z.mean(0), factor)
