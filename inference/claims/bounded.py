"""Claim: with a memory radius and a contraction below one, what the theory says holds for every past.

Each part is measured on bounded attention and, as its negative control, on attention without a radius at the same
parameters: masses, consistency of prefixes, sampling, posterior sampling, margins, the barrier, and very long paths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from matplotlib.figure import Figure
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.barrier import log_barrier, stability_margin
from probattn.folds.mass import scalar_mass
from probattn.inference.claims.claim import Claim, Settings, Subject, judge, worst
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.nuts import NutsConfig, fit_nuts
from probattn.interface import Mask
from probattn.models.bounded_run import BoundedRun, bounded_run
from probattn.models.embedding import EmbeddingModel
from probattn.models.long_run import long_run
from probattn.next_token import NextToken
from probattn.numerics.random import isolated_seed
from probattn.plotting.style import COLOURS, finish, panel
from probattn.process import AttentionProcess
from probattn.solve.context import Context
from probattn.solve.parallel import unique_prefix
from probattn.solve.sequence import find_sequence

__all__ = ["bounded_claim"]

KAPPA, RADIUS, SLOPE = 0.9, 1.0, 0.9  # on the line kappa = rho^2 a
BOUND = {
    "mass_error_on_the_line": 1e-6,
    # Some 36 estimates, each within 4.5 of its own standard errors: a miss has a probability of 3e-4.
    "largest_z": 4.5,
    "prefix_mass_error": 1e-6,
    "sweep_rate_over_contraction": 1.0 + 1e-9,
    "tokens_solved_one_by_one": 0.0,
    "nuts_divergences": 0.0,
    # The 1 % quantile of Kolmogorov's statistic for 100 independent draws is 0.163.
    "nuts_distance": 0.163,
    "margin_below_floor": 1e-12,
    "barrier_below_floor": 1e-12,
    "long_path_error": 1e-9,
    "largest_mean_over_bound": 1.0,
    "largest_square_over_bound": 1.0,
}

_SIZES = (1e-3, 1.0, 1e3, 1e6)
_MASKS: tuple[Mask, Mask] = ("strict", "inclusive")
Build = Callable[[CausalAttention], CausalAttention]


def with_radius(attention: CausalAttention) -> CausalAttention:
    """Return the attention with a memory radius and a contraction: the thing under test."""
    return attention.with_memory(RADIUS).scaled_to(KAPPA)


def without_radius(attention: CausalAttention) -> CausalAttention:
    """Return the attention with the same factors as :func:`with_radius`, unbounded: the control."""
    return with_radius(attention).with_memory(None)


def bounded_claim(subject: Subject, settings: Settings | None = None, *, build: Build = with_radius) -> Claim:
    """Measure on random pasts, on text, in fits and on long paths what a contraction for every past buys.

    Args:
        subject: the fitted model, whose held-out embeddings are among the data.
        settings: ``full`` takes paths of 1,000,000 tokens instead of 100,000, and longer chains.
        build: what makes an attention bounded: the construction under test.
    """
    full = settings is not None and settings.full
    text = subject.tokens(4)
    mass, scores, counted = _masses(build)
    prefix, control_prefix = _prefixes(build), _prefixes(without_radius)
    rate, left = _sampling(build)
    with torch.no_grad():
        margins, control_margins = (_margin_gap(text, make) for make in (build, without_radius))
    floor, control_floor = (_barrier_gap(make) for make in (build, without_radius))
    fits = _posterior(bounded=True, full=full), _posterior(bounded=False, full=full)
    run, path = _long_path(full)
    runaway = _unbounded_path()
    reach, square = RADIUS, (RADIUS + float(run.noise.std())) ** 2
    measured = {
        "mass_error_on_the_line": mass,
        "largest_z": worst(*scores),
        "prefix_mass_error": prefix,
        "sweep_rate_over_contraction": rate,
        "tokens_solved_one_by_one": left,
        "nuts_divergences": fits[0][0],
        "nuts_distance": fits[0][1],
        "margin_below_floor": margins,
        "barrier_below_floor": floor,
        "long_path_error": path,
        "largest_mean_over_bound": float(run.largest.max()) / reach,
        "largest_square_over_bound": float(run.square[run.lengths >= 1000].max()) / square,
        "masses": float(counted),
        "tokens_of_the_long_path": float(run.lengths[-1]),
        "mean_square_of_the_long_path": float(run.square[-1].mean()),
        "control_mass": _control_mass(),
        "control_prefix_mass_error": control_prefix,
        "control_tokens_solved_one_by_one": _sampling(without_radius)[1],
        "control_nuts_distance": fits[1][1],
        "control_nuts_divergences": fits[1][0],
        "control_margin_below_floor": control_margins,
        "control_barrier_below_floor": control_floor,
        "control_square_of_a_short_path": runaway,
    }
    controlled = (
        measured["control_mass"] > 1.1
        and control_prefix > 1e-3
        and measured["control_tokens_solved_one_by_one"] > 0
        and fits[1][1] > BOUND["nuts_distance"]
        and min(control_margins, control_floor) > 0.1
        and runaway > square
    )
    holds = judge(measured, BOUND) and controlled
    return Claim(
        "bounded",
        "With keys and values on a ball and a contraction κ < 1, for every past of every length: the density has mass "
        "one, prefixes are consistent, each token has one solution and sweeps find it, NUTS meets no fold, the margins "
        "are at least 1 − κ, the barrier has a floor, and the moments of an attractive process stay bounded.",
        "identity",
        "supported" if holds else "not_supported",
        measured,
        BOUND,
        formula="φ(u) = u / √(1 + |u|²/ρ²),   |M_i| ≤ κ = Σ_h ρ² |W_O W_V| |c W_Kᵀ W_Q| < 1   ⇒   Z = 1,   "
        "σ_min(J_i) ≥ 1 − κ,   −p log(1 + κ) ≤ b_i ≤ −p log(1 − κ)",
        control="The same parameters without the radius: "
        f"a mass of {measured['control_mass']:.2f}; after a prefix of the process a mass that is off by "
        f"{control_prefix:.2g}; "
        f"{measured['control_tokens_solved_one_by_one']:.0f} tokens that sweeps leave to a search; draws of NUTS at a "
        f"distance of {fits[1][1]:.2f} from the exact posterior instead of {fits[0][1]:.2f}; margins that fall short "
        f"of the floor by {control_margins:.2g}; a barrier that training takes {control_floor:.3g} below the floor; "
        f"and a mean square of {runaway:.3g} after 60 tokens.",
        finding=f"After {int(run.lengths[-1]):,} tokens at κ = {KAPPA} the mean square of an attractive process is "
        f"{measured['mean_square_of_the_long_path']:.3f} for noise of variance 1. The bounds say what cannot happen, "
        "not what is typical.",
        figures={"bounded": _figure(run)},
    )


def _random(seed: int, heads: int, dim: int, mask: Mask) -> CausalAttention:
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(heads, dim, dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return CausalAttention(query, key, mask=mask)


def _line(mask: Mask = "strict") -> CausalAttention:
    return CausalAttention.from_qk_matrix(torch.tensor([[SLOPE]], dtype=torch.float64), mask=mask)


def _pasts(dim: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(dim)
    for size in _SIZES:
        yield size * torch.randn(10, dim, generator=generator, dtype=torch.float64)


@torch.no_grad()
def _masses(build: Build) -> tuple[float, list[float], int]:
    """Error of exact masses on the line, scores of the estimates in 2, 4 and 8 dimensions, and the number of masses."""
    error, scores, count = 0.0, [], 0
    for past in _pasts(1):
        error = worst(error, abs(scalar_mass(Context.of(build(_line()), past), 1.0).absolute - 1))
        error = worst(error, abs(_inclusive_mass(Context.of(build(_line("inclusive")), past)) - 1))
        count += 2
    for dim in (2, 4, 8):
        for mask in _MASKS:
            for seed, past in enumerate(_pasts(dim)):
                next_token = NextToken(Context.of(build(_random(seed, 2, dim, mask)), past), 1.0)
                weights = next_token.importance_weights(4000, seed)[0]
                scores.append(abs(float(weights.mean()) - 1) / (float(weights.std()) / math.sqrt(len(weights)) + 1e-12))
                count += 1
    return error, scores, count


def _inclusive_mass(past: Context) -> float:
    """Mass on the line by the trapezoidal rule: under the inclusive mask there are no turning points to sum over."""
    u = torch.linspace(-RADIUS - 10, RADIUS + 10, 8001, dtype=torch.float64).unsqueeze(-1)
    mean, jacobian = past.mean_and_jacobian(u)
    density = torch.exp(-0.5 * (u - mean).square().squeeze(-1)) / math.sqrt(2 * math.pi) * jacobian.flatten().abs()
    return float(torch.trapezoid(density, u.squeeze(-1)))


def _control_mass() -> float:
    """Largest mass of the same attentions without a radius, after pasts of up to size 1,000."""
    pasts = [past for past in _pasts(1) if float(past.abs().max()) < 1e4]
    return max(scalar_mass(Context.of(without_radius(_line()), past), 1.0).absolute for past in pasts)


@torch.no_grad()
def _prefixes(build: Build) -> float:
    """Largest mass that is missed by the density of n tokens as the marginal of that of n + 1, n from 2 to 1,000."""
    attention = build(_line())
    # The control is looked at along its own paths too, while they last.
    last = 1000 if attention.memory_radius is not None else 30
    process = AttentionProcess(attention, 1.0, selection="smallest_step")
    error = 0.0
    for seed in range(4):
        tokens = process.path(seed)[0:last]
        for n in (2, 3, 4, 6, 10, 30, 100, 300, 1000):
            if n <= last:
                error = worst(error, abs(scalar_mass(Context.of(attention, tokens[:n]), 1.0).absolute - 1))
    return error


@torch.no_grad()
def _sampling(build: Build) -> tuple[float, float]:
    """Largest ratio of two errors of a token's sweeps over kappa, and the tokens that sweeps do not solve."""
    rate, left = 0.0, 0.0
    for dim in (1, 3):
        for mask in _MASKS:
            attention = build(_random(dim, 2, dim, mask))
            with isolated_seed(dim):
                noise = 2 * torch.randn(2, 100, dim, dtype=torch.float64)
            found = unique_prefix(Context.of(attention.expand((2,)), noise[:, :0]), noise)[0].length
            left += 2.0 * (noise.shape[1] - found)
            for past in _pasts(dim):
                rate = worst(rate, _sweep_rate(Context.of(attention, past), noise[0, 0]) / KAPPA)
    return rate, left


def _sweep_rate(past: Context, eps: Tensor) -> float:
    """Largest ratio of the errors after and before one sweep u <- eps + mu(u), from places up to 5 away."""
    solution = torch.zeros_like(eps)
    for _ in range(400):
        solution = eps + past.mean(solution)
    start = solution + torch.linspace(-5, 5, 40, dtype=eps.dtype).unsqueeze(-1)
    before, after = (torch.linalg.vector_norm(u - solution, dim=-1) for u in (start, eps + past.mean(start)))
    return float((after / before).max())


def _margin_gap(text: Tensor, build: Build) -> float:
    """By how much margins fall short of 1 - kappa, on text and on random tokens of all sizes; 0 where they do not."""
    gap, dim = 0.0, text.shape[-1]
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(4, 40, dim, generator=generator, dtype=torch.float64)
    attraction = torch.eye(dim, dtype=torch.float64)
    for mask in _MASKS:
        for free in (_random(5, 2, dim, mask), CausalAttention.from_qk_matrix(attraction, mask=mask)):
            attention = build(free)
            for u in (text, *(size * random for size in (1e-3, 1.0, 3.0, 10.0, 1e3, 1e6))):
                for kind in ("singular_value", "spectral", "complex"):
                    gap = worst(gap, 1 - KAPPA - float(stability_margin(attention, u, kind).min()))
    return gap


def _barrier_gap(build: Build, steps: int = 200) -> float:
    """By how much the barrier falls below -p log(1 + kappa) if tokens and factors are free to lower its mean, p = 2."""
    dim = 2
    generator = torch.Generator().manual_seed(6)
    start = _random(6, 1, dim, "strict")
    begin = torch.randn(2, 24, dim, generator=generator, dtype=torch.float64)
    leaves = [part.clone().requires_grad_() for part in (begin, start.query, start.key)]
    optimizer = torch.optim.Adam(leaves, 0.05)
    lowest = math.inf
    for _ in range(steps):
        tokens, query, key = leaves
        free = CausalAttention(query, key)
        # Nothing holds the control back: its factors keep the scale that training gives them.
        value = log_barrier(free if build is without_radius else build(free), tokens)
        optimizer.zero_grad()
        value.mean().backward()
        optimizer.step()
        lowest = min(lowest, float(value.detach().mean() if build is without_radius else value.detach().min()))
    return max(0.0, -dim * math.log1p(KAPPA) - lowest)


def _posterior(*, bounded: bool, full: bool) -> tuple[float, float]:
    """Divergences of NUTS, and Kolmogorov's distance of its draws from the exact posterior of the slope.

    Four times the tokens -2, 2, 0 on the line: without a radius the likelihood vanishes at the slope 1/4, where the
    third token is on a fold.
    """
    model = EmbeddingModel(3, 1, parameters="qk_matrix", noise_scale=1.0)
    if bounded:
        model = model.altered(memory_radius=RADIUS, contraction=0.95)
    u = torch.tensor([[-2.0], [2.0], [0.0]], dtype=torch.float64).expand(4, 3, 1).clone()
    target = LogDensity(model, u)
    draws = fit_nuts(target, NutsConfig(chains=4, warmup=100, draws=500 if full else 100))
    grid = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    with torch.no_grad():
        log_density = target.log_density(grid.unsqueeze(-1))
        density = (log_density - log_density.logsumexp(0)).exp().cumsum(0)
    flat = draws.z.flatten().sort().values
    reached = torch.searchsorted(flat, grid, right=True).double() / len(flat)
    return float(draws.statistics["diverging"].sum()), float((reached - density).abs().max())


def _long_path(full: bool) -> tuple[BoundedRun, float]:
    """A path of an attractive process, and the error of its first tokens by the package's own solver."""
    last = 6 if full else 5
    attention = CausalAttention.from_qk_matrix(torch.tensor([[SLOPE]], dtype=torch.float64), memory_radius=RADIUS)
    lengths = [round(10 ** (k / 4)) for k in range(4, 4 * last + 1)]
    run = bounded_run(attention, 1.0, lengths, sequences=2)
    solved = find_sequence(attention, run.noise, "unique")[0]
    return run, float((solved - run.first).abs().max())


def _unbounded_path() -> float:
    """Mean square of an attractive process without a radius after 60 tokens, the largest of four paths."""
    run = long_run(_line(), 1.0, [60], sequences=4)
    return float((run.covariance.squeeze() + run.mean.squeeze().square()).max())


def _figure(run: BoundedRun) -> Figure:
    figure, axis = panel(None, (6.4, 4.0))
    for k in range(run.square.shape[1]):
        axis.plot(run.lengths, run.square[:, k], color=COLOURS[0], label="mean square" if k == 0 else None)
        axis.plot(run.lengths, run.mean[:, k], color=COLOURS[1], label="mean" if k == 0 else None)
    axis.set_xscale("log")
    finish(axis, "tokens so far", "moments of the tokens", legend=True)
    return figure
