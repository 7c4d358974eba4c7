r"""The local sensitivity of a softmax (arXiv:2602.18849), as a bound on the covariances of attention.

.. math::
    \theta(p) = \max_S 4\, p(S) (1 - p(S)) = \lVert \mathrm{diag}(p) - p p^\top \rVert_{\infty \to 1}, \qquad
    |\mathrm{Cov}(v, k)| \le \tfrac14 \theta(p)\, D_v D_k ,

with D the diameters of values and keys. For a direction x of values and y of keys the covariance is that of two numbers
with ranges at most D_v and D_k; it is largest if both are indicators of sets, and then for one set, where it is
:math:`p(S)(1 - p(S))`. One weight of at least a half makes :math:`\theta = 4 m (1 - m)`, m the largest weight; in
general theta is a problem of subset sums, enumerated here for few tokens and bounded by 1 otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.errors import InputError

__all__ = ["LocalBound", "measure_local_bound", "softmax_norm", "theta"]

_MOST = 16  # tokens whose subsets are enumerated


class LocalBound(NamedTuple):
    """The local bound on random attentions, beside the plain one.

    Attributes:
        largest: largest ``|Cov| / (theta D_v D_k / 4)``, at most 1 if the bound holds.
        sharper: median of 1 / theta, the gain over the plain bound ``D_v D_k / 4``.
        slack: median of the local bound over ``|Cov|``.
        control: largest ratio if theta is taken to be 4 m (1 - m) without a weight m of a half, which is wrong.
    """

    largest: float
    sharper: float
    slack: float
    control: float


def theta(weights: Tensor) -> Tensor:
    """Sensitivity of a softmax by enumeration of the subsets.

    Args:
        weights: p, ``(*batch, n)``, n at most 16, summing to one.

    Returns:
        ``(*batch,)``, in [0, 1]. Time and memory O(2^n) per distribution.

    Raises:
        InputError: more weights.

    Example:
        >>> theta(torch.tensor([[0.75, 0.25, 0.0], [0.5, 0.25, 0.25]]).double()).tolist()
        [0.75, 1.0]
    """
    count = weights.shape[-1]
    if count > _MOST:
        raise InputError(f"there are {count} weights; their subsets are enumerated for at most {_MOST}.")
    sets = _subsets(count, weights)
    inside, outside = weights @ sets.mT, weights @ (1 - sets).mT  # (*batch, 2^n); 1 - p(S) would lose small weights
    found: Tensor = (4 * inside * outside).amax(-1)
    return found


def softmax_norm(weights: Tensor) -> Tensor:
    """Norm of the Jacobian of a softmax from the largest entry to the sum of entries, by enumeration of signs.

    Args:
        weights: p, ``(*batch, n)``, n at most 16.

    Returns:
        ``(*batch,)``.
    """
    signs = 2 * _subsets(weights.shape[-1], weights) - 1  # (2^n, n)
    mean = weights @ signs.mT  # (*batch, 2^n)
    # Row s of (diag(p) - p p^T) x is p_s (x_s - p.x).
    moved = weights.unsqueeze(-2) * (signs - mean.unsqueeze(-1))  # (*batch, 2^n, n)
    found: Tensor = moved.abs().sum(-1).amax(-1)
    return found


def measure_local_bound(
    strength: float, *, length: int = 10, dim: int = 4, clusters: bool = False, sequences: int = 200, seed: int = 0
) -> LocalBound:
    """Compare covariances of random attentions with the local and with the plain bound.

    Args:
        strength: standard deviation of the entries of W_Q and W_K.
        length: number of tokens that the last one sees, at most 16.
        dim: p.
        clusters: True puts the tokens near two points, where the bound is nearly attained.
        sequences: number of random sequences, each with an attention of its own.
        seed: random seed.

    Returns:
        :class:`LocalBound`.
    """
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        strength * torch.randn(sequences, 1, dim, dim, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    u = torch.randn(sequences, length + 1, dim, generator=generator, dtype=torch.float64)
    if clusters:
        side = torch.where(torch.rand(sequences, length + 1, 1, generator=generator) < 0.5, 1.0, -1.0)
        u = side * u[:, :1] + 0.05 * u
    attention = CausalAttention(query, key)
    covariance = attention.mean_and_factors(u).factors.cov[:, 0, -1]  # Cov(v, k) of the last token
    weights = attention.weights(u)[:, 0, -1, :-1]
    past = u[:, :-1]
    keys = past @ key[:, 0].mT
    plain = _diameter(past) * _diameter(keys) / 4
    norm, local, most = torch.linalg.matrix_norm(covariance, 2), theta(weights), weights.amax(-1)
    # Beyond this share all weight is on one token, and covariances are rounding.
    seen = local > 1e-9
    wrong = 4 * most * (1 - most)
    return LocalBound(
        float((norm / (local * plain))[seen].max()),
        float((1 / local).median()),
        float((local * plain / norm)[seen].median()),
        float((norm / (wrong * plain))[seen].max()),
    )


def _diameter(points: Tensor) -> Tensor:
    return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").amax((-2, -1))


def _subsets(count: int, like: Tensor) -> Tensor:
    numbers = torch.arange(2**count, device=like.device).unsqueeze(-1)
    return ((numbers >> torch.arange(count, device=like.device)) & 1).to(like.dtype)  # (2^n, n)
