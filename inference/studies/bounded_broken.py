r"""Broken symmetry of bounded memory on the line: where the mean of an attractive process settles, in mean field.

The distribution of a long past flows towards that of the next token (:mod:`probattn.models.bounded_limit`). For a
radius much larger than the noise, C = 1 and :math:`\kappa = a \rho^2`, a mean m of the order of the noise changes by

.. math:: \frac{dm}{d\log n} = \Bigl(\kappa - \tfrac32 - \frac{m^2}{2 \sigma^2}\Bigr) \frac{\sigma^2}{\rho^2}\, m ,

from :math:`\varphi(m) \approx m - m^3 / 2\rho^2`, :math:`\varphi'' \approx -3 m / \rho^2` and the gain :math:`1 + a V`
of a token that is its own query. So m settles at zero up to :math:`\kappa = \tfrac32`, that is
:math:`a \sigma^2 = \tfrac32 \sigma^2 / \rho^2`, and beyond at

.. math:: m = \pm \sigma \sqrt{2 \kappa - 3} :

a continuous transition with the exponent one half. Derived here. ``python -m
probattn.inference.studies.bounded_broken FILE.png`` draws the phase diagram, the mean beyond the transition, and the
flow of the mean in simulated paths. Mean field has no random number in it; the paths have seed 0.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.optimize import brentq
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.errors import InputError, require_positive
from probattn.models.bounded_limit import bounded_limit
from probattn.numerics.random import isolated_seed
from probattn.plotting.style import COLOURS, ERROR_BARS, finish, panels
from probattn.solve.context import Context
from probattn.solve.token import find_token

__all__ = [
    "Settled",
    "continue_paths",
    "flow_of_mean",
    "folding_contraction",
    "plot_broken",
    "settle",
    "simulated_flow",
    "symmetry_breaking",
]

_POINTS = 401
_ROUNDS = 40_000


class Settled(NamedTuple):
    """A stationary state of mean field.

    Attributes:
        points: u, (G,).
        density: density of the tokens there, (G,).
        mean: its mean.
        slope: largest slope of the stationary map; from 1 on it folds.
    """

    points: Tensor
    density: Tensor
    mean: float
    slope: float


@torch.no_grad()
def settle(kappa: float, radius: float, start: float, noise_scale: float = 1.0) -> Settled:
    """Follow mean field from a Gaussian past of a given mean to where it settles.

    Args:
        kappa: contraction a rho^2; may exceed one.
        radius: rho.
        start: mean of the past at the start.
        noise_scale: sigma.

    Returns:
        :class:`Settled`. Some seconds, longer near the transition, where the flow is slow.

    Raises:
        InputError: a map that folds on the way, or a state that still moves after 40,000 rounds.

    Example:
        >>> abs(settle(0.5, 2.0, 1.0).mean) < 1e-3
        True
    """
    field = _Field(kappa, radius, noise_scale)
    density, before = _normal(field.points - start, noise_scale), start
    for turn in range(_ROUNDS):
        density, slope = field.following(density)
        if slope >= 1:
            raise InputError(f"the map of mean field folds at contraction {kappa} and radius {radius}.")
        if turn % 100 == 99:
            after = field.mean(density)
            if abs(after - before) < 1e-7:
                return Settled(field.points, density, after, slope)
            before = after
    raise InputError(f"mean field still moves after {_ROUNDS} rounds at contraction {kappa} and radius {radius}.")


def symmetry_breaking(radius: float) -> float:
    """The contraction from which a mean of zero is unstable; NaN where the map folds before.

    Args:
        radius: rho, in units of the noise.

    Example:
        >>> 1.45 < symmetry_breaking(6.0) < 1.5
        True
    """

    def gap(kappa: float) -> float:
        return bounded_limit(_line(kappa, radius), 1.0).growth - 1

    most = min(2.5, folding_contraction(radius) - 1e-3)
    if gap(1.0) > 0 or gap(most) < 0:
        return math.nan
    return float(brentq(gap, 1.0, most, xtol=1e-4))


def folding_contraction(radius: float) -> float:
    """The contraction from which the symmetric stationary map of mean field folds, to 1e-3.

    Args:
        radius: rho, in units of the noise.

    Example:
        >>> 1.0 < folding_contraction(1.0) < 2.0
        True
    """
    low, high = 1.0, 1.0
    while not _folds(high, radius):
        low, high = high, 2 * high
        if high > 1e3:
            return math.inf
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if _folds(middle, radius) else (middle, high)
    return low


@torch.no_grad()
def continue_paths(
    kappa: float, radius: float, mean: float, lengths: Sequence[int], pairs: int, *, seed: int = 0
) -> NDArray[np.float64]:
    """Continue pasts from N(m, 1) by the process itself, in pairs of opposite deviations and noise.

    Args:
        kappa: contraction a rho^2.
        radius: rho, in units of the noise.
        mean: m.
        lengths: n, increasing; the first is the length of the pasts drawn.
        pairs: number N of pairs of paths.
        seed: random seed; the global random state is left as it was.

    Returns:
        Means of the first n tokens, averaged over each pair, ``(lengths, N)``.
    """
    with isolated_seed(seed):
        past, noise = torch.randn(pairs, lengths[-1], 1, dtype=torch.float64).split(
            [lengths[0], lengths[-1] - lengths[0]], 1
        )
    past, noise = torch.cat([mean + past, mean - past]), torch.cat([noise, -noise])
    context = Context.of(_line(kappa, radius).expand((2 * pairs,)), past)
    total, found = past.sum((1, 2)), [past.mean((1, 2))]
    for n in range(lengths[0], lengths[-1]):
        u = find_token(context, noise[:, n - lengths[0]], "smallest_step").u
        context = context.extend(u)
        total = total + u.squeeze(-1)
        if n + 1 in lengths:
            found.append(total / (n + 1))
    means: NDArray[np.float64] = torch.stack(found).unflatten(1, (2, pairs)).mean(1).numpy()
    return means


@torch.no_grad()
def flow_of_mean(kappa: float, radius: float, mean: float, lengths: tuple[int, int] = (250, 1000)) -> float:
    """Change of the mean of a past from N(m, 1) over that of log n, by the flow of mean field.

    Args:
        kappa: contraction a rho^2.
        radius: rho, in units of the noise.
        mean: m.
        lengths: n at the start and at the end.

    Example:
        >>> flow_of_mean(0.9, 4.0, 1.0) < 0
        True
    """
    field, time = _Field(kappa, radius, 1.0), math.log(lengths[1] / lengths[0])
    density = _normal(field.points - mean, 1.0)
    steps = math.ceil(time / 0.02)
    for _ in range(steps):
        density = density + time / steps * (field.following(density)[0] - density)
    return (field.mean(density) - mean) / time


def simulated_flow(
    kappa: float, radius: float, mean: float, *, lengths: tuple[int, int] = (250, 1000), pairs: int = 10, seed: int = 0
) -> NDArray[np.float64]:
    """The same change measured on paths that continue pasts from N(m, 1).

    Args:
        kappa: contraction a rho^2.
        radius: rho, in units of the noise.
        mean: m.
        lengths: length of the pasts, and of the whole.
        pairs: number N of pairs of paths.
        seed: random seed.

    Returns:
        Change of the mean over the change of log n, pair by pair, (N,).
    """
    before, after = continue_paths(kappa, radius, mean, lengths, pairs, seed=seed)
    change: NDArray[np.float64] = (after - before) / math.log(lengths[1] / lengths[0])
    return change


def plot_broken(
    radii: Sequence[float] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    branches: Sequence[float] = (4.0, 8.0),
    contractions: Sequence[float] = (1.3, 1.45, 1.55, 1.65, 1.8, 2.0, 2.3, 2.6, 3.0),
    simulated: Sequence[tuple[float, float]] = tuple(itertools.product((0.9, 2.5), (0.4, 1.0, 1.6, 2.2))),
) -> Figure:
    """Draw the phase diagram in a sigma^2 and rho, the mean beyond the transition, and its flow in simulated paths.

    Args:
        radii: radii rho of the diagram, in units of the noise.
        branches: radii of the second panel.
        contractions: contractions kappa of the second panel.
        simulated: pairs of kappa and m of the third panel, at the first radius of the second.

    Returns:
        A figure of three panels.
    """
    figure, (diagram, order, flow) = panels(None, 3, (14.0, 4.3))
    rho = np.asarray(radii)
    fine = np.geomspace(rho[0], rho[-1], 100)
    diagram.fill_between(fine, 1e-3, 1 / fine**2, color=COLOURS[2], alpha=0.15, label="certified for every past, κ < 1")
    diagram.plot(fine, 1.5 / fine**2, ":", color=COLOURS[1], label="κ = 3/2")
    breaking = np.array([symmetry_breaking(radius) for radius in radii])
    diagram.plot(rho, breaking / rho**2, "o", markersize=4, color=COLOURS[1], label="symmetry breaks, mean field")
    folding = np.array([folding_contraction(radius) for radius in radii])
    diagram.plot(rho, folding / rho**2, "s--", markersize=4, color=COLOURS[0], label="symmetric state folds")
    diagram.set_xscale("log")
    diagram.set_yscale("log")
    diagram.set_xticks(rho, [f"{radius:g}" for radius in radii])
    diagram.set_xticks([], minor=True)
    diagram.set_ylim(5e-3, None)
    finish(diagram, "radius ρ / σ", "attraction aσ²", legend=True)
    for colour, radius in zip(COLOURS, branches, strict=False):
        means = [_settled_mean(kappa, radius) for kappa in contractions]
        order.plot(contractions, means, "o", markersize=4, color=colour, label=f"mean field, ρ = {radius:g} σ")
    fine = np.linspace(1.5, max(contractions), 200)
    order.plot(fine, np.sqrt(2 * fine - 3), color="black", linewidth=1, label="σ √(2κ − 3)")
    order.plot([min(contractions), 1.5], [0, 0], color="black", linewidth=1)
    finish(order, "κ = aρ²", "mean at which the process settles, |m| / σ", legend=True)
    for colour, kappa in zip(COLOURS, dict.fromkeys(kappa for kappa, _ in simulated), strict=False):
        means = [mean for one, mean in simulated if one == kappa]
        found = [simulated_flow(kappa, branches[0], mean, seed=k) for k, mean in enumerate(means)]
        bars = [1.96 * float(one.std(ddof=1)) / math.sqrt(len(one)) for one in found]
        flow.errorbar(
            means, [float(one.mean()) for one in found], bars, color=colour, label=f"paths, κ = {kappa:g}", **ERROR_BARS
        )
        fine = np.linspace(0, max(means) * 1.1, 23)
        expected = [flow_of_mean(kappa, branches[0], float(m)) for m in fine]
        flow.plot(fine, expected, color=colour, linewidth=1, label=f"mean field, κ = {kappa:g}")
    flow.axhline(0.0, color="black", linewidth=1, linestyle=":")
    finish(flow, "mean of the past, m / σ", f"dm / d log n, ρ = {branches[0]:g} σ", legend=True)
    return figure


class _Field:
    """Mean field on the line: the density of the next token after a long past of a given density."""

    def __init__(self, kappa: float, radius: float, noise_scale: float) -> None:
        require_positive("radius", radius)
        reach = radius + 8 * noise_scale
        self.points, self.noise_scale = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64), noise_scale
        self.step = float(self.points[1] - self.points[0])
        self.held = self.points / (1 + (self.points / radius).square()).sqrt()
        self.pull = kappa / radius**2
        self.tilt = (self.pull * self.points.unsqueeze(-1) * self.held).exp()  # (G of u, G of v)

    def following(self, density: Tensor) -> tuple[Tensor, float]:
        """The density of the next token, and the largest slope of the map that it comes from."""
        weights = self.tilt * density
        total = weights.sum(-1)
        mean = (weights @ self.held) / total
        slope = self.pull * ((weights @ self.held.square()) / total - mean.square())
        after = _normal(self.points - mean, self.noise_scale) * (1 - slope)
        return after / (after.sum() * self.step), float(slope.max())

    def mean(self, density: Tensor) -> float:
        """Mean of a density."""
        return float((density * self.points).sum() * self.step)


def _settled_mean(kappa: float, radius: float) -> float:
    """Mean of the state that a broken start settles at; NaN where the map folds."""
    try:
        return abs(settle(kappa, radius, math.sqrt(max(0.1, 2 * kappa - 3))).mean)
    except InputError:
        return math.nan


def _folds(kappa: float, radius: float) -> bool:
    try:
        bounded_limit(_line(kappa, radius), 1.0)
    except InputError:
        return True
    return False


def _line(kappa: float, radius: float) -> CausalAttention:
    slope = torch.tensor([[kappa / radius**2]], dtype=torch.float64)
    return CausalAttention.from_qk_matrix(slope, memory_radius=radius)


def _normal(x: Tensor, scale: float) -> Tensor:
    return torch.exp(-0.5 * (x / scale).square()) / (scale * math.sqrt(2 * math.pi))


if __name__ == "__main__":
    plot_broken().savefig(Path(sys.argv[1]), dpi=130)
