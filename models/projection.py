"""Projection of sequences of vectors to the directions in which they vary most."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError

__all__ = ["Projection", "fit_projection"]


class Projection(NamedTuple):
    """Linear map to fewer coordinates.

    Attributes:
        mean: what is subtracted, ``(p,)``.
        directions: orthonormal rows, the one of the largest variance first, ``(k, p)``.
        scale: standard deviation of the first coordinate, by which all are divided.
        kept: share of the variance that is kept.
    """

    mean: Tensor
    directions: Tensor
    scale: Tensor
    kept: float

    def __call__(self, u: Tensor) -> Tensor:
        """Project sequences, ``(*batch, p)``, to ``(*batch, k)``."""
        projected: Tensor = (u - self.mean) @ self.directions.mT / self.scale
        return projected


def fit_projection(u: Tensor, size: int) -> Projection:
    """Find the principal directions of tokens, by the singular value decomposition.

    Args:
        u: sequences, ``(N, T, p)``.
        size: number k of directions.

    Raises:
        InputError: more directions than features or tokens allow, or data that do not vary.

    Example:
        >>> u = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [3.0, 0.1]]])
        >>> projection = fit_projection(u, 1)
        >>> projection(u).shape, round(projection.kept, 2)
        (torch.Size([1, 3, 1]), 1.0)
    """
    rows = u.flatten(0, 1)
    most = min(rows.shape[1], len(rows) - 1)
    if not 1 <= size <= most:
        raise InputError(
            f"project is {size}; data of {rows.shape[1]} features and {len(rows)} tokens allow 1 to {most}."
        )
    mean = rows.mean(0)
    _, values, directions = torch.linalg.svd(rows - mean, full_matrices=False)
    total = values.square().sum()
    if not float(total) > 0:
        raise InputError("project: all tokens are equal; there is no direction to project to.")
    scale = values[0] / len(rows) ** 0.5
    return Projection(mean, directions[:size], scale, float(values[:size].square().sum() / total))
