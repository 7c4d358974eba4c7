r"""The Gaussian past with n tokens: its error, and what it does to the boundary 4/27.

After n tokens from N(0, V) on the line the mean of attention is :math:`\mu(u) = V b` for :math:`b = a u` as n grows
(2501.18322, 2606.07600, 2605.10466). By the delta method for the ratio of two sums, derived here,

.. math::
    E(\mu - V b)^2 = \frac{e^{b^2 V}(V + b^2 V^2)}{n}, \qquad E(\mu - V b) = -\frac{b V e^{b^2 V}}{n} .

Where each token enters the past with its negative, as in the measurement of the boundary, both lose their even part,

.. math::
    R(b) = \frac{e^{b^2 V}(V + b^2 V^2) - e^{-b^2 V}(V - b^2 V^2)}{n}, \qquad
    B(b) = -\frac{b V (e^{b^2 V} - e^{-b^2 V})}{n} .

To first order in :math:`1/n`, with a = 1 and :math:`G = 1/(1 - V)`, the next token then has the variance
:math:`G^2 \sigma^2 + K(V)/n`, :math:`K/n = E[2 G u B + G^2 (R + u R')]` over u from N(0, V), so that the largest noise
that keeps the spread is :math:`\max_V (V - K(V)/n)(1 - V)^2`, which tends to 4/27 as :math:`n \to \infty`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from scipy.optimize import minimize_scalar

from probattn.attention import CausalAttention
from probattn.errors import require_at_least
from probattn.inference.studies.published.record import Estimate, estimate
from probattn.solve.context import Context

__all__ = ["Deviation", "boundary_at", "measure_deviation"]


class Deviation(NamedTuple):
    """Error of the Gaussian limit at one length and one query.

    Attributes:
        length: n.
        exponent: b^2 V.
        ratio: mean square error over its prediction.
    """

    length: int
    exponent: float
    ratio: Estimate


def measure_deviation(
    length: int, exponent: float, spread: float = 1.0, *, pasts: int = 4000, seed: int = 0
) -> Deviation:
    """Compare the squared error of the Gaussian limit with its prediction.

    Args:
        length: n.
        exponent: b^2 V for the query b = a u.
        spread: V.
        pasts: number of independent pasts, a multiple of 20.
        seed: random seed of the pasts.

    Returns:
        :class:`Deviation`; the interval comes from 20 groups of pasts.

    Example:
        >>> measure_deviation(1000, 0.5).ratio.holds(1.0)
        True
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = math.sqrt(spread) * torch.randn(pasts, length, 1, generator=generator, dtype=torch.float64)
    attention = CausalAttention.from_qk_matrix(torch.ones(1, 1, dtype=torch.float64))
    b = math.sqrt(exponent / spread)
    mean = Context.of(attention, tokens).mean(torch.full((pasts, 1), b, dtype=torch.float64)).squeeze(-1)
    predicted = math.exp(exponent) * spread * (1 + exponent) / length
    squares = (mean - spread * b).square() / predicted
    return Deviation(length, exponent, estimate(squares.view(20, -1).mean(-1).numpy()))


def boundary_at(length: float) -> float:
    """Boundary a sigma^2 of symmetric pasts of n tokens, by the closed form of the module.

    Args:
        length: n, at least 25.

    Returns:
        4/27 and a correction of about -0.41 / n.

    Raises:
        InputError: fewer tokens, for which an expansion in 1 / n says nothing.

    Example:
        >>> [round(boundary_at(n), 4) for n in (100, 1000, 1e9)]
        [0.1444, 0.1477, 0.1481]
    """
    require_at_least("length", length, 25)
    found = minimize_scalar(
        lambda v: -(v - _excess(v) / length) * (1 - v) ** 2,
        bounds=(0.1, 0.4),
        method="bounded",
        options={"xatol": 1e-9},
    )
    return -float(found.fun)


def _excess(v: float) -> float:
    """K(V)."""
    gain = 1 / (1 - v)

    def moment(power: int, sign: float) -> float:
        """E[u^power e^(sign V u^2)] over u from N(0, V), power 2 or 4."""
        width = v / (1 - 2 * sign * v * v)
        return math.sqrt(width / v) * {2: width, 4: 3 * width * width}[power]

    # E[R + u R'] = E[u^2 R] / V, by parts.
    moved = moment(2, 1) - moment(2, -1) + v * (moment(4, 1) + moment(4, -1))
    bias = -v * (moment(2, 1) - moment(2, -1))  # E[u B]
    return 2 * gain * bias + gain**2 * moved
