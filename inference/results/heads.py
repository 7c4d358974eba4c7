"""One order of the heads in all draws, as only their multiset is identified."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

__all__ = ["match_heads"]

_ROUNDS = 10  # alternations at most; each brings the draws closer, and few are needed


def match_heads(products: NDArray[np.float64]) -> NDArray[np.int64]:
    """Order of the heads in each draw that brings all draws closest to their mean.

    Alternates between the mean and the assignment of each draw's heads to those of the mean (Hungarian method; Kuhn,
    1955, doi:10.1002/nav.3800020109), as in Stephens (2000, doi:10.1111/1467-9868.00265). Starts at the last draw of
    the first chain and ends when nothing changes.

    Args:
        products: identified products of each head, ``(chain, draw, H, K)``.

    Returns:
        Indices, ``(chain, draw, H)``: head h of the result is head ``order[..., h]`` of the draw.

    Example:
        >>> match_heads(np.array([[[[0.0], [5.0]], [[5.1], [0.1]]]]))[0]
        array([[1, 0],
               [0, 1]])
    """
    chains, draws, heads, _ = products.shape
    order = np.tile(np.arange(heads), (chains, draws, 1))
    reference = products[0, -1]
    for _ in range(_ROUNDS):
        distance = ((products[:, :, None, :, :] - reference[:, None, :]) ** 2).sum(-1)  # (chain, draw, H to, H from)
        found = np.array([[linear_sum_assignment(cost)[1] for cost in row] for row in distance])
        if np.array_equal(found, order):
            break
        order = found
        reference = np.take_along_axis(products, order[..., None], axis=2).mean((0, 1))
    return order
