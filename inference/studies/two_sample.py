r"""Two-sample tests by permutation: energy distance and maximum mean discrepancy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError, require_finite

__all__ = ["TwoSample", "holm", "two_sample_test"]


class TwoSample(NamedTuple):
    """Statistics and p-values.

    Attributes:
        energy: energy distance 2 ``E|X - Y|`` - ``E|X - X'|`` - ``E|Y - Y'|``.
        energy_p: p-value of the energy distance.
        mmd: squared maximum mean discrepancy under a Gaussian kernel, whose width is the median distance.
        mmd_p: p-value of the maximum mean discrepancy.
    """

    energy: float
    energy_p: float
    mmd: float
    mmd_p: float


def two_sample_test(x: Tensor, y: Tensor, *, permutations: int = 999, seed: int = 0) -> TwoSample:
    r"""Test whether two samples have the same distribution, exactly at any level under exchangeability.

    Energy distance: Szekely and Rizzo (2013, doi:10.1016/j.jspi.2013.03.018); maximum mean discrepancy: Gretton et al.
    (2012, JMLR 13, 723-773). Both statistics are quadratic forms :math:`w^T D w` in the weights 1/N, -1/M of the pooled
    sample, so all permutations cost one matrix product: O(P (N + M)^2). The p-value counts the statistic among its
    permutations, :math:`(1 + \#\{t_\pi \ge t\}) / (1 + P)`.

    Args:
        x: first sample, ``(N, d)``.
        y: second sample, ``(M, d)``.
        permutations: number P of permutations.
        seed: random seed of the permutations.

    Raises:
        InputError: samples of different width, of fewer than two points, or not finite.

    Example:
        >>> x, y = torch.zeros(30, 1).double(), torch.ones(30, 1).double()
        >>> two_sample_test(x, y).energy_p, two_sample_test(x, x).energy_p
        (0.001, 1.0)
    """
    if x.dim() != 2 or y.dim() != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise InputError(
            f"two-sample tests need samples (N, d) and (M, d) with N, M >= 2; got {tuple(x.shape)} and "
            f"{tuple(y.shape)}."
        )
    require_finite("x", x)
    require_finite("y", y)
    pooled = torch.cat([x, y]).double()
    distance = torch.cdist(pooled, pooled, compute_mode="donot_use_mm_for_euclid_dist")
    width = distance[distance > 0].median() if bool((distance > 0).any()) else torch.ones(())
    kernel = torch.exp(-0.5 * (distance / width).square())
    weights = torch.cat([torch.full((len(x),), 1 / len(x)), torch.full((len(y),), -1 / len(y))]).double()
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([weights[torch.randperm(len(weights), generator=generator)] for _ in range(permutations)])
    rows = torch.cat([weights.unsqueeze(0), shuffled])  # (1 + P, N + M)
    energy = -((rows @ distance) * rows).sum(-1)
    mmd = ((rows @ kernel) * rows).sum(-1)
    return TwoSample(float(energy[0]), _p_value(energy), float(mmd[0]), _p_value(mmd))


def _p_value(statistics: Tensor) -> float:
    # A permutation that gives the observed split back, up to rounding, counts as one as large.
    slack = 1e-12 * float(statistics.abs().max())
    return float((statistics >= statistics[0] - slack).double().mean())


def holm(p_values: list[float]) -> list[float]:
    """Adjusted p-values of Holm (1979): those at most alpha are rejections at family-wise error alpha.

    Args:
        p_values: p-values of the single tests.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted
