"""Claim: the three margins measure three different things, each as defined."""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy.stats import spearmanr
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.barrier import MarginKind, stability_margin, support_tokens
from probattn.inference.claims.claim import Claim, Subject, judge, worst
from probattn.inference.claims.realness import may_be_real
from probattn.numerics import linalg
from probattn.solve.context import Context

__all__ = ["margin_claim"]

BOUND = {
    "determinant_error": 1e-10,
    "spectral_error": 1e-8,
    "singular_boundary_error": 1e-8,
    "nearest_singular_error": 1e-10,
    "noise_gain_error": 1e-6,
}
_K = 5


def margin_claim(
    subject: Subject, *, margin: Callable[[CausalAttention, Tensor, MarginKind], Tensor] = stability_margin
) -> Claim:
    """Compare each margin with its own definition, and with the other two on real text.

    The determinant margin is compared with the dense determinant and its sign; the spectral one with the eigenvalues of
    the dense block, and with the first singular matrix on the path I - t M; the singular-value one with the distance to
    a singular block that is constructed, and with the reciprocal of the gain from noise to token in finite differences
    of the residual map.

    Args:
        subject: the fitted model.
        margin: the function under test, (attention, u, kind) -> ``(*batch, T)``.
    """
    measured = dict.fromkeys(BOUND, 0.0)
    attention, u = subject.attention, subject.tokens(4)
    with torch.no_grad():
        for case, sequence in ((attention, u[0]), *_strong(subject)):
            numbers = _errors(case, sequence, margin)
            measured = {name: worst(measured[name], numbers[name]) for name in BOUND}
        folded = sum(float((margin(case, sequence, "determinant") < 0).sum()) for case, sequence in _strong(subject))
        agreement = _agreement(attention, subject.tokens(64))
        control = worst(
            *(_errors(case, sequence, _determinant)["noise_gain_error"] for case, sequence in _strong(subject))
        )
    holds = judge(measured, BOUND) and control > BOUND["noise_gain_error"]
    return Claim(
        "margin",
        "The determinant margin measures orientation, the spectral margin the room along I − t M, and the "
        "singular-value margin the distance to a singular block, which is the reciprocal gain of the noise.",
        "identity",
        "supported" if holds else "not_supported",
        {**measured, "negative_determinants_compared": folded, **agreement, "control_noise_gain_error": control},
        BOUND,
        formula="determinant: det J_i;   spectral: 1 − max real eigenvalue of I − J_i;   singular value: σ_min(J_i) = "
        "min { ‖E‖ : J_i + E singular } = 1 / ‖∂u_i/∂ε_i‖",
        control="With the determinant in place of the singular-value margin, the gain of the noise is wrong by up to "
        f"{control:.2g} times its size.",
        finding="None of the three replaces another: of the five support tokens that each of them names in a window, "
        f"determinant and singular value share {agreement['shared_support_determinant_singular_value']:.0%}, "
        f"determinant and spectral {agreement['shared_support_determinant_spectral']:.0%}, spectral and singular value "
        f"{agreement['shared_support_spectral_singular_value']:.0%}.",
    )


def _determinant(attention: CausalAttention, u: Tensor, _: MarginKind) -> Tensor:
    """Return the determinant margin for every kind of margin that is asked for."""
    return stability_margin(attention, u, "determinant")


def _strong(subject: Subject) -> list[tuple[CausalAttention, Tensor]]:
    """Return random attentions that are strong enough to fold, so that signs are tested."""
    generator = torch.Generator().manual_seed(subject.seed + 1)
    cases = []
    for _ in range(8):
        query, key = (torch.randn(2, 2, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        cases.append((CausalAttention(query, key), torch.randn(12, 4, generator=generator, dtype=torch.float64)))
    return cases


def _errors(
    attention: CausalAttention, u: Tensor, margin: Callable[[CausalAttention, Tensor, MarginKind], Tensor]
) -> dict[str, float]:
    # The reference blocks come from the next-token map, another route through the code.
    blocks = torch.stack([Context.of(attention, u[:i]).mean_and_jacobian(u[i])[1] for i in range(len(u))])  # (T, p, p)
    identity = torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    change = identity - blocks
    determinant = linalg.det(blocks)
    left, singular, right = torch.linalg.svd(blocks)
    spectral = margin(attention, u, "spectral")
    smallest = margin(attention, u, "singular_value")

    eigenvalues = torch.linalg.eigvals(change)
    largest = torch.where(may_be_real(change), eigenvalues.real, -torch.inf).amax(-1)
    spectral_gap = (spectral - (1 - largest)).abs() / (1 + largest.abs())  # two infinite margins are equal, not NaN
    turned = (1 - spectral).clamp(min=1e-12)
    at_boundary = torch.linalg.svdvals(identity - change / turned[:, None, None])[..., -1]
    relevant = (1 - spectral > 1e-3) & torch.isfinite(spectral)
    nearest = blocks - smallest[:, None, None] * left[..., :, -1:] * right[..., -1:, :]
    return {
        "determinant_error": float(
            ((margin(attention, u, "determinant") - determinant).abs() / (1 + determinant.abs())).max()
        ),
        "spectral_error": float(torch.where(spectral == 1 - largest, 0.0, spectral_gap).max()),
        "singular_boundary_error": float(at_boundary[relevant].max()) if bool(relevant.any()) else 0.0,
        "nearest_singular_error": float((torch.linalg.svdvals(nearest)[..., -1] / (1 + singular[..., 0])).max()),
        "noise_gain_error": _noise_gain_error(attention, u, smallest, right[..., -1, :]),
    }


def _noise_gain_error(attention: CausalAttention, u: Tensor, smallest: Tensor, direction: Tensor) -> float:
    """Largest error of sigma_min against ``|de_i| / |du_i|`` by differences along the direction of largest gain."""
    gaps, step = [], 1e-5
    for i in range(len(u)):
        past = Context.of(attention, u[:i])
        ends = torch.stack([u[i] + step * direction[i], u[i] - step * direction[i]])
        noise = ends - past.mean(ends)
        slope = torch.linalg.vector_norm(noise[0] - noise[1]) / (2 * step)
        gaps.append(float((slope - smallest[i]).abs() / (1 + smallest[i])))
    return worst(*gaps)


def _agreement(attention: CausalAttention, u: Tensor) -> dict[str, float]:
    """Return the rank correlation and the share of common support tokens for each pair of margins on the text."""
    kinds: tuple[MarginKind, ...] = ("determinant", "spectral", "singular_value")
    margins = {kind: stability_margin(attention, u, kind).flatten() for kind in kinds}
    supports = {kind: support_tokens(attention, u, min(_K, u.shape[-2]), kind).positions for kind in kinds}
    numbers = {}
    for first, second in (kinds[:2], kinds[1:], kinds[::2]):
        finite = torch.isfinite(margins[first]) & torch.isfinite(margins[second])
        rho = spearmanr(margins[first][finite].numpy(), margins[second][finite].numpy()).statistic
        shared = (supports[first].unsqueeze(-1) == supports[second].unsqueeze(-2)).any(-1).double().mean()
        numbers[f"rank_correlation_{first}_{second}"] = float(rho)
        numbers[f"shared_support_{first}_{second}"] = float(shared)
    return numbers
