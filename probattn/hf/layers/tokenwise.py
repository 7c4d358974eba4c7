r"""Maps of one token at a time, with their Jacobians in factors: norms, linear maps of heads, rotations by position.

A norm of n features has the Jacobian

.. math:: N'(x) = s\,\mathrm{diag}(g)\,(I - E E^T)

with the gain g, a number s and one or two orthonormal directions E: with :math:`\rho^2 = |x|^2 / n + \epsilon` for the
root mean square and :math:`\sigma^2 = |x - \bar x|^2 / n + \epsilon` for the layer norm,

.. math::
    \mathrm{RMS}:\; s = 1 / \rho,\; E = \bigl[\tfrac{x}{\rho \sqrt n}\bigr], \qquad
    \mathrm{LayerNorm}:\; s = 1 / \sigma,\;
    E = \bigl[\tfrac{1}{\sqrt n},\; \tfrac{x - \bar x}{\sigma \sqrt n}\bigr] .

The directions have length one but for epsilon. Pure functions of tensors; norms are computed in the precision of
their input, where the libraries' modules go through float32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Norm", "NormJacobian", "Projection", "Rotation"]


class NormJacobian(NamedTuple):
    r"""The Jacobian :math:`N' = s\,\mathrm{diag}(g)(I - E E^T)` of a norm at some tokens.

    Attributes:
        gain: g, ``(n,)``; None: all one.
        scale: s, ``(*tokens,)``.
        directions: E, ``(*tokens, n, e)``.
    """

    gain: Tensor | None
    scale: Tensor
    directions: Tensor

    def pushforward(self, columns: Tensor) -> Tensor:
        """Multiply from the left: N' A.

        Args:
            columns: A, ``(*tokens, n, m)``.

        Returns:
            ``(*tokens, n, m)``.
        """
        rest = columns - self.directions @ (self.directions.mT @ columns)
        rest = self.scale[..., None, None] * rest
        return rest if self.gain is None else self.gain.unsqueeze(-1) * rest

    def pullback(self, rows: Tensor) -> Tensor:
        """Multiply from the right: A N'.

        Args:
            rows: A, ``(*tokens, m, n)``.

        Returns:
            ``(*tokens, m, n)``.
        """
        rows = rows if self.gain is None else rows * self.gain
        return self.scale[..., None, None] * (rows - (rows @ self.directions) @ self.directions.mT)


class Norm(NamedTuple):
    """A norm over the last axis, with its gain and bias.

    Attributes:
        gain: g, ``(n,)``; None: all one. Where the library keeps 1 + weight, that sum.
        bias: ``(n,)``; None: zero.
        epsilon: added to the mean square.
        centred: subtract the mean first (LayerNorm) or not (root mean square).

    Example:
        >>> norm = Norm(gain=None, bias=None, epsilon=0.0, centred=False)
        >>> norm(torch.tensor([3.0, -3.0]))
        tensor([ 1., -1.])
    """

    gain: Tensor | None
    bias: Tensor | None
    epsilon: float
    centred: bool

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise tokens, ``(*tokens, n)``, to the same shape."""
        x, scale = self._scaled(x)
        x = scale * x
        x = x if self.gain is None else x * self.gain
        return x if self.bias is None else x + self.bias

    def jacobian(self, x: Tensor) -> NormJacobian:
        """The Jacobian at tokens x, ``(*tokens, n)``, in factors."""
        x, scale = self._scaled(x)
        root = math.sqrt(x.shape[-1])
        direction = (scale / root * x).unsqueeze(-1)  # (*tokens, n, 1)
        if self.centred:
            direction = torch.cat([torch.full_like(direction, 1 / root), direction], -1)  # (*tokens, n, 2)
        return NormJacobian(self.gain, scale.squeeze(-1), direction)

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x, torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon)


class Projection(NamedTuple):
    """A linear map of the token to each head.

    Attributes:
        weight: W, ``(heads, r, p)``.
        bias: ``(heads, r)``; None: zero.
    """

    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """Project normalised tokens, ``(B, T, p)``, to ``(B, heads, T, r)``."""
        heads = (x @ self.weight.flatten(0, 1).mT).unflatten(-1, self.weight.shape[:2])  # (B, T, heads, r)
        heads = heads if self.bias is None else heads + self.bias
        moved: Tensor = heads.movedim(-2, -3)
        return moved


class Rotation(NamedTuple):
    r"""Rotation of the first d features of queries and keys by the position, in the halves (x_1, x_2) of those d.

    .. math:: R (x_1, x_2) = (x_1 \cos_1 - x_2 \sin_1,\; x_2 \cos_2 + x_1 \sin_2)

    A scaling of the attention that the library puts into cosine and sine is part of R, so that R need not be
    orthogonal.

    Attributes:
        cos: ``(*tokens, d)``, broadcasting against the vectors.
        sin: the same.
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """R x for vectors x, ``(*tokens, r)`` with r >= d."""
        turned, rest = x.split([self.cos.shape[-1], x.shape[-1] - self.cos.shape[-1]], -1)
        one, two = turned.chunk(2, -1)
        turned = turned * self.cos + torch.cat([-two, one], -1) * self.sin
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def transposed(self, x: Tensor) -> Tensor:
        """R^T x for vectors x, ``(*tokens, r)``: what R does to a row from the right."""
        turned, rest = x.split([self.cos.shape[-1], x.shape[-1] - self.cos.shape[-1]], -1)
        one, two = (turned * self.sin).chunk(2, -1)
        turned = turned * self.cos + torch.cat([two, -one], -1)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def at(self, rows: Tensor) -> Rotation:
        """The rotations of some positions: cosine and sine ``(1 or B, T, d)`` of the rows ``(P,)``."""
        return Rotation(self.cos[:, rows], self.sin[:, rows])

    def unsqueeze(self, *axes: int) -> Rotation:
        """The same with further axes of size one."""
        cos, sin = self.cos, self.sin
        for axis in axes:
            cos, sin = cos.unsqueeze(axis), sin.unsqueeze(axis)
        return Rotation(cos, sin)
