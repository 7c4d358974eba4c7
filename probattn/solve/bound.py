r"""The contraction bound: an upper bound on |M_i| for every next token, from the diameters of its past."""

from __future__ import annotations

import torch
from torch import Tensor

from probattn.attention import CausalAttention

__all__ = ["contraction_bound", "projection_slack"]


def contraction_bound(attention: CausalAttention, u: Tensor) -> Tensor:
    r"""Upper bound on the norm of M_i for *every* u_i, from the diameters of the past.

    .. math::
        \|M_i\| \le \tfrac14 \sum_h \mathrm{diam}\{W_O^h v_s^h : s < i\}\;
        \mathrm{diam}\{c W_Q^{hT} k_s^h : s < i\}

    since \|Cov(x, y)\| <= D_x D_y / 4. Below one, u_i -> e_i is one-to-one whatever the noise. Never larger than the
    bound that multiplies the norms of W_O and W_Q with the diameters of values and keys, and depends on identified
    products only.

    Args:
        attention: an attention with a strict mask; under the inclusive mask the own value is unbounded and the bound is
            +inf.
        u: tokens, (*batch, T, p).

    Returns:
        (*batch, T), not decreasing along the sequence. Time O(H T^2 p). Derived here.
    """
    if attention.mask == "inclusive":
        batch = torch.broadcast_shapes(attention.batch_shape, u.shape[:-2])
        return torch.full((*batch, u.shape[-2]), torch.inf, dtype=u.dtype, device=u.device)
    tokens = u.unsqueeze(-3)  # (*batch, 1, T, p)
    moved = tokens @ attention.ov_matrix.mT  # W_O v_s, (*batch, H, T, p)
    pulled = tokens @ attention.qk_matrix  # c W_Q^T k_s, (*batch, H, T, p)
    largest = torch.linalg.vector_norm(tokens, dim=-1).cummax(-1).values  # (*batch, 1, T)
    slack_moved, slack_pulled = projection_slack(attention)
    spread_moved = _past_diameter(moved) + slack_moved.unsqueeze(-1) * largest
    spread_pulled = _past_diameter(pulled) + slack_pulled.unsqueeze(-1) * largest
    bound = (spread_moved * spread_pulled).sum(-2) / 4
    return torch.where(torch.arange(u.shape[-2], device=u.device) < 2, torch.zeros_like(bound), bound)


def projection_slack(attention: CausalAttention) -> tuple[Tensor, Tensor]:
    """How much rounding may shorten distances of W_O v_s and c W_Q^T k_s, per unit of the largest token, (*batch, H).

    Distances of tokens that share a large offset keep few digits, and a bound that proves must not be too small.
    """
    unit = 8 * (attention.dim + 1) * torch.finfo(attention.query.dtype).eps
    norms = (torch.linalg.matrix_norm(attention.ov_matrix), torch.linalg.matrix_norm(attention.qk_matrix))
    return unit * norms[0], unit * norms[1]


def _past_diameter(points: Tensor) -> Tensor:
    """Diameter of the points before each one, (*batch, T)."""
    # Differences, not the matrix-product form of cdist: its rounding could make the bound too small.
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").tril()
    upto = distance.amax(-1).cummax(-1).values  # (*batch, T), the token itself included
    return torch.cat([torch.zeros_like(upto[..., :1]), upto[..., :-1]], dim=-1)
