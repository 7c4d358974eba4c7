r"""A row's own token, added in closed form to the moments of the tokens before it.

Under the inclusive mask the own token depends on what is differentiated. With the mean :math:`\bar v`, the covariance C
and the log-sum :math:`\Lambda` of the tokens before, its weight is
:math:`\alpha_{ii} = \sigma(l_{ii} - \Lambda_i)`, and adding a point of weight alpha to a distribution gives

.. math::
    \bar v_i = \alpha_{ii} v_i + (1 - \alpha_{ii}) \bar v, \qquad
    C_i = (1 - \alpha_{ii}) [C + \alpha_{ii} (v_i - \bar v)(k_i - \bar k)^T] .

Its weight and that of the others are two sigmoids, so that neither loses digits when the other is near one.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from probattn.moments.dense import scaled_dot
from probattn.moments.operators import OriginMoments

__all__ = ["WithOwn", "add_own_token"]


class WithOwn(NamedTuple):
    """Moments of a row's past and of its own token.

    Attributes:
        mean: vbar_i, ``(*batch, T, dv)``.
        covariance: C_i, ``(*batch, T, dv, r)``.
        weight: alpha_ii, ``(*batch, T, 1)``.
        away: alpha_ii (v_i - vbar_i), ``(*batch, T, dv)``.
    """

    mean: Tensor
    covariance: Tensor
    weight: Tensor
    away: Tensor


def add_own_token(past: OriginMoments, query: Tensor, key: Tensor, value: Tensor) -> WithOwn:
    """Moments of the tokens s <= i from those of the tokens s < i.

    Args:
        past: moments of the tokens before, with axes covariance ``(*batch, T, dv, r)``, offset and origin
            ``(*batch, T, dv + r)``, log_sum ``(*batch, T)``.
        query: c q_i, already scaled, ``(*batch, T, r)``.
        key: k_i, ``(*batch, T, r)``.
        value: v_i, ``(*batch, T, dv)``.

    Returns:
        :class:`WithOwn`. Derived here.

    Example:
        >>> import torch
        >>> one = torch.ones(1, 1)  # one row, whose past is the value -1 with the key -1
        >>> past = OriginMoments(torch.zeros(1, 1, 1), torch.zeros(1, 2), torch.zeros(1), -torch.ones(1, 2))
        >>> both = add_own_token(past, 0 * one, one, one)
        >>> both.mean.item(), both.covariance.item(), both.weight.item(), both.away.item()
        (0.0, 1.0, 0.5, 0.5)
    """
    sizes = [value.shape[-1], key.shape[-1]]
    (origin_value, origin_key), (offset_value, offset_key) = (
        part.split(sizes, -1) for part in (past.origin, past.offset)
    )
    # Measured from the origin of the row, which is near to what it attends to, differences keep their digits.
    near = key - origin_key
    odds = scaled_dot(query, near) - past.log_sum.unsqueeze(-1)
    weight, rest = odds.sigmoid(), (-odds).sigmoid()
    mean = weight * value + rest * (origin_value + offset_value)
    away = weight * rest * (value - origin_value - offset_value)
    through = away.unsqueeze(-1) * (near - offset_key).unsqueeze(-2)
    return WithOwn(mean, rest.unsqueeze(-1) * past.covariance + through, weight, away)
