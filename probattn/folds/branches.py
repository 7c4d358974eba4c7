r"""The inverse of a one-dimensional residual map, branch by branch, and the law of a root chosen by a stated rule.

Between its turning points e(u) is monotone, so each piece of the line is one branch of the inverse, u = u_j(eps), on
the range of noises that it covers. A rule that chooses one root per noise splits those ranges into intervals with a
constant weight, and then mass, distribution function, quantiles and draws are sums over intervals of values of the
normal distribution function: exact.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize.elementwise import find_root
from scipy.special import ndtr

from probattn.errors import InputError
from probattn.folds.line import turning_points
from probattn.solve.context import Context
from probattn.solve.line import line_range

__all__ = ["Branches", "Rule"]

Rule = Literal["all", "uniform", "smallest_step", "nearest_mean"]
Array = NDArray[np.float64]

_PROBES = 257


@dataclass(frozen=True)
class _Interval:
    """Noises between low and high, for which the root on one piece is taken with one weight."""

    low: float
    high: float
    piece: int
    weight: float


class Branches:
    r"""All roots u of e(u) = eps for one past, and the law of the root that a rule selects.

    ==============  ============================================================================
    rule            the next token is
    ==============  ============================================================================
    all             every root: the unnormalised density N \|J\|, whose mass is the mean number of roots
    uniform         one of the n(eps) roots, each with probability 1 / n: density N \|J\| / n(e(u))
    smallest_step   the root with the smallest \|mu(u)\| = \|u - eps\|
    nearest_mean    the root nearest to the plain mean of what the past carries, sum_h of the mean of o^h
    ==============  ============================================================================

    Args:
        past: strict mask, p = 1, no batch axes, finite, float64.
        noise_scale: sigma > 0.
        rule: see the table.

    Raises:
        InputError: another past, a sigma that is not positive, an unknown rule.

    Example:
        >>> import torch
        >>> from probattn.attention import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[3.0]]).double())
        >>> past = Context.of(attention, torch.tensor([[-1.0], [1.0]]).double())  # e(u) = u - tanh(3 u)
        >>> branches = Branches(past, 0.5, "uniform")
        >>> branches.roots(0.0).round(4).tolist(), round(branches.mass, 12), round(float(branches.cdf(0.0)), 12)
        ([-0.9949, 0.0, 0.9949], 1.0, 0.5)
    """

    def __init__(self, past: Context, noise_scale: float, rule: Rule = "all") -> None:
        if rule not in get_args(Rule):
            raise InputError(f"rule is {rule!r}; use one of {', '.join(map(repr, get_args(Rule)))}.")
        if not noise_scale > 0:
            raise InputError(f"noise_scale is {noise_scale}; it must be positive.")
        self.past, self.noise_scale, self.rule = past, float(noise_scale), rule
        self.turning_points: Array = turning_points(past).cpu().numpy().astype(np.float64)
        self._past = replace(
            past, values=past.values.detach(), keys=past.keys.detach(), attention=past.attention.detach()
        )
        self._start = float(past.attention.start.detach())
        self._centre = float(self._past.values.mean(-2).sum()) if past.length else self._start
        # What e takes at the ends of each piece; pieces 0, 2, 4, ... rise and the others fall.
        self._ends: Array = np.concatenate([[-np.inf], self.residual(self.turning_points), [np.inf]])
        self._intervals = self._split()

    def mean(self, u: Array | float) -> Array:
        """mu(u), elementwise."""
        points = torch.as_tensor(np.asarray(u, dtype=np.float64)).to(self._past.values)
        return np.asarray(self._past.mean(points.unsqueeze(-1)).squeeze(-1).cpu().numpy())

    def residual(self, u: Array | float) -> Array:
        """e(u) = u - mu(u), elementwise."""
        return np.asarray(u - self.mean(u))

    def roots(self, noise: float) -> Array:
        """Every u with e(u) = noise, in increasing order; one where nothing folds, three or more on a fold."""
        pieces = [j for j in range(len(self._ends) - 1) if self._covers(j, noise)]
        return np.array([float(self._root(np.array([noise]), j)[0]) for j in pieces])

    @property
    def mass(self) -> float:
        """Total mass, which is one under a rule that selects, and the mean number of roots under "all"."""
        return float(sum(self._probability(part.low, part.high) * part.weight for part in self._intervals))

    def log_weight(self, u: Array | float) -> Array:
        """Log of the probability that the root u is the one taken for its noise e(u), elementwise; -inf where never."""
        points = np.asarray(u, dtype=np.float64)
        piece, noise = np.searchsorted(self.turning_points, points, side="right"), self.residual(points)
        weight = np.zeros_like(points)
        for part in self._intervals:
            weight += part.weight * ((part.piece == piece) & (part.low <= noise) & (noise < part.high))
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(weight))

    def cdf(self, u: Array | float) -> Array:
        """Mass up to u, elementwise; exact, no quadrature."""
        points = np.asarray(u, dtype=np.float64)
        piece, noise = np.searchsorted(self.turning_points, points, side="right"), self.residual(points)
        total = np.zeros_like(points)
        for part in self._intervals:
            # On its own piece, the part of the interval that lies to the left of u.
            rises = part.piece % 2 == 0
            low = np.where((piece == part.piece) & ~np.bool_(rises), np.maximum(part.low, noise), part.low)
            high = np.where((piece == part.piece) & np.bool_(rises), np.minimum(part.high, noise), part.high)
            reached = (part.piece <= piece) & (high > low)
            total += np.where(reached, part.weight * self._probability(low, np.maximum(low, high)), 0.0)
        return total

    def icdf(self, probability: float) -> float:
        """The u with cdf(u) = probability * mass, to the last bits.

        Raises:
            InputError: a probability outside (0, 1).
        """
        if not 0 < probability < 1:
            raise InputError(f"probability is {probability}; it must lie strictly between 0 and 1.")
        target = probability * self.mass
        low, high = self._centre - 1.0, self._centre + 1.0
        while self.cdf(low) > target:
            low = self._centre - 2 * (self._centre - low)
        while self.cdf(high) < target:
            high = self._centre + 2 * (high - self._centre)
        return float(find_root(lambda u: self.cdf(u) - target, (low, high)).x)

    def _covers(self, piece: int, noise: float) -> bool:
        low, high = sorted(self._ends[piece : piece + 2])
        return bool(low <= noise < high)

    def _root(self, noise: Array, piece: int) -> Array:
        """The roots for some noises on one piece, which covers them."""
        least, largest = self._start, self._start
        if self._past.length:
            least, largest = (float(end) for end in line_range(self._past)[:2])
        # The ends of the outer pieces are noise plus the least and the largest mean.
        low = np.full_like(noise, self.turning_points[piece - 1]) if piece > 0 else noise + least - 1.0
        last = piece == len(self.turning_points)
        high = noise + largest + 1.0 if last else np.full_like(noise, self.turning_points[piece])
        return np.asarray(find_root(lambda u, own: self.residual(u) - own, (low, high), args=(noise,)).x)

    def _probability(self, low: Array | float, high: Array | float) -> Array:
        """P(low <= eps < high), from the tail that keeps its digits, elementwise."""
        a, b = np.divide(low, self.noise_scale), np.divide(high, self.noise_scale)
        return np.asarray(np.where(a > 0, ndtr(-a) - ndtr(-b), ndtr(b) - ndtr(a)))

    def _split(self) -> list[_Interval]:
        """Intervals of noise with one set of roots and one choice among them."""
        cuts = np.unique(self._ends)
        intervals = []
        for low, high in itertools.pairwise(cuts):
            inside = float(_between(low, high))
            pieces = [j for j in range(len(self._ends) - 1) if self._covers(j, inside)]
            if self.rule in ("all", "uniform") or len(pieces) == 1:
                weight = 1.0 if self.rule == "all" else 1.0 / len(pieces)
                intervals += [_Interval(float(low), float(high), piece, weight) for piece in pieces]
            else:
                intervals += self._split_by_distance(float(low), float(high), pieces)
        return intervals

    def _split_by_distance(self, low: float, high: float, pieces: list[int]) -> list[_Interval]:
        """Noises at which the nearest of several roots changes; both ends are finite there."""

        def nearest(noise: Array) -> NDArray[np.int64]:
            aim = noise if self.rule == "smallest_step" else self._centre
            away = np.abs(np.stack([self._root(noise, piece) for piece in pieces]) - aim)
            return np.asarray(np.asarray(pieces)[away.argmin(0)])

        probes = np.linspace(low, high, _PROBES + 2)[1:-1]
        chosen = nearest(probes)
        edges, owners = [low], [int(chosen[0])]
        for k in np.flatnonzero(chosen[1:] != chosen[:-1]):
            edges.append(_switch(nearest, int(chosen[k]), float(probes[k]), float(probes[k + 1])))
            owners.append(int(chosen[k + 1]))
        edges.append(high)
        return [_Interval(edges[k], edges[k + 1], owner, 1.0) for k, owner in enumerate(owners)]


def _switch(nearest: Callable[[Array], NDArray[np.int64]], own: int, low: float, high: float) -> float:
    """The noise at which the nearest root leaves one piece, by sections."""
    while True:
        inner = np.linspace(low, high, 34)
        inner = inner[(inner > low) & (inner < high)]
        if not len(inner):
            return (low + high) / 2
        left = nearest(inner) == own
        count = len(inner) if left.all() else int(left.argmin())
        low, high = (
            (low if count == 0 else float(inner[count - 1])),
            (high if count == len(inner) else float(inner[count])),
        )


def _between(low: float, high: float) -> float:
    if np.isinf(low) and np.isinf(high):
        return 0.0
    if np.isinf(low):
        return high - 1.0
    return low + 1.0 if np.isinf(high) else (low + high) / 2
