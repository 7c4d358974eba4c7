r"""Every solution of u - mu(u) = eps for one-dimensional tokens under the strict mask, by branch and bound.

Solutions lie where eps plus the mean can lie, between :math:`\epsilon + \sum_h \min_s o^h_s` and
:math:`\epsilon + \sum_h \max_s o^h_s`. On an interval of half-width w about c the slope
:math:`M(u) = \sum_h \mathrm{Cov}_u(o^h, g^h)` of the mean is enclosed in two ways, and the tighter bounds count:

.. math::
    |M(u) - M(c)| \le |M'(c)|\, w + \tfrac12 L w^2, \quad L = \tfrac18 \sum_h D_{o^h} D_{g^h}^3, \qquad
    e^{-w D_{g^h}} \le M_h(u) / M_h(c) \le e^{w D_{g^h}},

as the fourth cumulant of a distribution on an interval of length D lies between -D^4/8 and D^4/12, and as tilting
changes no variance faster. The mean of each head is monotone, and so lies between its values at the ends. An interval
on which u - mu(u) - eps cannot be zero is dropped, one on which it is monotone is a bracket (solved by Chandrupatla's
method, Chandrupatla 1997), any other is halved. Derived here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize.elementwise import find_root
from torch import Tensor

from probattn.errors import InputError
from probattn.solve.context import Context

__all__ = ["Slopes", "line_range", "line_roots"]

_HALVINGS = 60
_INTERVALS = 1 << 18  # more at a time are not halved: a bracket is then taken for one solution
_NARROW = 1e-12  # of the range: narrower intervals are not halved, and two solutions within one are not told apart
_FARTHEST = 30.0  # exponent up to which a change of tilt bounds a covariance
_NUMBERS = 1 << 22  # weights that are evaluated at a time, about


def line_roots(context: Context, noise: Tensor) -> Tensor:
    """Every solution, in increasing order.

    Args:
        context: p = 1, strict mask; batch axes ``(*batch,)``, and a past of its own for each of m candidates if
            ``visible`` is set. At least one token.
        noise: eps, ``(*sample, *batch, 1)``, or ``(m, *batch, 1)``.

    Returns:
        ``(K, *sample, *batch, 1)``, K the largest number of solutions; NaN where an element has fewer. Their number is
        odd but where two coincide. Computed in float64; time O(H n) per interval, some tens of intervals per element.

    Raises:
        InputError: tokens of several dimensions, or an inclusive mask.

    Example:
        >>> from probattn import CausalAttention
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[3.0]]).double())
        >>> context = Context.of(attention, torch.tensor([[-1.0], [1.0]]).double())  # u - tanh(3 u)
        >>> line_roots(context, torch.zeros(1).double()).flatten().round(decimals=4).abs()
        tensor([0.9949, 0.0000, 0.9949], dtype=torch.float64)
    """
    if not context.on_a_line:
        raise InputError("all solutions are known for one-dimensional tokens under the strict mask only.")
    front = context.visible.shape[:1] if context.visible is not None else ()
    batch = torch.broadcast_shapes(noise.shape[:-1], (*front, *context.batch_shape))
    eps = noise.expand(*batch, 1).flatten().double()  # (B,)
    every = torch.arange(len(eps), device=eps.device)
    shared = context.visible is None and not context.batch_shape  # one past for all
    apart = context if shared else context.select(torch.unravel_index(every, batch), batch)
    step = max(1, _NUMBERS // max(1, 64 * apart.values.shape[-3] * apart.length))
    found = [_roots(apart if shared else apart.select((part,), eps.shape), eps[part]) for part in every.split(step)]
    count = max((len(part) for part in found), default=0)
    padded = [torch.nn.functional.pad(part, (0, 0, 0, count - len(part)), value=torch.nan) for part in found]
    whole = torch.cat(padded, dim=1) if padded else eps.new_empty(0, 0)  # (K, B)
    return whole.to(noise.dtype).view(count, *batch, 1)


class Slopes(NamedTuple):
    """The mean and its slope at the centres of intervals, and bounds on the slope over each; (L,), but for the first.

    Attributes:
        mean: mu_h(c) of each head, (L, H).
        slope: M(c).
        second: M'(c).
        curvature: L, a bound on ``|M''|`` everywhere, (L,) or (1,).
        lower: lower bound of M on the interval.
        upper: upper bound of M on the interval.
    """

    mean: Tensor
    slope: Tensor
    second: Tensor
    curvature: Tensor
    lower: Tensor
    upper: Tensor

    @classmethod
    def over(cls, context: Context, centre: Tensor, half: Tensor, spread: tuple[Tensor, Tensor]) -> Slopes:
        """Enclose the slope on the intervals centre - half to centre + half.

        Args:
            context: one-dimensional pasts with the batch axis (L,), or one past for all intervals.
            centre: (L,).
            half: (L,).
            spread: diameters of values and keys, (L, H) or (H,) each.
        """
        mean, each, second = context.line_cumulants(centre.unsqueeze(-1))
        slope = each.sum(-1)
        curvature = (spread[0] * spread[1] ** 3).sum(-1) / 8
        room = second.abs() * half + 0.5 * curvature * half.square()
        exponent = half.unsqueeze(-1) * spread[1]
        factor = exponent.clamp(max=_FARTHEST).exp()
        grown, shrunk = each * factor, each / factor
        # Farther away a covariance that has underflowed at the centre may be anything.
        close = (exponent <= _FARTHEST).all(-1)
        upper = torch.minimum(slope + room, torch.maximum(grown, shrunk).sum(-1).where(close, torch.inf))
        lower = torch.maximum(slope - room, torch.minimum(grown, shrunk).sum(-1).where(close, -torch.inf))
        return cls(mean, slope, second, curvature, lower, upper)


def _roots(context: Context, eps: Tensor) -> Tensor:
    """All solutions of B problems, (K, B), with NaN where there are fewer."""
    context = context.to(torch.float64)
    low, high, spread = line_range(context)  # (B,), (B,), and (B, H) twice, without B for one past
    # Ends that are no round numbers: solutions often are, and none should be the end of two intervals.
    margin = 0.01234 * (high - low) + 1e-3 * (1 + eps.abs())
    left, right = eps + low - margin, eps + high + 1.1 * margin
    narrow = _NARROW * (right - left)
    owner = torch.arange(len(eps), device=eps.device)
    at_left, at_right = (_of(context, owner).line_cumulants(end.unsqueeze(-1))[0] for end in (left, right))  # (L, H)
    brackets = []
    for level in range(_HALVINGS):
        centre, half, own = (left + right) / 2, (right - left) / 2, eps[owner]
        slopes = Slopes.over(_of(context, owner), centre, half, _pick(spread, owner))
        steepest = torch.maximum((1 - slopes.lower).abs(), (1 - slopes.upper).abs())
        near = (centre - slopes.mean.sum(-1) - own).abs() <= half * steepest * (1 + 1e-9)
        least = left - torch.maximum(at_left, at_right).sum(-1) - own  # of u - mu(u) - eps, as each mean is monotone
        most = right - torch.minimum(at_left, at_right).sum(-1) - own
        rounding = 1e-13 * (1 + left.abs() + own.abs())
        possible = near & (least <= rounding) & (most >= -rounding)
        monotone = (slopes.upper < 1) | (slopes.lower > 1)
        last = level == _HALVINGS - 1 or len(owner) > _INTERVALS
        done = possible & (monotone | (half <= narrow[owner]) | last)
        brackets.append((owner[done], left[done], right[done]))
        split = possible & ~done
        if not bool(split.any()):
            break
        at_centre = slopes.mean[split]
        at_left, at_right = torch.cat([at_left[split], at_centre]), torch.cat([at_centre, at_right[split]])
        left, right = torch.cat([left[split], centre[split]]), torch.cat([centre[split], right[split]])
        owner = owner[split].repeat(2)
    owner, left, right = (torch.cat(part) for part in zip(*brackets, strict=True))
    return _refine(context, eps, owner, left, right)


def _refine(context: Context, eps: Tensor, owner: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The solution in each bracket over which the residual changes its sign, sorted by problem, (K, B)."""

    def gap(u: Tensor, owner: Tensor) -> Tensor:
        return u - _of(context, owner).line_cumulants(u.unsqueeze(-1))[0].sum(-1) - eps[owner]

    before, after = gap(left, owner), gap(right, owner)
    crossing = ((before <= 0) & (after > 0)) | ((before >= 0) & (after < 0))
    owner, left, right = owner[crossing], left[crossing], right[crossing]
    order = left.argsort()
    order = order[owner[order].argsort(stable=True)]
    owner, left, right = owner[order], left[order], right[order]
    count = torch.bincount(owner, minlength=len(eps))
    whole = eps.new_full((int(count.max()) if len(count) else 0, len(eps)), torch.nan)
    if not len(owner):
        return whole

    def elementwise(u: NDArray[Any], k: NDArray[Any]) -> NDArray[Any]:
        flat = gap(torch.as_tensor(u.ravel()).to(eps), torch.as_tensor(k.ravel()).to(owner))
        return flat.cpu().numpy().reshape(u.shape)

    ends = left.cpu().numpy(), right.cpu().numpy()
    with np.errstate(invalid="ignore"):  # SciPy takes roots of what may be negative, and bisects there
        found = find_root(elementwise, ends, args=(owner.cpu().numpy(),))
    first = count.cumsum(0) - count
    place = torch.arange(len(owner), device=eps.device) - first[owner]
    whole[place, owner] = torch.as_tensor(found.x).to(eps)
    return whole


def line_range(context: Context) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Least and largest mean, ``(*batch,)`` each, and diameters of values and keys, ``(*batch, H)`` each, on a line."""
    ends = []
    for part in (context.values, context.keys):
        points = part.squeeze(-1)  # (B, H, n)
        hidden = None if context.visible is None else ~context.visible.squeeze(-2)
        low = points if hidden is None else points.masked_fill(hidden, torch.inf)
        high = points if hidden is None else points.masked_fill(hidden, -torch.inf)
        ends.append((low.amin(-1), high.amax(-1)))
    spread = ends[0][1] - ends[0][0], ends[1][1] - ends[1][0]
    return ends[0][0].sum(-1), ends[0][1].sum(-1), spread


def _of(context: Context, owner: Tensor) -> Context:
    """The past of each interval; a single one serves all of them."""
    return context.select((owner,), context.batch_shape) if context.batch_shape else context


def _pick(spread: tuple[Tensor, Tensor], owner: Tensor) -> tuple[Tensor, Tensor]:
    return (spread[0][owner], spread[1][owner]) if spread[0].dim() > 1 else spread
