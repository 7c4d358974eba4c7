"""Claim: the attention density integrates to one. It does if the residual map does not fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from probattn import plotting
from probattn.attention import CausalAttention
from probattn.folds.mass import ScalarMass, scalar_mass
from probattn.inference.claims.claim import Claim, Settings, Subject, judge, worst
from probattn.models.scalar import scalar_attention
from probattn.next_token import NextToken
from probattn.numerics import linalg
from probattn.solve.context import Context

__all__ = ["normalisation_claim"]

BOUND = {
    "signed_mass_error": 1e-8,
    "mass_error": 1e-8,
    "mass_error_without_folds": 1e-8,
    "cubature_signed_error": 1e-8,
    # Some 25 estimates, each within 4.5 of its own standard errors: a miss has a probability of 2e-4.
    "largest_z": 4.5,
}
_DIMENSIONS = (2, 4, 8)
_NOISE = 1.0


def normalisation_claim(
    subject: Subject,
    settings: Settings | None = None,
    *,
    mass: Callable[[Context, float], ScalarMass] = scalar_mass,
    weights: Callable[[NextToken, int], tuple[Tensor, Tensor]] = NextToken.importance_weights,
) -> Claim:
    """Compare masses by quadrature (p = 1), cubature (p = 2) and importance sampling (p up to 8) with other values.

    In one dimension the pasts are {-1, +1}, random ones, and stretches of the text projected on the first principal
    axis of its embeddings; the mass by quadrature is compared with the mean number of solutions from the turning
    points. In several dimensions the attention acts on each of p rotated coordinates by itself, so that the exact mass
    is a product of one-dimensional ones; a general attention in the plane is compared with cubature.

    Args:
        subject: the fitted model.
        settings: ``full`` takes five times as many pasts in several dimensions.
        mass: the function under test in one dimension, (past, noise scale) -> :class:`ScalarMass`.
        weights: the function under test in several dimensions, (next token, draws) -> weights and signed weights.
    """
    signed = quadrature = unfolded = largest = control = 0.0
    folds = cases = 0
    smallest_folded = float("inf")
    for past, noise_scale in _cases(subject):
        result = mass(past, noise_scale)
        cases += 1
        signed = worst(signed, abs(result.signed - 1))
        quadrature = worst(quadrature, abs(result.absolute - result.roots))
        largest = worst(largest, result.absolute)
        control = max(control, abs(scalar_mass(past, noise_scale, jacobian=False).signed - 1))
        if len(result.turning_points):
            folds += 1
            smallest_folded = min(smallest_folded, result.absolute)
        else:
            unfolded = worst(unfolded, abs(result.absolute - 1))
    exact, estimates = _several_dimensions(subject.seed, 5 if settings is not None and settings.full else 1, weights)
    cubature, cubature_signed, in_plane = _plane(subject.seed, weights)
    exact, estimates = [*exact, *cubature], [*estimates, *in_plane]
    scores = [
        abs(value - expected) / error
        for expected, row in zip(exact, estimates, strict=True)
        for value, error, expected in ((*row[:2], expected), (*row[2:], 1.0))
    ]
    measured = {
        "signed_mass_error": signed,
        "mass_error": quadrature,
        "mass_error_without_folds": unfolded,
        "cubature_signed_error": cubature_signed,
        "largest_z": worst(*scores),
        "cases": float(cases),
        "folded_cases": float(folds),
        "cases_in_several_dimensions": float(len(exact)),
        "smallest_mass_with_folds": smallest_folded,
        "largest_mass": worst(largest, *exact),
        "control_signed_error": control,
    }
    holds = judge(measured, BOUND) and control > BOUND["signed_mass_error"]
    return Claim(
        "normalisation",
        "The next-token density N(e(u); 0, S) |det J(u)| integrates to one.",
        "identity",
        "supported_within" if holds else "not_supported",
        measured,
        BOUND,
        "the map u_i → e_i does not fold (in one dimension: a sup Var ≤ 1)" if holds else None,
        formula="Z(u_<i) = ∫ N(e_i; 0, S) |det J_i| du_i = E[number of u_i with u_i − μ_i = ε] ≥ 1,   "
        "∫ N(e_i; 0, S) det J_i du_i = 1",
        control=f"Without its determinant the density has a mass that is wrong by up to {control:.2g}.",
        finding=f"{cases - folds} of {cases} one-dimensional cases do not fold. In the others the mass is the mean "
        f"number of solutions, here up to {measured['largest_mass']:.3f}, and likewise in 2, 4 and 8 dimensions. With "
        "det J in place of its modulus the integral is always one.",
        figures={"normalisation": _figure(exact, estimates)},
    )


def _several_dimensions(
    seed: int, repeats: int, weights: Callable[[NextToken, int], tuple[Tensor, Tensor]]
) -> tuple[list[float], list[tuple[float, float, float, float]]]:
    """Return exact masses of attentions that act on rotated coordinates one by one, and their estimates."""
    generator = torch.Generator().manual_seed(seed + 3)
    exact, estimates = [], []
    for dim in _DIMENSIONS:
        for _ in range(2 * repeats):
            slopes = 2.0 * torch.rand(dim, generator=generator, dtype=torch.float64)
            points = torch.randn(8, dim, generator=generator, dtype=torch.float64)
            lines = [
                Context.of(scalar_attention(float(a)), column.unsqueeze(-1))
                for a, column in zip(slopes, points.mT, strict=True)
            ]
            exact.append(math.prod(scalar_mass(line, _NOISE).absolute for line in lines))
            basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
            axes = basis.mT.unsqueeze(1)  # (p, 1, p): head k sees coordinate k alone
            attention = CausalAttention(slopes.view(-1, 1, 1) * axes, axes, axes, axes.mT, scale=1.0)
            next_token = NextToken(Context.of(attention, points @ basis.mT), _NOISE)
            estimates.append(_estimate(next_token, weights))
    return exact, estimates


def _plane(
    seed: int, weights: Callable[[NextToken, int], tuple[Tensor, Tensor]]
) -> tuple[list[float], float, list[tuple[float, float, float, float]]]:
    """Return masses of general attentions in the plane by cubature, the error of the signed ones, and estimates."""
    generator = torch.Generator().manual_seed(seed + 4)
    exact, estimates, signed = [], [], 0.0
    for strength in (0.1, 0.5, 1.0):
        attention = CausalAttention.from_qk_matrix(
            strength * torch.randn(2, 2, generator=generator, dtype=torch.float64)
        )
        next_token = NextToken(
            Context.of(attention, torch.randn(8, 2, generator=generator, dtype=torch.float64)), _NOISE
        )
        values = next_token.past.values.sum(-3)
        # The trapezoidal rule converges faster than any power for the smooth signed density; the kink of its modulus
        # at a fold leaves an error of the order of the cell, far below that of the estimates.
        ends = zip(values.amin(0).tolist(), values.amax(0).tolist(), strict=True)
        grids = [torch.linspace(low - 9, high + 9, 601, dtype=torch.float64) for low, high in ends]
        u = torch.stack(torch.meshgrid(*grids, indexing="ij"), dim=-1)
        cell = math.prod(float(grid[-1] - grid[0]) / 600 for grid in grids)
        mean, jacobian = next_token.past.mean_and_jacobian(u)
        density = next_token.noise.log_prob((u - mean).unsqueeze(-2)).exp() * linalg.det(jacobian) * cell
        exact.append(float(density.abs().sum()))
        signed = worst(signed, abs(float(density.sum()) - 1))
        estimates.append(_estimate(next_token, weights))
    return exact, signed, estimates


def _estimate(
    next_token: NextToken, weights: Callable[[NextToken, int], tuple[Tensor, Tensor]], draws: int = 20_000
) -> tuple[float, float, float, float]:
    """Estimate Z and the signed mass by importance sampling; return each with its standard error."""
    absolute, signed = weights(next_token, draws)
    root = math.sqrt(draws)
    return float(absolute.mean()), float(absolute.std()) / root, float(signed.mean()), float(signed.std()) / root


def _figure(exact: list[float], estimates: list[tuple[float, float, float, float]]) -> Figure:
    found = np.array(estimates)
    return plotting.plot_masses(np.array(exact), found[:, 0], found[:, 1], found[:, 2], found[:, 3])


def _cases(subject: Subject) -> Iterator[tuple[Context, float]]:
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


def _past(a: float, tokens: Tensor) -> Context:
    return Context.of(scalar_attention(a), tokens.unsqueeze(-1))


def _first_axis(u: Tensor) -> Tensor:
    """Project tokens on their first principal axis and standardise them, (windows, T)."""
    centred = u - u.mean((0, 1))
    axis = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False)[2][0]
    line: Tensor = centred @ axis
    return line / line.std()
