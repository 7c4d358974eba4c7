"""Claim: minus the log-determinant is a barrier. It is, from one side."""

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

__all__ = ["barrier_claim"]

BOUND = {"density_error": 1e-10, "slope_error": 1e-3, "witness_error": 1e-12}


def barrier_claim(subject: Subject, *, barrier: Callable[[CausalAttention, Tensor], Tensor] = log_barrier) -> Claim:
    r"""The barrier is the Jacobian term of the density, grows like -log(distance), and is unbounded below elsewhere.

    Args:
        subject: the fitted model; how often the barrier is a reward is counted on real text.
        barrier: the function under test, (attention, u) -> (*batch, T).
    """
    attention, u = subject.attention, subject.tokens(64)
    with torch.no_grad():
        penalty = barrier(attention, u)
        measured = {
            "density_error": _density_error(attention, u[:2, :16], barrier),
            "slope_error": _slope_error(barrier),
            "witness_error": _witness_error(barrier),
            "two_sided_gap": _two_sided_gap(barrier),
            "mean_on_text": float(penalty.mean()),
            "smallest_on_text": float(penalty.min()),
            "largest_on_text": float(penalty.max()),
            "share_below_zero_on_text": float((penalty < -1e-12).double().mean()),
        }
    control = _witness_error(lambda stage, tokens: log_barrier(stage, tokens, "one_sided"))
    measured["control_witness_error"] = control
    holds = judge(measured, BOUND) and control > BOUND["witness_error"]
    return Claim(
        "barrier",
        "b_i = −log |det J_i| is the change-of-variables term of the density and keeps the attention away from the "
        "degeneracy boundary.",
        "identity",
        "supported_within" if holds else "not_supported",
        measured,
        BOUND,
        "where |det J_i| < 1 and det J_i > 0 to begin with: beyond |det J_i| = 1 the same term is a reward without "
        "lower bound, and "
        "a step across the boundary is held on the far side. On the held-out text "
        f"{measured['share_below_zero_on_text']:.0%} of the "
        f"positions are rewarded (mean b = {measured['mean_on_text']:.2f})."
        if holds
        else None,
        formula="log p(u) = Σ_i log N(e_i; 0, S) − Σ_i b_i,   b_i = −log |det J_i|;   b → ∞ as det J → 0, and "
        "b = −log(1 + c) → −∞ for the past {+1, −1}, u = 0, A = −c",
        control="The one-sided penalty in place of the literal barrier misses the value at the witness A = −c by up to "
        f"{control:.3g}: it pays nothing there.",
    )


def _pair(a: float, *, dtype: torch.dtype = torch.float64) -> tuple[CausalAttention, Tensor]:
    """Past {+1, -1} and u = 0, with A = a: J = 1 - a and the residual of the last token is zero."""
    return CausalAttention.from_qk_matrix(torch.tensor([[a]], dtype=dtype)), torch.tensor(
        [[1.0], [-1.0], [0.0]], dtype=dtype
    )


def _density_error(
    attention: CausalAttention, u: Tensor, barrier: Callable[[CausalAttention, Tensor], Tensor]
) -> float:
    """Gaussian term minus the barrier against the change of variables through the whole dense Jacobian, relative."""
    length, dim = u.shape[-2:]
    noise = noise_distribution(1.0, length, dim, like=u)
    gaps = []
    for sequence in u:
        whole = dense_jacobian(attention, sequence).reshape(length * dim, length * dim)
        gaussian = noise.log_prob(attention.residual(sequence))
        density = gaussian + torch.linalg.slogdet(whole)[1]
        gap = gaussian - barrier(attention, sequence).sum() - density
        gaps.append(float(gap.abs() / (1 + density.abs())))
    return worst(*gaps)


def _slope_error(barrier: Callable[[CausalAttention, Tensor], Tensor]) -> float:
    """How far d b / d(-log distance) is from 1 as a -> 1 from below."""
    distances = torch.logspace(-2, -8, 7, dtype=torch.float64)
    values = torch.stack([barrier(*_pair(1 - float(distance)))[-1] for distance in distances])
    slopes = values.diff() / (-distances.log()).diff()
    return float((slopes - 1).abs().max())


def _witness_error(barrier: Callable[[CausalAttention, Tensor], Tensor]) -> float:
    """A = -c gives b = -log(1 + c) with zero residual, for any c: no lower bound."""
    return worst(*(abs(float(barrier(*_pair(-c))[-1]) + math.log1p(c)) for c in (1.0, 1e2, 1e4, 1e6)))


def _two_sided_gap(barrier: Callable[[CausalAttention, Tensor], Tensor]) -> float:
    """B just beyond the boundary against b just before it: equal, so the barrier repels from both sides."""
    return worst(*(abs(float(barrier(*_pair(1 + d))[-1]) - float(barrier(*_pair(1 - d))[-1])) for d in (1e-3, 1e-5)))
