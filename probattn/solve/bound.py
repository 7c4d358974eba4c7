r"""The contraction bound: an upper bound on the norm of M_i = dmu_i/du_i for *every* next token.

From its past alone,

.. math::
    \|M_i\| \le \tfrac14 \sum_h \mathrm{diam}\{o^h_s : s < i\}\; \mathrm{diam}\{g^h_s : s < i\}, \qquad
    o^h_s = W_O^h W_V^h u_s, \quad g^h_s = c\, W_Q^{hT} W_K^h u_s,

since a covariance of x and y has norm at most D_x D_y / 4 (Popoviciu 1935 for variances, and Cauchy-Schwarz). With a
memory radius there is also a bound for every past, from the parameters alone
(:attr:`~probattn.parameters.AttentionParameters.contraction`), and the smaller of the two counts. Below one, u_i -> e_i
is one-to-one whatever the noise. Derived here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.interface import Attention

__all__ = ["bound_from_diameters", "contraction_bound", "memory_bound", "projection_slack", "running_diameters"]

_DISTANCES = 1 << 22  # distances of points that exist at a time


def contraction_bound(attention: Attention, u: Tensor) -> Tensor:
    r"""Upper bound on the norm of M_i for every u_i, at each position of a sequence.

    Never larger than the bound that multiplies the norms of W_O and W_Q with the diameters of values and keys, and a
    function of identified products only.

    Args:
        attention: the attention; under the inclusive mask without a memory radius the own value is unbounded and so is
            the bound.
        u: tokens, ``(*batch, T, p)``.

    Returns:
        ``(*batch, T)``, not decreasing along the sequence; +inf under the inclusive mask without a memory radius. Time
        O(H T^2 p).

    Example:
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.5]]))
        >>> contraction_bound(attention, torch.tensor([[-1.0], [1.0], [0.0]]))  # 2 * 1 / 4 once both have been seen
        tensor([0.0000, 0.0000, 0.5000])
    """
    batch = torch.broadcast_shapes(attention.batch_shape, u.shape[:-2])
    if not isinstance(attention, CausalAttention):
        return torch.full((*batch, u.shape[-2]), torch.inf, dtype=u.dtype, device=u.device)
    ceiling = memory_bound(attention).expand(batch).unsqueeze(-1).expand(*batch, u.shape[-2])
    if attention.mask == "inclusive":
        return ceiling
    u = attention.remember(u).expand(*batch, *u.shape[-2:])
    tokens = u.unsqueeze(-3)  # (*batch, 1, T, p)
    values, keys = tokens @ attention.ov_matrix.mT, tokens @ attention.qk_matrix  # o and g, (*batch, H, T, p)
    nothing = values.new_zeros(values.shape[:-2])
    diameters = (running_diameters(values, nothing, 0)[:-1], running_diameters(keys, nothing, 0)[:-1])  # (T, *batch, H)
    norms = torch.linalg.vector_norm(u, dim=-1).movedim(-1, 0)  # (T, *batch)
    largest = torch.cat([torch.zeros_like(norms[:1]), norms[:-1].cummax(0).values])
    bound = bound_from_diameters(diameters, projection_slack(attention), largest).movedim(0, -1)  # (*batch, T)
    bound = bound.where(torch.arange(u.shape[-2], device=u.device) >= 2, 0.0).expand(*batch, u.shape[-2])
    return torch.minimum(bound, ceiling)


def memory_bound(attention: CausalAttention) -> Tensor:
    """Bound on the norm of M_i for every past, with what rounding may hide; inf without a memory radius.

    Args:
        attention: the attention.

    Returns:
        ``(*batch)``. Time O(H p^3).

    Example:
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.125]]).double(), memory_radius=2.0)
        >>> 0.5 <= float(memory_bound(attention)) < 0.5 + 1e-12
        True
    """
    return attention.contraction * (1 + 8 * (attention.dim + 1) * torch.finfo(attention.query.dtype).eps)


def bound_from_diameters(diameters: tuple[Tensor, Tensor], slack: tuple[Tensor, Tensor], largest: Tensor) -> Tensor:
    """The bound from the diameters of values and keys.

    Args:
        diameters: of the o_s and of the g_s, ``(*shape, H)`` each.
        slack: see :func:`projection_slack`, ``(*batch, H)`` each.
        largest: norm of the largest token, ``(*shape)``.

    Returns:
        ``(*shape)``.
    """
    wide = [
        diameter + unit * largest.unsqueeze(-1)  # (*shape, H)
        for diameter, unit in zip(diameters, slack, strict=True)
    ]
    return (wide[0] * wide[1]).sum(-1) / 4


def projection_slack(attention: CausalAttention) -> tuple[Tensor, Tensor]:
    """Rounding error of a distance between values or between keys, per unit of the largest token.

    Distances of tokens that share a large offset keep few digits, and a bound that proves must not be too small.

    Args:
        attention: the attention.

    Returns:
        For the values W_O v_s and for the keys c W_Q^T k_s, ``(*batch, H)`` each.
    """
    unit = 8 * (attention.dim + 1) * torch.finfo(attention.query.dtype).eps
    norms = (torch.linalg.matrix_norm(attention.ov_matrix), torch.linalg.matrix_norm(attention.qk_matrix))
    return unit * norms[0], unit * norms[1]


def running_diameters(points: Tensor, known: Tensor, seen: int) -> Tensor:
    """Diameters of the points before each position.

    Args:
        points: ``(*batch, n, p)``.
        known: diameter of the first ``seen`` points, ``(*batch,)``.
        seen: number of points whose diameter is known.

    Returns:
        Before each of the positions seen, ..., n - 1 and after the last, ``(n - seen + 1, *batch)``. Time
        O((n - seen) n p), or O(n) on a line; memory O(n).
    """
    count, dim = points.shape[-2:]
    if count == seen or not points.numel():
        return known.expand(points.shape[:-2]).unsqueeze(0).repeat(count - seen + 1, *[1] * (points.dim() - 2))
    if dim == 1:
        line = points.squeeze(-1)  # (*batch, n)
        reach = (line.cummax(-1).values - line.cummin(-1).values)[..., seen:]
    else:
        step = max(1, _DISTANCES // (points[..., 0].numel()))
        parts = []
        for begin in range(seen, count, step):
            end = min(begin + step, count)
            # Differences, not the matrix-product form of cdist, whose rounding could make the bound too small.
            rows, columns = points[..., begin:end, :], points[..., :end, :]
            distance = torch.cdist(rows, columns, compute_mode="donot_use_mm_for_euclid_dist")
            parts.append(distance.tril(begin).amax(-1))  # to the points before it, (*batch, end - begin)
        reach = torch.cat(parts, -1)
    reach = reach.movedim(-1, 0)  # (n - seen, *batch)
    return torch.cat([known.expand(reach.shape[1:]).unsqueeze(0), reach]).cummax(0).values
