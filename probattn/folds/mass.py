r"""The mass Z of the next-token density for one-dimensional tokens, exactly.

.. math::
    Z(\text{past}) = \int N(e(u); 0, \sigma^2)\, |e'(u)|\, du = E[\text{number of } u \text{ with } e(u) = \epsilon] \ge
    1,

with equality if and only if the residual map does not fold. Without the modulus the integral is always 1, as e has
degree one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr
from torch import Tensor

from probattn.errors import InputError
from probattn.folds.line import turning_points
from probattn.solve.context import Context

__all__ = ["ScalarMass", "next_token_density", "scalar_mass"]

# The Gaussian beyond 40 standard deviations is below the smallest positive double.
_REACH = 40.0
_NODES = 24
_HALVINGS = 60
_NUMBERS = 1 << 21  # weights that exist at a time


@dataclass(frozen=True)
class ScalarMass:
    """Mass of a one-dimensional next-token density.

    Attributes:
        absolute: Z, the integral with the modulus, by Gauss-Legendre quadrature.
        signed: the integral without it; 1 up to rounding.
        roots: the mean number of solutions, from the values of e at its turning points and the normal distribution
            function alone.
        turning_points: where e'(u) = 0, in increasing order; empty where e is one-to-one.
    """

    absolute: float
    signed: float
    roots: float
    turning_points: NDArray[np.float64]


def next_token_density(past: Context, u: Tensor, noise_scale: float, *, jacobian: bool = True) -> Tensor:
    """N(e(u); 0, sigma^2) det J(u) with its sign, on a grid of one-dimensional candidates.

    Args:
        past: a past without batch axes, p = 1.
        u: candidates, (G,).
        noise_scale: sigma.
        jacobian: False leaves the determinant out, which is what a reader who forgets the change of variables would
            write.

    Returns:
        (G,); negative on a fold. Its modulus is the density that ``LatentAttention.log_prob`` gives.
    """
    mean, block = past.mean_and_jacobian(u.unsqueeze(-1))
    z = (u - mean.squeeze(-1)) / noise_scale
    density: Tensor = torch.exp(-0.5 * z.square()) / (noise_scale * (2 * torch.pi) ** 0.5)
    return density * block[..., 0, 0] if jacobian else density


def scalar_mass(past: Context, noise_scale: float, *, jacobian: bool = True) -> ScalarMass:
    r"""Z of one past with one-dimensional tokens, by quadrature and, independently, from the turning points.

    Between the turning points e is monotone, so each piece holds the mass \|Phi(e(b)/sigma) - Phi(e(a)/sigma)\|; the
    panels of the quadrature end at them.

    Args:
        past: strict mask, p = 1, no batch axes, finite, float64.
        noise_scale: sigma > 0.
        jacobian: False integrates N(e(u)) alone, see :func:`next_token_density`.

    Returns:
        :class:`ScalarMass`.

    Raises:
        InputError: p > 1, batch axes, an inclusive mask, a sigma that is not positive, or a past that is not finite.

    Example:
        >>> from probattn.attention import CausalAttention
        >>> tokens = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)  # e(u) = u - tanh(a u)
        >>> attentions = [CausalAttention.from_qk_matrix(torch.tensor([[a]]).double()) for a in (0.9, 3.0)]
        >>> masses = [scalar_mass(Context.of(attention, tokens), 0.5) for attention in attentions]
        >>> [round(mass.absolute, 6) for mass in masses], [len(mass.turning_points) for mass in masses]
        ([1.0, 2.230141], [0, 2])
    """
    attention = past.attention
    if attention.dim != 1 or past.batch_shape or attention.mask != "strict":
        raise InputError("scalar_mass needs one-dimensional tokens, one past without batch axes, and a strict mask.")
    if not noise_scale > 0:
        raise InputError(f"noise_scale is {noise_scale}; it must be positive.")
    reach = float(past.diameters[0].sum())
    slope = float(past.diameters[1].amax())
    centre = float(past.values.mean(-2).sum()) if past.length else float(attention.start)
    low, high = centre - reach - _REACH * noise_scale, centre + reach + _REACH * noise_scale
    turning = turning_points(past).cpu().numpy()

    # The Gaussian varies on the scale sigma; the softmax, a pure tilt, on the scale |u| itself, down to 1 / slope at
    # zero.
    finest = 0.25 / slope if slope > 0 else high - low
    graded = np.geomspace(finest, max(2 * finest, high - low, abs(low), abs(high)), 200)
    edges = np.unique(np.concatenate([[low, high], turning, graded, -graded]))
    edges = edges[(edges >= low) & (edges <= high)]
    left, right = _panels(past, edges, noise_scale, min(noise_scale, (high - low) / 100))
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    half = (right - left) / 2
    u = (left + half)[:, None] + half[:, None] * nodes  # (panels, nodes)
    step = max(1, _NUMBERS // max(1, past.values.shape[-3] * past.length))
    parts = _tensor(u.ravel(), past).split(step)
    density = torch.cat([next_token_density(past, part, noise_scale, jacobian=jacobian) for part in parts])
    panels = half[:, None] * weights * density.cpu().numpy().reshape(u.shape)

    ends = np.concatenate([[-np.inf], _residual(past, turning), [np.inf]])
    pieces = np.abs(np.diff(ndtr(ends / noise_scale)))
    return ScalarMass(float(np.abs(panels).sum()), float(panels.sum()), float(pieces.sum()), turning)


def _panels(
    past: Context, edges: NDArray[np.float64], noise_scale: float, width: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of panels that hold all of the mass, few even where tokens lie far apart.

    Each has at most some width, and e changes by at most a standard deviation over it.

    Between neighbouring edges e is monotone, so that a panel has mass only if e comes near zero at an end or
    changes its sign.
    """
    left, right = edges[:-1], edges[1:]
    for _ in range(_HALVINGS):
        at_left, at_right = _residual(past, left), _residual(past, right)
        near = np.minimum(np.abs(at_left), np.abs(at_right)) <= _REACH * noise_scale
        near |= np.sign(at_left) != np.sign(at_right)
        left, right = left[near], right[near]
        # A steep e passes the Gaussian in a small part of a panel, which the nodes would miss.
        wide = (right - left > width) | (np.abs(at_right - at_left)[near] > noise_scale)
        if not wide.any():
            break
        middle = (left[wide] + right[wide]) / 2
        left, right = (
            np.concatenate([left[~wide], left[wide], middle]),
            np.concatenate([right[~wide], middle, right[wide]]),
        )
    return left, right


def _residual(past: Context, points: NDArray[np.float64]) -> NDArray[np.float64]:
    step = max(1, _NUMBERS // max(1, past.values.shape[-3] * past.length))
    parts = [(u - past.mean(u)).squeeze(-1) for u in _tensor(points, past).unsqueeze(-1).split(step)]
    return np.asarray(torch.cat(parts).cpu().numpy(), dtype=np.float64)


def _tensor(points: NDArray[np.float64], past: Context) -> Tensor:
    return torch.as_tensor(points, dtype=past.values.dtype, device=past.values.device)
