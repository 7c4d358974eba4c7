r"""Folds of the residual map of one token on a line: the exact answer, and the turning points.

With several tokens seen, :math:`M(u) = \sum_h \mathrm{Cov}_u(o^h, g^h)` under weights that tilt the past by u. In one
dimension a fold exists if and only if :math:`\sup_u M(u) > 1`, and that supremum can be bracketed: tilting changes a
covariance no faster than its next cumulants allow, which are bounded by the diameters of the past, and far out the
weights collapse on one token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from scipy.optimize.elementwise import find_root
from torch import Tensor

from probattn.errors import InputError, require_finite
from probattn.solve.context import Context
from probattn.solve.line import Slopes, line_range

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


def largest_sensitivity(past: Context, *, threshold: float = 1.0) -> Bracket:
    r"""Enclose :math:`\sup_u M(u)`, M = 1 - J, for one-dimensional tokens under the strict mask, by branch and bound.

    On an interval of half-width w about c two bounds hold, and the smaller counts:
    :math:`M(c) + |M'(c)|\, w + \tfrac12 L w^2` with :math:`L = \tfrac18 \sum_h D_{o^h} D_{g^h}^3`, as the fourth
    cumulant of a distribution on an interval of length D lies between -D^4/8 and D^4/12; and
    :math:`\sum_h e^{\pm w D_{g^h}} M_h(c)`, plus for positive M_h, as no variance changes by more than that factor.
    Beyond X, :math:`|M(u)| \le \sum_h (D_{o^h} / D_{g^h}) E_X[(g^h - g^h_{end})^2]`, which
    falls with X.

    Args:
        past: p = 1, strict mask, no batch axes, finite.
        threshold: stop as soon as the bracket lies on one side of it, or is narrower than 1e-10 (1 + its value).

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
        centre = (left + right) / 2
        slopes = line.slopes(left, right)
        top = int(slopes.slope.argmax())
        if float(slopes.slope[top]) > best:
            best, at = float(slopes.slope[top]), float(centre[top])
        # An interval that stays below the threshold needs no further look, nor one that stays below the best value.
        keep = slopes.upper > max(best, _FAR, min(threshold, 1.0) * (1 - 1e-12))
        settled = max([settled, *slopes.upper[~keep].tolist()])
        upper = max(best, settled, float(slopes.upper.max()))
        if best > threshold or upper < threshold or upper - best <= _NARROW * (1 + best):
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
        return past.values.new_empty(0)
    left, right = line.intervals()
    brackets = []
    smallest = 1e-12 * line.reach
    for _ in range(_LEVELS):
        centre, half = (left + right) / 2, (right - left) / 2
        slopes = line.slopes(left, right)
        possible = (slopes.upper >= 1) & (slopes.lower <= 1)
        monotone = slopes.second.abs() > slopes.curvature * half
        done = possible & monotone
        brackets.append((left[done], right[done]))
        split = possible & ~monotone & (half > smallest)
        if not bool(split.any()):
            break
        left, right, centre = left[split], right[split], centre[split]
        left, right = torch.cat([left, centre]), torch.cat([centre, right])
    left, right = (torch.cat(part) for part in zip(*brackets, strict=True))
    before, after = line.slope(left) - 1, line.slope(right) - 1
    crossing = before * after <= 0
    left, right, before, after = (part[crossing] for part in (left, right, before, after))

    def excess(u: NDArray[Any]) -> NDArray[Any]:
        return (line.slope(torch.as_tensor(u.ravel()).to(left)) - 1).cpu().numpy().reshape(u.shape)

    found = torch.where(before == 0, left, right)  # an end that is a turning point itself
    inside = before * after < 0
    if bool(inside.any()):
        ends = left[inside].cpu().numpy(), right[inside].cpu().numpy()
        found[inside] = torch.as_tensor(find_root(excess, ends).x).to(left)
    # A crossing on the common end of two intervals is found in both.
    points: Tensor = torch.unique(found)
    return points


# What M may still be beyond the reach of the search, and a bracket that is narrow enough.
_FAR, _NARROW = 1e-6, 1e-10


@dataclass(frozen=True)
class _Line:
    """The heads of a past that move, and how far out the slope M of its mean has to be looked at."""

    context: Context
    spread: tuple[Tensor, Tensor]  # D_o and D_g, (H,) each
    reach: float  # |M| <= _FAR beyond

    @classmethod
    def of(cls, past: Context, name: str) -> _Line | None:
        """None where M vanishes everywhere."""
        if not past.on_a_line or past.batch_shape or past.visible is not None:
            raise InputError(f"{name} needs one-dimensional tokens, one past without batch axes, and a strict mask.")
        require_finite("the past", past.values)
        require_finite("the past", past.keys)
        if past.length < 2:
            return None
        past = replace(past, values=past.values.detach(), keys=past.keys.detach()).to(torch.float64)
        spread = line_range(past)[2]
        wide = (spread[0] > 0) & (spread[1] > 0)
        if not bool(wide.any()):
            return None
        moving = replace(past, values=past.values[wide], keys=past.keys[wide])
        spread = spread[0][wide], spread[1][wide]
        return cls(moving, spread, _reach(moving, spread))

    def intervals(self) -> tuple[Tensor, Tensor]:
        """The search interval in 64 parts: left and right ends."""
        edges = torch.linspace(-self.reach, self.reach, 65, dtype=torch.float64, device=self.context.values.device)
        return edges[:-1], edges[1:]

    def slopes(self, left: Tensor, right: Tensor) -> Slopes:
        """M at the centres of intervals, and its bounds over each."""
        return Slopes.over(self.context, (left + right) / 2, (right - left) / 2, self.spread)

    def slope(self, u: Tensor) -> Tensor:
        """M(u), (L,)."""
        return self.context.line_cumulants(u.unsqueeze(-1))[1].sum(-1)


def _reach(context: Context, spread: tuple[Tensor, Tensor]) -> float:
    r"""X such that \|M(u)\| <= _FAR for \|u\| >= X, by doubling.

    For each head the second moment of the keys about the end that the tilt leads to is the variance and the square of
    what is left of the way, both known from the values, which are proportional to the keys.
    """
    o, g = context.values.squeeze(-1), context.keys.squeeze(-1)  # (H, n)
    reach = 1.0 / float(spread[1].max())
    for _ in range(_LEVELS):
        total = 0.0
        for sign in (1.0, -1.0):
            end = o.gather(-1, (sign * g).argmax(-1, keepdim=True)).squeeze(-1)  # (H,)
            at = torch.tensor([sign * reach], dtype=torch.float64, device=o.device)
            mean, slope, _ = context.line_cumulants(at)
            left = (mean - end).square() * spread[1] / spread[0]
            total = max(total, float((slope.abs() + left).sum()))
        if total <= _FAR:
            return reach
        reach *= 2
    return reach
