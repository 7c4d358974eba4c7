r"""The long run of bounded memory on the line: the stationary density, and whether its mean returns to zero.

A long past with the distribution pi acts through

.. math::
    \mu(u) = \frac{\int \pi(v)\, e^{u g(v)} o(v)\, dv}{\int \pi(v)\, e^{u g(v)}\, dv}, \qquad
    o = C \varphi, \quad g = A \varphi,

and the next token has the distribution function :math:`\Phi((u - \mu(u)) / \sigma)`. Averages over n tokens move at the
rate 1 / n, so that in the time log n the distribution of the past flows towards that of the next token. A change
:math:`\delta\mu` of the mean comes back as

.. math::
    (L \delta\mu)(u) = \int f(v - \mu(v))\, \partial_v k(u, v)\, \delta\mu(v)\, dv, \qquad
    k(u, v) = \frac{e^{u g(v)} (o(v) - \mu(u))}{\int \pi e^{u g}},

with f the density of the noise, so that deviations move as :math:`n^{\lambda - 1}` with the eigenvalues of L. Derived
here (theory, section 11).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.errors import InputError, require_positive

__all__ = ["BoundedLimit", "bounded_limit"]

_POINTS = 401
_ROUNDS = 5000


class BoundedLimit(NamedTuple):
    """The symmetric stationary density and how deviations from it move.

    Attributes:
        points: u, (G,).
        density: density of the tokens there, (G,).
        square: mean square of the tokens.
        growth: largest real part lambda of the eigenvalues of L among even functions, which an odd change of the
            density makes: the mean moves as n to the power lambda - 1, back to zero where lambda < 1, else away.
    """

    points: Tensor
    density: Tensor
    square: float
    growth: float


@torch.no_grad()
def bounded_limit(attention: CausalAttention, noise_scale: float) -> BoundedLimit:
    r"""Find the symmetric stationary density in mean field and the exponent of its mean.

    For a radius much larger than the noise, with C = 1, the exponent is
    :math:`\lambda = 1 + (\kappa - \tfrac32)\, \sigma^2 / \rho^2` to first order: the mean leaves zero beyond
    :math:`\kappa = \tfrac32`, where attraction is no contraction for every past, and never below.

    Args:
        attention: p = 1, one head, strict mask, a memory radius, no batch axes.
        noise_scale: sigma.

    Returns:
        :class:`BoundedLimit`. Some 10^8 operations.

    Raises:
        InputError: another attention, or a stationary density whose map folds or is not found.

    Example:
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.9]]).double(), memory_radius=1.0)
        >>> limit = bounded_limit(attention, 1.0)
        >>> round(limit.square, 2), limit.growth < 1
        (2.12, True)
    """
    require_positive("noise_scale", noise_scale)
    radius = attention.memory_radius
    if radius is None or attention.dim != 1 or attention.heads != 1 or attention.mask != "strict":
        raise InputError(f"the limit is for one head on the line with a strict mask and a radius; got {attention!r}.")
    if attention.batch_shape:
        raise InputError(f"the limit is for one attention; this one has batch shape {tuple(attention.batch_shape)}.")
    attention = attention.to(torch.float64)
    carried, pull = float(attention.ov_matrix), float(attention.qk_matrix)
    reach = float(radius) * abs(carried) + 8 * noise_scale
    u = torch.linspace(-reach, reach, _POINTS, dtype=torch.float64)
    step = float(u[1] - u[0])
    held = attention.remember(u.unsqueeze(-1)).squeeze(-1)
    slope_held = (held / u).where(u != 0, 1.0).pow(3)  # phi' = s^3
    value = carried * held
    tilt = (pull * u.unsqueeze(-1) * held).exp()  # (G of u, G of v)

    def mean_of(density: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights = tilt * density * step
        total = weights.sum(-1)
        mean = (weights @ value) / total
        # The slope of the mean is the covariance of values and keys.
        slope = pull * ((weights @ (value * held)) / total - mean * (weights @ held) / total)
        return mean, slope, total

    density = _normal(u, noise_scale)
    for _ in range(_ROUNDS):
        mean, slope, _ = mean_of(density)
        after = _normal(u - mean, noise_scale) * (1 - slope)
        after = (after + after.flip(0)) / 2  # the symmetric one, stable or not
        change = float((after - density).abs().max())
        density = after
        if change < 1e-13:
            break
    mean, slope, total = mean_of(density)
    if not change < 1e-8 or float(slope.max()) >= 1:
        raise InputError(f"no stationary density without a fold was found for {attention!r} at noise {noise_scale}.")
    rate = tilt / total.unsqueeze(-1)
    moved = rate * (u.unsqueeze(-1) * pull * slope_held * (value - mean.unsqueeze(-1)) + carried * slope_held)
    operator = moved * _normal(u - mean, noise_scale) * step
    half = _POINTS // 2  # even functions by their values at u >= 0
    even = operator[half:, half:].clone()
    even[:, 1:] += operator[half:, :half].flip(1)
    growth = float(torch.linalg.eigvals(even).real.max())
    return BoundedLimit(u, density, float((density * u.square()).sum() * step), growth)


def _normal(x: Tensor, scale: float) -> Tensor:
    return torch.exp(-0.5 * (x / scale).square()) / (scale * math.sqrt(2 * math.pi))
