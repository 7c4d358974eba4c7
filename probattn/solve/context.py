r"""One step of the process: the residual map of the next token given a past, at any number of candidate tokens.

Everything is written in the identified products :math:`A_h = c W_K^T W_Q` and :math:`C_h = W_O W_V`, so that head h
attends with the logits :math:`u_i \cdot g_s`, :math:`g_s = A_h^T u_s`, and carries the values :math:`o_s = C_h u_s`;
both are computed once a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.errors import InputError
from probattn.moments.dense import attention_weights
from probattn.solve.bound import projection_slack

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """A past, as the next token sees it.

    Attributes:
        attention: the attention.
        moved: o_s = C u_s, (*batch, H, n, p).
        pulled: g_s = A^T u_s, (*batch, H, n, p).
        spread: diameters of the o_s and of the g_s, (*batch, H) each.
        size: norm of the largest token, (*batch,).
    """

    attention: CausalAttention
    moved: Tensor
    pulled: Tensor
    spread: tuple[Tensor, Tensor]
    size: Tensor

    @classmethod
    def of(cls, attention: CausalAttention, u: Tensor) -> Context:
        """The past u_1..u_n.

        Args:
            attention: the attention.
            u: tokens, (*batch, n, p); n may be 0.

        Raises:
            InputError: if the last axis is not p.
        """
        if u.dim() < 2 or u.shape[-1] != attention.dim:
            raise InputError(
                f"the past has shape {tuple(u.shape)}; it must be (*batch, n, p) with p = {attention.dim}."
            )
        tokens = u.unsqueeze(-3)  # (*batch, 1, n, p)
        moved, pulled = tokens @ attention.ov_matrix.mT, tokens @ attention.qk_matrix
        norm = torch.linalg.vector_norm(u, dim=-1)
        size = norm.amax(-1) if u.shape[-2] else norm.new_zeros(u.shape[:-2])
        return cls(attention, moved, pulled, (_diameter(moved), _diameter(pulled)), size)

    def extend(self, u: Tensor) -> Context:
        """The past with one more token u, (*batch, p); O(H n p), so that a path of T tokens costs O(H T^2 p)."""
        token = u.unsqueeze(-2).unsqueeze(-2)  # (*batch, 1, 1, p)
        moved, pulled = token @ self.attention.ov_matrix.mT, token @ self.attention.qk_matrix
        spread = (_widened(self.spread[0], self.moved, moved), _widened(self.spread[1], self.pulled, pulled))
        size = torch.maximum(self.size, torch.linalg.vector_norm(u, dim=-1))
        return Context(self.attention, _append(self.moved, moved), _append(self.pulled, pulled), spread, size)

    def select(self, index: tuple[Tensor, ...], batch: torch.Size) -> Context:
        """The pasts at some places of the batch that this one expands to, (K,).

        Args:
            index: indices along the axes of ``batch``, (K,) each.
            batch: what the batch axes of this past broadcast to.
        """
        moved, pulled = (part.expand(*batch, *part.shape[-3:])[index] for part in (self.moved, self.pulled))
        spread = (self.spread[0].expand(*batch, -1)[index], self.spread[1].expand(*batch, -1)[index])
        return Context(
            self.attention.expand(batch).select(index), moved, pulled, spread, self.size.expand(batch)[index]
        )

    @property
    def length(self) -> int:
        """n, how many tokens have been seen."""
        return self.moved.shape[-2]

    def mean(self, u: Tensor) -> Tensor:
        """The attention mean mu(past, u), same shape as u: (*candidates, *batch, p)."""
        return self._evaluate(u, jacobian=False)[0]

    def mean_and_jacobian(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, (*candidates, *batch, p), and J = d(u - mu)/du, (*candidates, *batch, p, p), at candidate tokens u.

        Example:
            >>> past = Context.of(CausalAttention.from_qk_matrix(torch.tensor([[0.5]])), torch.tensor([[-1.0], [1.0]]))
            >>> mean, jacobian = past.mean_and_jacobian(torch.tensor([[0.0], [2.0]]))  # mean = tanh(a u)
            >>> mean.flatten(), jacobian.flatten()
            (tensor([0.0000, 0.7616]), tensor([0.5000, 0.7900]))
        """
        return self._evaluate(u, jacobian=True)

    def _evaluate(self, u: Tensor, *, jacobian: bool) -> tuple[Tensor, Tensor]:
        dim = u.shape[-1]
        identity = torch.eye(dim, dtype=u.dtype, device=u.device)
        inclusive = self.attention.mask == "inclusive"
        if self.length == 0 and not inclusive:
            return self.attention.start.expand(u.shape), identity.expand(*u.shape, dim)

        token = u.unsqueeze(-2).unsqueeze(-2)  # (*candidates, *batch, 1, 1, p)
        moved, pulled = self.moved, self.pulled
        if inclusive:
            moved = _append(moved, token @ self.attention.ov_matrix.mT)
            pulled = _append(pulled, token @ self.attention.qk_matrix)
        weights = attention_weights(token, pulled)  # (*candidates, *batch, H, 1, n)
        average = weights @ moved  # (*candidates, *batch, H, 1, p)
        mean = average.squeeze(-2).sum(-2)  # (*candidates, *batch, p)
        if not jacobian:
            return mean, mean.new_empty(0)

        centred = pulled - weights @ pulled  # (*candidates, *batch, H, n, p)
        change = (weights.mT * (moved - average)).mT @ centred  # Cov(o, g), (*candidates, *batch, H, p, p)
        if inclusive:
            attraction = token @ self.attention.qk_matrix.mT  # A u, (*candidates, *batch, H, 1, p)
            own = self.attention.ov_matrix + (moved[..., -1:, :] - average).mT @ attraction
            change = change + weights[..., -1:] * own
        return mean, identity - change.sum(-3)

    def contraction_bound(self) -> Tensor:
        """Upper bound on |dmu/du| for every u, (*batch,); +inf under the inclusive mask."""
        if self.attention.mask == "inclusive":
            return self.moved.new_full(self.moved.shape[:-3], torch.inf)
        if self.length < 2:
            return self.moved.new_zeros(self.moved.shape[:-3])
        slack = (unit * self.size.unsqueeze(-1) for unit in projection_slack(self.attention))
        wide = [spread + extra for spread, extra in zip(self.spread, slack, strict=True)]
        return (wide[0] * wide[1]).sum(-1) / 4


def _append(cached: Tensor, own: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(cached.shape[:-2], own.shape[:-2])
    return torch.cat([cached.expand(*batch, *cached.shape[-2:]), own.expand(*batch, *own.shape[-2:])], dim=-2)


def _diameter(points: Tensor) -> Tensor:
    if points.shape[-2] < 2:
        return points.new_zeros(points.shape[:-2])
    distance = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.amax((-2, -1))  # (*batch, H)


def _widened(diameter: Tensor, cached: Tensor, own: Tensor) -> Tensor:
    if cached.shape[-2] == 0:
        return own.new_zeros(own.shape[:-2])
    return torch.maximum(diameter, torch.linalg.vector_norm(cached - own, dim=-1).amax(-1))
