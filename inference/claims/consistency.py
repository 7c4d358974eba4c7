"""Claim: the densities of the prefixes are consistent. They are if nothing folds; otherwise they miss the factor Z.

In one dimension with a > 0 folds have positive probability at any noise, because the past is unbounded: three tokens
have the total mass E[Z(u_1, u_2)] > 1, by an amount that is computed here and that no simulation would show for weak
attention. For a <= 0 the mass is exactly one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from probattn import plotting
from probattn.attention import CausalAttention
from probattn.distributions import LatentAttention
from probattn.folds.mass import scalar_mass
from probattn.inference.claims.claim import Claim, Settings, judge, worst
from probattn.inference.studies.two_sample import TwoSample, holm, two_sample_test
from probattn.models.scalar import scalar_attention
from probattn.numerics.random import isolated_seed
from probattn.process import AttentionProcess
from probattn.solve.context import Context
from probattn.solve.sequence import solve_sequence

__all__ = ["consistency_claim", "three_token_excess"]

ERROR = 0.01
_BOUND = {
    "marginal_error_unfolded": 1e-7,
    "marginal_error_over_mass": 1e-6,
    "excess_formula_error": 1e-10,
    "rejections_short_against_long": 0.0,
    "lazy_eager_differences": 0.0,
    "path_solution_error": 1e-9,
}
_SLOPES = (-1.0, 0.05, 0.1, 4 / 27, 0.3, 1.0, 3.0)
_FOLDED = 30.0
_PREFIX = 4

Prefixes = Callable[[CausalAttention, int, int, int], Tensor]


def draw_prefixes(attention: CausalAttention, length: int, draws: int, seed: int) -> Tensor:
    """Draw sequences of the given length and keep their first four tokens, (draws, 4 p)."""
    with isolated_seed(seed):
        u: Tensor = LatentAttention(attention, 0.8, length).sample((draws,))
    return u[:, :_PREFIX].flatten(1)


def consistency_claim(settings: Settings, *, prefixes: Prefixes = draw_prefixes) -> Claim:
    """Compare densities and samples of prefixes by quadrature, by two-sample tests and bit for bit.

    Args:
        settings: ``full`` takes longer paths and larger samples.
        prefixes: the sampler under test, (attention, length, draws, seed) -> (draws, 4 p).
    """
    draws, path = (600, 2000) if settings.full else (300, 300)
    unfolded, over_mass, shown = _marginals()
    excess = {slope: three_token_excess(slope) for slope in _SLOPES}
    tests = _prefix_tests(prefixes, draws)
    control, tests["folded, against itself"] = _raw_density_test()
    adjusted = holm([p for found in tests.values() for p in (found.energy_p, found.mmd_p)])
    control_p = max(control.energy_p, control.mmd_p)
    differences, distance = _lazy_and_eager(path)
    measured = {
        "marginal_error_unfolded": unfolded,
        "marginal_error_over_mass": over_mass,
        "excess_formula_error": _excess_formula_error(),
        "rejections_short_against_long": float(sum(p <= ERROR for p in adjusted)),
        "smallest_adjusted_p": min(adjusted),
        "lazy_eager_differences": differences,
        "path_solution_error": distance,
        **{f"three_token_excess_mass_{slope:.3g}": value for slope, value in excess.items()},
        "control_marginal_error": abs(shown - 1),
        "control_raw_density_p": control_p,
    }
    holds = judge(measured, _BOUND) and control_p <= ERROR and abs(shown - 1) > 0.1
    return Claim(
        "consistency",
        "The density of n tokens is the marginal of the density of n + 1 tokens, so that attention defines a process "
        "over infinite sequences.",
        "statistical",
        "supported_within" if holds else "not_supported",
        measured,
        _BOUND,
        "no fold can occur (in one dimension: a ≤ 0)" if holds else None,
        formula="∫ p(u_1..n+1) du_n+1 = p(u_1..n) Z(u_1..n)",
        control=f"A process that folds. At a = 3, after the past (−1, 1), the density of three tokens integrates to "
        f"{shown:.3f} times that of two; at a = {_FOLDED:g} a two-sample test distinguishes pairs from the marginal of "
        f"that density from pairs of the process (largest p = {control_p:.3g}).",
        finding="The distribution of the generator, with its stated choice of root, is consistent for every attention. "
        "The stated density counts the roots. In one dimension the mass of three tokens exceeds one by "
        f"{excess[0.05]:.1e} at a σ² = 0.05, by {excess[4 / 27]:.1e} at 4/27 and by {excess[1.0]:.3f} at 1. The excess "
        "is positive for every a > 0, because the past is unbounded: a certified past makes it small, not zero.",
        figures={"consistency": _figure()},
    )


def three_token_excess(slope: float) -> float:
    r"""Compute the excess mass of three one-dimensional tokens at sigma = 1, E[Z(u_1, u_2)] - 1, by quadrature.

    With c = (u_1 + u_2)/2, h = (u_2 - u_1)/2 the residual map is :math:`e(u) = u - c - h \tanh(a h u)`. It turns where
    :math:`\cosh^2(a h u) = a h^2`, at :math:`\pm u^*` if a h^2 > 1, and then
    :math:`Z - 1 = 2 [\Phi(e(-u^*)) - \Phi(e(u^*))]`. Here u_1 ~ N(0, 1) and u_2 - u_1 ~ N(0, 1). Derived here.

    Args:
        slope: a sigma^2; for a <= 0 the excess is zero.

    Returns:
        The excess, at least zero.

    Example:
        >>> three_token_excess(-1.0), three_token_excess(0.05) < 1e-4 < three_token_excess(1.0)
        (0.0, True)
    """
    if slope <= 0:
        return 0.0
    first = 2 / math.sqrt(slope)  # the smallest |u_2 - u_1| that folds
    # The integrand begins like a power at the fold and ends like a Gaussian: a square as the variable, then panels.
    nodes, weights = np.polynomial.legendre.leggauss(400)
    root = 0.5 * (nodes + 1)
    reach = 10.0
    gap = first + reach * root**2
    gap_weight = weights * reach * root
    u1, u1_weight = 9 * nodes, 9 * weights
    excess = _pair_excess(slope, u1[:, None], u1[:, None] + gap)
    density = np.exp(-0.5 * u1[:, None] ** 2 - 0.5 * gap**2) / (2 * math.pi)
    # Both signs of the gap: Z is even in u -> -u, which maps (u_1, gap) to (-u_1, -gap).
    return float(2 * (excess * density * u1_weight[:, None] * gap_weight).sum())


def _pair_excess(slope: float, u1: NDArray[np.float64], u2: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Z - 1 after two tokens at sigma = 1."""
    centre, half = (u1 + u2) / 2, np.abs(u2 - u1) / 2
    folded = slope * half**2 > 1
    turn = np.arccosh(np.sqrt(np.where(folded, slope * half**2, 1.0)))  # a h u*
    reach = np.divide(turn, slope * half, out=np.zeros_like(turn), where=half > 0) - half * np.tanh(turn)  # <= 0
    # Differences of the distribution function in the tail where it keeps its digits.
    centre = np.abs(centre)
    excess: NDArray[np.float64] = 2 * (ndtr(-centre - reach) - ndtr(-centre + reach))
    return excess


def _excess_formula_error() -> float:
    """Largest error of the closed form of Z against quadrature, over random pairs and slopes."""
    generator = np.random.default_rng(0)
    errors = []
    for slope in (0.3, 1.0, 3.0):
        for u1, u2 in generator.normal(scale=2.0, size=(10, 2)):
            past = Context.of(scalar_attention(slope), torch.tensor([[u1], [u2]], dtype=torch.float64))
            exact = scalar_mass(past, 1.0).absolute - 1
            errors.append(abs(float(_pair_excess(slope, np.array(u1), np.array(u2))) - exact))
    return worst(*errors)


def _marginals() -> tuple[float, float, float]:
    """Integrate the density of three tokens over the last one, relative to that of two.

    Returns:
        Error against one without folds, error against Z always, and the ratio itself at the first fold.
    """
    grid = torch.linspace(-14, 14, 40_001, dtype=torch.float64)
    step = float(grid[1] - grid[0])
    unfolded, over_mass, shown = 0.0, 0.0, math.nan
    for a in (-2.0, 0.3, 0.8, 3.0):
        attention = scalar_attention(a)
        for pair in ((-1.0, 1.0), (0.4, -1.3)):
            u = torch.tensor(pair, dtype=torch.float64).unsqueeze(-1)
            whole = torch.cat([u.expand(len(grid), 2, 1), grid.view(-1, 1, 1)], dim=1)  # (G, 3, 1)
            density = LatentAttention(attention, 0.8, 3).log_prob(whole).exp()
            ratio = float(density.sum()) * step / float(LatentAttention(attention, 0.8, 2).log_prob(u).exp())
            mass = scalar_mass(Context.of(attention, u), 0.8)
            over_mass = worst(over_mass, abs(ratio - mass.absolute))
            if not len(mass.turning_points):
                unfolded = worst(unfolded, abs(ratio - 1))
            elif math.isnan(shown):
                shown = ratio
    return unfolded, over_mass, shown


def _prefix_tests(prefixes: Prefixes, draws: int) -> dict[str, TwoSample]:
    """Test prefixes of short runs against those of long runs, where nothing folds, in one and several dimensions."""
    generator = torch.Generator().manual_seed(3)
    tests = {}
    for dim in (1, 2, 4):
        factor = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
        attention = CausalAttention.from_qk_matrix(0.03 * (factor - 2 * torch.eye(dim)))
        short = prefixes(attention, _PREFIX, draws, 10 + dim)
        long = prefixes(attention, 16, draws, 20 + dim)
        tests[f"p = {dim}"] = two_sample_test(short, long, seed=dim)
    return tests


def _raw_density_test(draws: int = 1500) -> tuple[TwoSample, TwoSample]:
    """Test pairs of a folded process against pairs from the marginal of its three-token density, Z times theirs.

    They are compared in the coordinates that Z depends on, ``|u_1 + u_2|`` / 2 and ``|u_2 - u_1|`` / 2. The second test
    compares the process with itself.
    """
    generator = torch.Generator().manual_seed(5)

    def pairs(count: int) -> Tensor:
        first, gap = torch.randn(2, count, generator=generator, dtype=torch.float64)
        return torch.stack([first, first + gap], dim=-1)

    def coordinates(u: Tensor) -> Tensor:
        return torch.stack([u.sum(-1).abs() / 2, u.diff(dim=-1).squeeze(-1).abs() / 2], dim=-1)

    pool = pairs(8 * draws)
    mass = 1 + torch.as_tensor(_pair_excess(_FOLDED, *pool.T.numpy()))
    # Z is at most 3, the number of solutions: rejection gives exact draws.
    raw = pool[torch.rand(len(pool), generator=generator, dtype=torch.float64) * 3 < mass][:draws]
    process, again = coordinates(pairs(draws)), coordinates(pairs(draws))
    return two_sample_test(process, coordinates(raw), seed=9), two_sample_test(process, again, seed=9)


def _lazy_and_eager(length: int) -> tuple[float, float]:
    """Count entries that differ between a path extended in pieces and one drawn at once; measure its residual."""
    generator = torch.Generator().manual_seed(4)
    matrix = -0.05 * torch.eye(4, dtype=torch.float64) + 0.01 * torch.randn(4, 4, generator=generator).double()
    process = AttentionProcess(CausalAttention.from_qk_matrix(matrix), 1.0)
    lazy, eager = process.path(seed=1), process.path(seed=1)
    for end in (1, 7, 100, length):
        _ = lazy[0:end]
    u = eager[0:length]
    noise = torch.cat([process.noise(1, block) for block in range(math.ceil(length / 256))])[:length]
    head = min(length, 300)
    solved = solve_sequence(process.attention, noise[:head])
    return float((lazy[0:length] != u).sum()), float((solved - u[:head]).abs().max())


def _figure() -> Figure:
    slopes = np.geomspace(0.02, 10, 60)
    return plotting.plot_excess(slopes, np.array([three_token_excess(float(slope)) for slope in slopes]), 4 / 27)
