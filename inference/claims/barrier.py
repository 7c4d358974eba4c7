"""Claim: minus the log-determinant is a barrier. It is, from one side."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.barrier import log_barrier
from probattn.conditional import Past
from probattn.distributions import LatentAttention, noise_distribution
from probattn.inference.claims.claim import Claim, Subject, judge

__all__ = ["approach", "barrier_claim"]

BOUND = {"density_error": 1e-10, "slope_error": 1e-3, "witness_error": 1e-12}


def approach(attention: CausalAttention, u: Tensor, position: int, factor: Tensor) -> Tensor:
    """-log|det J_i| at one position as the attention is turned up: the past and u_i stay, the logits are multiplied by factors.

    Only the *sensitivity* of the query is scaled, J_i(t) = I - t M_i, so that the boundary is met at t = 1 / eigenvalue of M_i.
    """
    block = Past.of(attention, u[:position]).mean_and_jacobian(u[position])[1]
    identity = torch.eye(block.shape[-1], dtype=block.dtype)
    return -torch.linalg.slogdet(identity - factor[:, None, None] * (identity - block))[1]


def barrier_claim(
    subject: Subject, *, barrier: Callable[[CausalAttention, Tensor], Tensor] = log_barrier
) -> Claim:
    r"""The barrier is the Jacobian term of the density, grows like -log(distance), and is negative without bound elsewhere.

    Args:
        subject: the fitted model; how often the barrier is a reward is counted on real text.
        barrier: the function under test, (attention, u) -> (*batch, T).
    """
    attention, u = subject.attention, subject.tokens(64)
    length, dim = u.shape[-2:]
    noise = noise_distribution(1.0, length, dim, like=u)
    with torch.no_grad():
        gaussian = noise.log_prob(attention.residual(u))
        penalty = barrier(attention, u)
        density = LatentAttention(attention, 1.0, length).log_prob(u)
        scale = 1 + density.abs()
        measured = {
            "density_error": float(((gaussian - penalty.sum(-1) - density).abs() / scale).max()),
            "slope_error": _slope_error(barrier),
            "witness_error": _witness_error(barrier),
            "two_sided_gap": _two_sided_gap(barrier),
            "mean_on_text": float(penalty.mean()),
            "smallest_on_text": float(penalty.min()),
            "largest_on_text": float(penalty.max()),
            "share_below_zero_on_text": float((penalty < -1e-12).double().mean()),
        }
    holds = judge(measured, BOUND)
    return Claim(
        "barrier",
        "b_i = -log|det J_i| is the change-of-variables term of the density and keeps the attention away from the degeneracy boundary.",
        "identity",
        "supported_within" if holds else "not_supported",
        measured,
        BOUND,
        "where |det J_i| < 1 and det J_i > 0 to begin with: beyond |det J_i| = 1 the same term is a reward without lower bound, and "
        f"a step across the boundary is held on the far side. On the held-out text {measured['share_below_zero_on_text']:.0%} of the "
        f"positions are rewarded (mean b = {measured['mean_on_text']:.2f})."
        if holds
        else None,
    )


def _pair(a: float, *, dtype: torch.dtype = torch.float64) -> tuple[CausalAttention, Tensor]:
    """Past {+1, -1} and u = 0, with A = a: J = 1 - a and the residual of the last token is zero."""
    return CausalAttention.from_bilinear(torch.tensor([[a]], dtype=dtype)), torch.tensor([[1.0], [-1.0], [0.0]], dtype=dtype)


def _slope_error(barrier: Callable[[CausalAttention, Tensor], Tensor]) -> float:
    """How far d b / d(-log distance) is from 1 as a -> 1 from below."""
    distances = torch.logspace(-2, -8, 7, dtype=torch.float64)
    values = torch.stack([barrier(*_pair(1 - float(distance)))[-1] for distance in distances])
    slopes = values.diff() / (-distances.log()).diff()
    return float((slopes - 1).abs().max())


def _witness_error(barrier: Callable[[CausalAttention, Tensor], Tensor]) -> float:
    """A = -c gives b = -log(1 + c) with zero residual, for any c: no lower bound, and the Gaussian term does not stop it."""
    return max(abs(float(barrier(*_pair(-c))[-1]) + math.log1p(c)) for c in (1.0, 1e2, 1e4, 1e6))


def _two_sided_gap(barrier: Callable[[CausalAttention, Tensor], Tensor]) -> float:
    """b just beyond the boundary against b just before it: equal, so the barrier repels from both sides."""
    return max(
        abs(float(barrier(*_pair(1 + distance))[-1]) - float(barrier(*_pair(1 - distance))[-1])) for distance in (1e-3, 1e-5)
    )
