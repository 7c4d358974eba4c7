r"""Selectivity in long contexts (Bruno and coworkers 2026, arXiv:2605.08505).

Of n keys uniform on the sphere of R^d a fixed query sees the nearest at a squared distance of order
:math:`n^{-2/(d-1)}`, so that attention :math:`\propto e^{\beta q \cdot k}` selects single keys at the scale
:math:`\beta^* \sim n^{2/(d-1)}`. Measured here: the beta at which the nearest key has half the weight. The power of a
finite n deviates by the curvature of the sphere, of relative order :math:`n^{-2/(d-1)}`, which a fit can hold apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from probattn.errors import require_at_least
from probattn.inference.studies.published.record import Array, Estimate, estimate, power_fit
from probattn.moments.operators import past_moments

__all__ = ["Selectivity", "measure_selectivity", "selective_scale"]

_HALVINGS = 32


class Selectivity(NamedTuple):
    """Scales at which attention becomes selective, in one dimension d.

    Attributes:
        dim: d.
        lengths: n, (K,).
        scales: beta* of independent draws of the keys, ``(draws, K)``.
        plain: exponent of beta* in n, by a straight line.
        corrected: the same, with the leading correction of a finite n.
    """

    dim: int
    lengths: Array
    scales: Array
    plain: Estimate
    corrected: Estimate


def selective_scale(keys: Tensor) -> Tensor:
    """The beta at which the key with the largest product with the query (1, 0, ..., 0) has half the weight.

    Args:
        keys: keys, ``(N, n, d)``, n at least 2.

    Returns:
        ``(N,)``, by bisection. Time O(N n d^2) per step.

    Example:
        >>> keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]]).double()
        >>> round(float(selective_scale(keys)), 6)  # e^beta = 2
        0.693147
    """
    query = torch.zeros_like(keys[:, 0])
    query[:, 0] = 1.0
    nearest = keys[:, :, 0].amax(-1)
    low, high = torch.full_like(nearest, 1e-2).log(), torch.full_like(nearest, 1e8).log()
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        half = _largest_weight(middle.exp(), query, keys, nearest) >= 0.5
        low, high = torch.where(half, low, middle), torch.where(half, middle, high)
    return ((low + high) / 2).exp()


def measure_selectivity(
    dim: int, lengths: Sequence[int], draws: int, *, ball: bool = False, seed: int = 0
) -> Selectivity:
    """Fit the exponent of beta* in n.

    Args:
        dim: d, at least 2.
        lengths: n, at least four of them.
        draws: number of independent sets of keys at each n, at least 2.
        ball: True draws keys uniform in the ball instead of on the sphere, which makes the exponent 2 / (d + 1): the
            negative control.
        seed: random seed of the keys.

    Returns:
        :class:`Selectivity`; the intervals come from fits to each draw.
    """
    require_at_least("dim", dim, 2)
    generator = torch.Generator().manual_seed(seed)
    columns = []
    for n in lengths:
        keys = torch.randn(draws, n, dim, generator=generator, dtype=torch.float64)
        keys = keys / torch.linalg.vector_norm(keys, dim=-1, keepdim=True)
        if ball:
            keys = keys * torch.rand(draws, n, 1, generator=generator, dtype=torch.float64) ** (1 / dim)
        columns.append(selective_scale(keys).numpy())
    scales = np.stack(columns, -1)
    plain = estimate(power_fit(lengths, scales))
    corrected = estimate(power_fit(lengths, scales, 2 / (dim - 1)))
    return Selectivity(dim, np.asarray(lengths, dtype=float), scales, plain, corrected)


def _largest_weight(beta: Tensor, query: Tensor, keys: Tensor, nearest: Tensor) -> Tensor:
    rows = (beta.unsqueeze(-1) * query).view(len(keys), 1, 1, 1, -1)  # (N, K = 1, P = 1, g = 1, d)
    first, limit = torch.tensor([0]), torch.tensor([keys.shape[1]])
    log_sum = past_moments(rows, keys.unsqueeze(1), keys.unsqueeze(1)[..., :1], first, limit).log_sum.flatten()
    return torch.exp(beta * nearest - log_sum)
