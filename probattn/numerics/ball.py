r"""A smooth map of space onto an open ball, and its derivative.

.. math::
    \varphi(u) = \frac{u}{\sqrt{1 + |u|^2 / \rho^2}}, \qquad
    \varphi'(u) = s\,\Bigl(I - \frac{\varphi \varphi^T}{\rho^2}\Bigr), \quad s = \frac{1}{\sqrt{1 + |u|^2 / \rho^2}},

with :math:`|\varphi(u)| < \rho` and the eigenvalues s and s^3 of :math:`\varphi'`, so that :math:`|\varphi'| \le 1`.
Near the origin it is the identity; far out it keeps the direction alone, as root-mean-square normalisation does (Zhang
and Sennrich 2019, arXiv:1910.07467). A bijection of R^p and the ball.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["onto_ball", "onto_ball_jacobian"]


def onto_ball(u: Tensor, radius: Tensor) -> Tensor:
    """Map points onto the open ball of a radius about the origin.

    Args:
        u: points, ``(*shape, p)``.
        radius: rho > 0, broadcasts with ``(*shape)``.

    Returns:
        ``(*shape, p)``, differentiable any number of times. Points as large as the floating-point numbers go are mapped
        without overflow.

    Example:
        >>> onto_ball(torch.tensor([[0.001], [2.0], [1e30]]), torch.tensor(2.0)).flatten()
        tensor([1.0000e-03, 1.4142e+00, 2.0000e+00])
    """
    shrunk, root = _shrink(u, radius)
    return shrunk / root


def onto_ball_jacobian(u: Tensor, radius: Tensor) -> Tensor:
    """Derivative of :func:`onto_ball`, symmetric and positive definite, with eigenvalues s and s^3.

    Args:
        u: points, ``(*shape, p)``.
        radius: rho > 0, broadcasts with ``(*shape)``.

    Returns:
        ``(*shape, p, p)``, differentiable any number of times. Time and memory O(p^2) per point.

    Example:
        >>> onto_ball_jacobian(torch.tensor([3.0**0.5, 0.0]), torch.tensor(1.0))  # s = 1/2
        tensor([[0.1250, 0.0000],
                [0.0000, 0.5000]])
    """
    size, (shrunk, root) = _size(u, radius), _shrink(u, radius)
    unit = (shrunk / root) / radius[..., None]  # phi / rho, shorter than 1
    s = (1 / (size * root)).unsqueeze(-1)  # (*shape, 1, 1)
    identity = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
    # 1 - |phi|^2 / rho^2 is s^2: written so, the slope along u keeps its digits far out on a line.
    across = unit.square().sum(-1)[..., None, None] * identity - unit.unsqueeze(-1) * unit.unsqueeze(-2)
    return s * (s.square() * identity + across)


def _size(u: Tensor, radius: Tensor) -> Tensor:
    """A power-free scale of each point, at least 1, ``(*shape, 1)``; the map does not depend on it."""
    return (u.detach().abs().amax(-1, keepdim=True) / radius.detach()[..., None]).clamp(min=1.0)


def _shrink(u: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
    """Return u / m and sqrt(1 / m^2 + |u / m|^2 / rho^2) for the scale m, ``(*shape, p)`` and ``(*shape, 1)``."""
    size = _size(u, radius)
    shrunk = u / size
    square = (shrunk / radius[..., None]).square().sum(-1, keepdim=True)
    return shrunk, (size.square().reciprocal() + square).sqrt()
