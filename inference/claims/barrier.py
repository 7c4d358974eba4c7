"""Claim: minus the log-determinant is the Jacobian term of the density and a log-barrier, without a lower bound."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.barrier import log_barrier
from probattn.distributions import noise_distribution
from probattn.inference.claims.claim import Claim, Subject, judge, worst
from probattn.inference.claims.jacobian import dense_jacobian
from probattn.numerics import linalg

__all__ = ["barrier_claim"]

BOUND = {"density_error": 1e-10, "slope_error": 1e-3, "two_sided_gap": 1e-8, "witness_error": 1e-12}


def barrier_claim(subject: Subject, *, barrier: Callable[[CausalAttention, Tensor], Tensor] = log_barrier) -> Claim:
    """Compare the barrier with the density, with minus the log-distance to the boundary, and with its exact values.

    Args:
        subject: the fitted model; the density is compared on real text.
        barrier: the function under test, (attention, u) -> ``(*batch, T)``.
    """
    with torch.no_grad():
        measured = {
            "density_error": _density_error(subject.attention, subject.tokens(2)[:, :16], barrier),
            "slope_error": _slope_error(barrier),
            "two_sided_gap": _two_sided_gap(barrier),
            "witness_error": _witness_error(barrier),
        }
    control = _witness_error(lambda stage, tokens: log_barrier(stage, tokens, "one_sided"))
    measured["control_witness_error"] = control
    holds = judge(measured, BOUND) and control > BOUND["witness_error"]
    return Claim(
        "barrier",
        "b_i = −log |det J_i| is the change-of-variables term of the density. It grows like −log of the distance to "
        "the boundary det J_i = 0, equally from both sides, and it has no lower bound away from it.",
        "identity",
        "supported" if holds else "not_supported",
        measured,
        BOUND,
        formula="log p(u) = Σ_i log N(e_i; 0, S) − Σ_i b_i,   b_i = −log |det J_i|;   b → ∞ as det J → 0, and "
        "b = −log(1 + c) → −∞ for the past {+1, −1}, u = 0, A = −c",
        control="With the one-sided penalty in place of b, the value at A = −c is wrong by up to "
        f"{control:.3g}: that penalty is zero there.",
    )


def _pair(a: float, *, dtype: torch.dtype = torch.float64) -> tuple[CausalAttention, Tensor]:
    """Return the past {+1, -1} and u = 0 with A = a: J = 1 - a, and the residual of the last token is zero."""
    return CausalAttention.from_qk_matrix(torch.tensor([[a]], dtype=dtype)), torch.tensor(
        [[1.0], [-1.0], [0.0]], dtype=dtype
    )


def _density_error(
    attention: CausalAttention, u: Tensor, barrier: Callable[[CausalAttention, Tensor], Tensor]
) -> float:
    """Relative error of Gaussian term minus barrier, against the density through the whole dense Jacobian."""
    length, dim = u.shape[-2:]
    noise = noise_distribution(1.0, length, dim, like=u)
    gaps = []
    for sequence in u:
        whole = dense_jacobian(attention, sequence).reshape(length * dim, length * dim)
        gaussian = noise.log_prob(attention.residual(sequence))
        density = gaussian + linalg.slogdet(whole)[1]
        gap = gaussian - barrier(attention, sequence).sum() - density
        gaps.append(float(gap.abs() / (1 + density.abs())))
    return worst(*gaps)


def _slope_error(barrier: Callable[[CausalAttention, Tensor], Tensor]) -> float:
    """Largest distance of d b / d(-log distance) from 1 as a -> 1 from below."""
    distances = torch.logspace(-2, -8, 7, dtype=torch.float64)
    values = torch.stack([barrier(*_pair(1 - float(distance)))[-1] for distance in distances])
    slopes = values.diff() / (-distances.log()).diff()
    return float((slopes - 1).abs().max())


def _witness_error(barrier: Callable[[CausalAttention, Tensor], Tensor]) -> float:
    """Error of b = -log(1 + c) at A = -c, where the residual is zero: as c grows, b falls without a bound."""
    return worst(*(abs(float(barrier(*_pair(-c))[-1]) + math.log1p(c)) for c in (1.0, 1e2, 1e4, 1e6)))


def _two_sided_gap(barrier: Callable[[CausalAttention, Tensor], Tensor]) -> float:
    """Difference of b just beyond the boundary and just before it: none, so the barrier repels from both sides."""
    return worst(*(abs(float(barrier(*_pair(1 + d))[-1]) - float(barrier(*_pair(1 - d))[-1])) for d in (1e-3, 1e-5)))
