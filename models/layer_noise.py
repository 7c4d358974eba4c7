r"""Noise of a residual stream: scalar, diagonal, or of low rank plus diagonal, with an offset that a sequence shares.

.. math::
    e_i = b + \epsilon_i, \qquad \epsilon_i \sim N(0, S), \qquad b \sim N(0, \mathrm{diag}(\tau^2)), \qquad
    S = \mathrm{diag}(\sigma^2) + L L^\top

The coordinates of a stream have means of their own, some of them hundreds of times as large as the changes from token
to token. The offset b, one per sequence, takes them up and is integrated out: an orthogonal change of the n tokens has
:math:`\sqrt n\, \bar e \sim N(0, S + n\,\mathrm{diag}(\tau^2))` beside n - 1 draws of N(0, S), so that

.. math::
    \log p(e) = \log N\bigl(\sqrt n\, \bar e;\, 0, S + n\,\mathrm{diag}(\tau^2)\bigr)
      - \tfrac12 \sum_i (e_i - \bar e)^\top S^{-1} (e_i - \bar e) - \tfrac{n - 1}{2} \log |2 \pi S| .

Derived here; the low-rank part by the matrix inversion lemma (Woodbury, 1950).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from probattn.errors import InputError, require_at_least

__all__ = ["Noise", "StreamNoise"]

Noise = Literal["scalar", "diagonal", "low_rank"]
_LOG_TWO_PI = math.log(2 * math.pi)


class StreamNoise(dist.TorchDistribution):
    """Gaussian noise of T tokens of p features, an event of shape (T, p).

    Args:
        scale: standard deviations sigma, ``(*batch, p)``, or ``(*batch, 1)`` for one number.
        length: number T of tokens.
        dim: number p of features.
        factor: L, ``(*batch, p, k)``; None leaves the low-rank part out.
        offset: standard deviations tau of the offset of a sequence, ``(*batch, p)``; None leaves the offset out.
        validate_args: as in torch.

    Raises:
        InputError: a length below 1, or shapes that do not fit.

    Cost: ``log_prob`` O(T p (k + 1) + p k^2).

    Example:
        >>> noise = StreamNoise(torch.tensor([2.0]), 3, 2, offset=torch.tensor([5.0, 1.0]))
        >>> noise.event_shape, noise.log_prob(torch.ones(3, 2)).shape
        (torch.Size([3, 2]), torch.Size([]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  # torch's own convention
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        scale: Tensor,
        length: int,
        dim: int,
        *,
        factor: Tensor | None = None,
        offset: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        require_at_least("length", length)
        if not scale.dim() or scale.shape[-1] not in (1, dim):
            raise InputError(f"scale has shape {tuple(scale.shape)}; its last axis must be 1 or {dim} long.")
        if factor is not None and (factor.dim() < 2 or factor.shape[-2] != dim):
            raise InputError(f"factor has shape {tuple(factor.shape)}; it must be (*batch, {dim}, k).")
        if offset is not None and offset.shape[-1:] != (dim,):
            raise InputError(f"offset has shape {tuple(offset.shape)}; its last axis must be {dim} long.")
        self.scale, self.factor, self.offset = scale, factor, offset
        shapes = [scale.shape[:-1]]
        shapes += [] if factor is None else [factor.shape[:-2]]
        shapes += [] if offset is None else [offset.shape[:-1]]
        super().__init__(torch.broadcast_shapes(*shapes), torch.Size([length, dim]), validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> StreamNoise:
        """The same noise with its batch axes expanded; the parameters stay as they are and broadcast."""
        new: StreamNoise = self._get_checked_instance(StreamNoise, _instance)  # type: ignore[no-untyped-call]
        new.scale, new.factor, new.offset = self.scale, self.factor, self.offset
        super(StreamNoise, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # torch's own default
        """Draws, ``(*sample, *batch, T, p)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = self.scale.unsqueeze(-2) * _normal(shape, self.scale)
        if self.factor is not None:
            noise = noise + _normal((*shape[:-1], self.factor.shape[-1]), self.scale) @ self.factor.mT
        if self.offset is not None:
            noise = noise + self.offset.unsqueeze(-2) * _normal((*shape[:-2], 1, shape[-1]), self.scale)
        return noise

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density, ``(*batch,)``."""
        if self._validate_args:
            self._validate_sample(value)
        length, dim = self.event_shape
        variance = self.scale.square().expand(*self.scale.shape[:-1], dim)
        if self.offset is None:
            return _normal_log_prob(value, variance, self.factor)
        mean = value.mean(-2, keepdim=True)  # (*batch, 1, p)
        first = _normal_log_prob(math.sqrt(length) * mean, variance + length * self.offset.square(), self.factor)
        return first + _normal_log_prob(value - mean, variance, self.factor, length - 1)


def _normal(shape: Any, like: Tensor) -> Tensor:
    return torch.randn(torch.Size(shape), dtype=like.dtype, device=like.device)


def _normal_log_prob(e: Tensor, variance: Tensor, factor: Tensor | None, degrees: int | None = None) -> Tensor:
    """Log-density of rows under N(0, diag(variance) + L L^T), summed; the normaliser counts ``degrees`` rows.

    Args:
        e: rows, ``(*batch, n, p)``.
        variance: ``(*batch, p)``.
        factor: L, ``(*batch, p, k)`` or None.
        degrees: number of independent rows; None: n.
    """
    degrees = e.shape[-2] if degrees is None else degrees
    square = (e.square().sum(-2) / variance).sum(-1)
    volume = variance.log().sum(-1)
    if factor is not None:
        weighted = factor / variance.unsqueeze(-1)  # D^-1 L, (*batch, p, k)
        capacity = factor.mT @ weighted
        capacity = capacity + torch.eye(capacity.shape[-1], dtype=e.dtype, device=e.device)
        # Far out in the space of the parameters the matrix overflows; the density there is NaN, not an error.
        root, info = torch.linalg.cholesky_ex(capacity)
        root = root.masked_fill((info != 0)[..., None, None], torch.nan)
        inner = torch.linalg.solve_triangular(root, (e @ weighted).mT, upper=False)  # (*batch, k, n)
        square = square - inner.square().sum((-2, -1))
        volume = volume + 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return -0.5 * (square + degrees * (volume + variance.shape[-1] * _LOG_TWO_PI))
