r"""Does the residual map of one token fold? Exactly in one dimension, by active search in several.

With several tokens seen, :math:`M(u) = \sum_h \mathrm{Cov}_u(o^h, g^h)` under weights that tilt the past by u. In one
dimension a fold exists if and only if :math:`\sup_u M(u) > 1`, and that supremum can be bracketed: tilting changes a
covariance no faster than its next cumulants allow, which are bounded by the diameters of the past, and far out the
weights collapse on one token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from probattn.errors import InputError, require_finite
from probattn.solve.context import Context

__all__ = ["Bracket", "largest_sensitivity", "turning_points"]

_LEVELS = 200
_INTERVALS = 200_000


@dataclass(frozen=True)
class Bracket:
    """A number enclosed.

    Attributes:
        lower: attained at ``at``.
        upper: exceeded nowhere.
        at: the token where ``lower`` is attained.
    """

    lower: float
    upper: float
    at: float


def largest_sensitivity(past: Context, *, threshold: float = 1.0, tolerance: float = 1e-10) -> Bracket:
    r"""Enclose :math:`\sup_u M(u)`, M = 1 - J, for one-dimensional tokens under the strict mask, by branch and bound.

    On an interval of half-width w about c two bounds hold, and the smaller counts:
    :math:`M(c) + |M'(c)|\, w + \tfrac12 L w^2` with :math:`L = \tfrac18 \sum_h D_{o^h} D_{g^h}^3`, as the fourth
    cumulant of a law on an interval of length D lies between -D^4/8 and D^4/12; and
    :math:`\sum_h e^{\pm w D_{g^h}} M_h(c)`, plus for positive M_h, as no variance changes by more than that factor.
    Beyond X, :math:`|M(u)| \le \sum_h (D_{o^h} / D_{g^h}) E_X[(g^h - g^h_{end})^2]`, which
    falls with X.

    Args:
        past: p = 1, strict mask, no batch axes, finite.
        threshold: stop as soon as the bracket lies on one side of it.
        tolerance: stop when the bracket is that narrow, relative to 1 + its value.

    Returns:
        A :class:`Bracket`. The supremum of a map that never exceeds zero is enclosed by zero, its limit far out.

    Raises:
        InputError: other pasts.

    Example:
        >>> from probattn.attention import CausalAttention
        >>> tokens = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.9]]).double())
        >>> bracket = largest_sensitivity(Context.of(attention, tokens))  # stops once it lies below one
        >>> bracket.upper < 1, 0.8 < bracket.lower <= 0.9
        (True, True)
    """
    line = _Line.of(past, "largest_sensitivity")
    if line is None:
        return Bracket(0.0, 0.0, 0.0)
    left, right = line.intervals()
    best, at, upper, settled = 0.0, 2 * line.reach, math.inf, _FAR  # zero is approached far out
    for _ in range(_LEVELS):
        centre, half = (left + right) / 2, (right - left) / 2
        value, _, bound = line.bound(centre, half)
        top = int(value.argmax())
        if float(value[top]) > best:
            best, at = float(value[top]), float(centre[top])
        # An interval that stays below the threshold needs no further look, nor one that stays below the best value.
        keep = bound > max(best, _FAR, min(threshold, 1.0) * (1 - 1e-12))
        settled = max([settled, *bound[~keep].amax(0, keepdim=True).tolist()] if bool((~keep).any()) else [settled])
        upper = max(best, settled, float(bound.max()))
        if best > threshold or upper < threshold or upper - best <= tolerance * (1 + best):
            break
        left, right, centre = left[keep], right[keep], centre[keep]
        if len(left) == 0 or len(left) > _INTERVALS:
            break
        left, right = torch.cat([left, centre]), torch.cat([centre, right])
    return Bracket(best, upper, at)


def turning_points(past: Context) -> Tensor:
    """All tokens u where det J(u) = 0 and changes sign, for one-dimensional tokens under the strict mask.

    Intervals where M stays on one side of one are dropped by the bounds of :func:`largest_sensitivity`; where M' keeps
    its sign there is at most one crossing, which bisection finds to the last bit. Only a crossing and its return within
    1e-12 of the search interval could be missed.

    Args:
        past: as in :func:`largest_sensitivity`.

    Returns:
        In increasing order, (K,); K is even, and zero where nothing folds.
    """
    line = _Line.of(past, "turning_points")
    if line is None:
        return past.moved.new_empty(0)
    left, right = line.intervals()
    brackets = []
    smallest = 1e-12 * line.reach
    for _ in range(_LEVELS):
        centre, half = (left + right) / 2, (right - left) / 2
        value, slope, bound = line.bound(centre, half)
        change = slope.abs() * half + 0.5 * line.curvature * half.square()
        possible = (bound >= 1) & (value - change <= 1)
        monotone = slope.abs() > line.curvature * half
        ends = torch.stack([line.value(left), line.value(right)])
        crossing = possible & monotone & ((ends[0] - 1) * (ends[1] - 1) <= 0)
        brackets.append(torch.stack([left[crossing], right[crossing]], dim=-1))
        split = possible & ~monotone & (half > smallest)
        if not bool(split.any()):
            break
        left, right, centre = left[split], right[split], centre[split]
        left, right = torch.cat([left, centre]), torch.cat([centre, right])
    found = torch.cat(brackets)  # (K, 2)
    low, high = found[:, 0], found[:, 1]
    rising = line.value(high) > line.value(low)
    for _ in range(120):
        middle = (low + high) / 2
        upper = (line.value(middle) > 1) == rising
        low, high = torch.where(upper, low, middle), torch.where(upper, middle, high)
    # A crossing on the common end of two intervals is found in both.
    points: Tensor = torch.unique((low + high) / 2)
    return points


@dataclass(frozen=True)
class _Line:
    """M along the line: the heads that move, and the bounds on how fast."""

    moved: Tensor  # o, (H, n)
    pulled: Tensor  # g, (H, n)
    spread: Tensor  # D_g, (H,)
    curvature: float  # bound on |M''|
    reach: float  # |M| <= _FAR beyond

    @classmethod
    def of(cls, past: Context, name: str) -> _Line | None:
        """None where M vanishes everywhere."""
        attention = past.attention
        if attention.dim != 1 or past.moved.dim() != 3 or attention.mask != "strict":
            raise InputError(f"{name} needs one-dimensional tokens, one past without batch axes, and a strict mask.")
        require_finite("the past", past.moved)
        require_finite("the past", past.pulled)
        spread_o, spread_g = (spread.detach() for spread in past.spread)
        wide = (spread_o > 0) & (spread_g > 0)
        if past.length < 2 or not bool(wide.any()):
            return None
        moved, pulled = past.moved.detach().squeeze(-1)[wide], past.pulled.detach().squeeze(-1)[wide]
        spread_o, spread_g = spread_o[wide], spread_g[wide]
        curvature = float((spread_o * spread_g**3).sum()) / 8
        return cls(moved, pulled, spread_g, curvature, _reach(pulled, spread_o, spread_g))

    def intervals(self) -> tuple[Tensor, Tensor]:
        """The search interval in 64 parts: left and right ends."""
        edges = torch.linspace(-self.reach, self.reach, 65, dtype=self.moved.dtype, device=self.moved.device)
        return edges[:-1], edges[1:]

    def value(self, u: Tensor) -> Tensor:
        """M(u), (G,)."""
        return self._value_and_slope(u)[0].sum(-1)

    def bound(self, centre: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """M and M' at the centres, and an upper bound of M on each interval, (G,) each."""
        each, slope = self._value_and_slope(centre)
        value = each.sum(-1)
        smooth = value + slope.abs() * half + 0.5 * self.curvature * half.square()
        factor = (half[:, None] * self.spread * each.sign()).clamp(max=700).exp()
        return value, slope, torch.minimum(smooth, (factor * each).sum(-1))

    def _value_and_slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The heads' M_h(u), (G, H), and M'(u), (G,)."""
        weights = (u[:, None, None] * self.pulled).softmax(-1)  # (G, H, n)
        o = self.moved - (weights * self.moved).sum(-1, keepdim=True)
        g = self.pulled - (weights * self.pulled).sum(-1, keepdim=True)
        return (weights * o * g).sum(-1), (weights * o * g.square()).sum((-1, -2))


# What M may still be beyond the reach of the search.
_FAR = 1e-6


def _reach(pulled: Tensor, spread_o: Tensor, spread_g: Tensor) -> float:
    """X such that |M(u)| <= _FAR for |u| >= X, by doubling."""
    reach = 1.0 / float(spread_g.max())
    for _ in range(_LEVELS):
        total = 0.0
        for sign, end in ((1.0, pulled.amax(-1, keepdim=True)), (-1.0, pulled.amin(-1, keepdim=True))):
            weights = (sign * reach * pulled).softmax(-1)
            total = max(total, float((spread_o / spread_g * (weights * (pulled - end).square()).sum(-1)).sum()))
        if total <= _FAR:
            return reach
        reach *= 2
    return reach
