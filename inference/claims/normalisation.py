"""Claim: the attention density is a density. It is where the residual map does not fold."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from probattn.conditional import Past
from probattn.inference.claims.claim import Claim, Subject, judge, worst
from probattn.mass import ScalarMass, scalar_mass
from probattn.models.scalar import scalar_attention

__all__ = ["normalisation_claim"]

BOUND = {"signed_mass_error": 1e-8, "mass_error": 1e-8, "mass_error_without_folds": 1e-8}


def normalisation_claim(subject: Subject, *, mass: Callable[[Past, float], ScalarMass] = scalar_mass) -> Claim:
    """One-dimensional conditionals by exact quadrature: signed mass, mass, and the mean number of solutions.

    Pasts: {-1, +1}, random ones, and stretches of the text projected on the first principal axis of its embeddings.

    Args:
        subject: the fitted model.
        mass: the function under test.
    """
    signed = quadrature = unfolded = largest = 0.0
    folds = cases = 0
    smallest_folded = float("inf")
    for past, noise_scale in _cases(subject):
        result = mass(past, noise_scale)
        cases += 1
        signed = worst(signed, abs(result.signed - 1))
        quadrature = worst(quadrature, abs(result.absolute - result.roots))
        largest = worst(largest, result.absolute)
        if len(result.turning_points):
            folds += 1
            smallest_folded = min(smallest_folded, result.absolute)
        else:
            unfolded = worst(unfolded, abs(result.absolute - 1))
    measured = {
        "signed_mass_error": signed,
        "mass_error": quadrature,
        "mass_error_without_folds": unfolded,
        "cases": float(cases),
        "folded_cases": float(folds),
        "smallest_mass_with_folds": smallest_folded,
        "largest_mass": largest,
    }
    holds = judge(measured, BOUND)
    return Claim(
        "normalisation",
        "The next-token law N(e(u); 0, S) |det J(u)| integrates to one (tokens in one dimension, exact quadrature).",
        "identity",
        "supported_within" if holds else "not_supported",
        measured,
        BOUND,
        f"where u_i → e_i does not fold (a sup Var ≤ 1): {cases - folds} of {cases} cases; with folds the mass is "
        "the mean number of "
        f"solutions, here up to {largest:.3f}. With det J in place of its modulus the integral is always one."
        if holds
        else None,
    )


def _cases(subject: Subject) -> Iterator[tuple[Past, float]]:
    generator = torch.Generator().manual_seed(subject.seed + 2)
    for a in (-2.0, 0.25, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 4.0):
        yield _past(a, torch.tensor([-1.0, 1.0], dtype=torch.float64)), 0.7
    for tokens in (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(6)):
        for a in (-1.0, 0.2, 0.6, 2.0):
            yield _past(a, tokens), 1.0
    projected = _first_axis(subject.tokens(6))
    for tokens in projected:
        for a in (0.1, 0.5, 1.5):
            yield _past(a, tokens[:32]), 1.0


def _past(a: float, tokens: Tensor) -> Past:
    return Past.of(scalar_attention(a), tokens.unsqueeze(-1))


def _first_axis(u: Tensor) -> Tensor:
    """Tokens along their first principal axis, standardised, (windows, T)."""
    centred = u - u.mean((0, 1))
    axis = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False)[2][0]
    line: Tensor = centred @ axis
    return line / line.std()
