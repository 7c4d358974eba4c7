"""Attention prior on input embeddings: a stage of its own, whose log-density or barrier regularises the table."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from probattn import blocks
from probattn.attention import CausalAttention
from probattn.barrier import BarrierKind, penalty_and_margin, require_penalty
from probattn.errors import InputError, require_at_least, require_choice, require_positive, require_tensor
from probattn.interface import Mask, require_mask
from probattn.penalty import Penalty, attention_penalty

__all__ = ["AttentionStage", "Prior"]

Prior = Literal["full", "margin"]


class AttentionStage(nn.Module):
    r"""An attention of its own on the input embeddings, whose density is their prior (theory, section 6).

    .. math:: \lambda \sum_i b_i \quad\text{or}\quad
        \lambda \sum_i [ \tfrac12 |e_i|^2 / \sigma^2 + \tfrac p2 \log 2\pi\sigma^2 + b_i ]

    with the attention of W_V = W_O = I and free W_Q, W_K. Table embeddings of discrete tokens have no density on R^p:
    the prior acts as a regulariser.

    Args:
        dim: p.
        heads: H.
        rank: r.
        mask: "strict" or "inclusive".
        prior: "margin" (the penalty alone) or "full" (with the Gaussian term).
        noise_scale: sigma of the full prior.
        normalise: divide the embeddings of a sequence by their root mean square first, so that scaling them does not
            change the penalty.
        memory_radius: radius rho of the ball that keys and values see embeddings on; None leaves them as they are.
        contraction: limit kappa in (0, 1) of the contraction, needs a radius: the penalty then has a floor for all
            embeddings and parameters (theory, section 11). None sets no limit.

    Example:
        >>> stage = AttentionStage(4, rank=2)
        >>> stage.penalty(torch.randn(3, 5, 4), "one_sided").values.shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        rank: int = 8,
        *,
        mask: Mask = "strict",
        prior: Prior = "margin",
        noise_scale: float = 1.0,
        normalise: bool = False,
        memory_radius: float | None = None,
        contraction: float | None = None,
    ) -> None:
        super().__init__()
        require_mask(mask)
        require_choice("prior", prior, get_args(Prior))
        for name, size in (("dim", dim), ("heads", heads), ("rank", rank)):
            require_at_least(name, size)
        require_positive("noise_scale", noise_scale)
        self.memory_radius, self.contraction = memory_radius, contraction
        self.mask, self.prior, self.noise_scale, self.normalise = mask, prior, noise_scale, normalise
        self.query = nn.Parameter(torch.randn(heads, rank, dim) / dim**0.5)
        self.key = nn.Parameter(torch.randn(heads, rank, dim) / dim**0.5)
        self.attention()  # refuses a radius or a contraction that cannot be used

    def attention(self) -> CausalAttention:
        """Return the attention as a value, which does not follow the parameters through an optimiser's step."""
        free = CausalAttention(
            self.query, self.key, mask=self.mask, memory_radius=self.memory_radius, validate_args=False
        )
        return free if self.contraction is None else free.scaled_to(self.contraction, shrink=True)

    def penalty(
        self,
        u: Tensor,
        kind: BarrierKind = "one_sided",
        *,
        positions: Tensor | None = None,
        share: float = 1.0,
        padding: Tensor | None = None,
        sharpness: float = 10.0,
    ) -> Penalty:
        """Compute the penalty of embeddings.

        Args:
            u: (batch, T, p).
            kind: see :func:`~probattn.barrier.log_barrier`.
            positions: indices of the positions to evaluate, rising, (P,); None: a random share of them. The inclusive
                mask and the full prior evaluate all positions.
            share: part of the positions, in (0, 1], drawn anew in each call.
            padding: False on padding, (batch, T), which then is not seen either.
            sharpness: beta of the ``smooth`` kind.

        Returns:
            A :class:`Penalty`; its values hold the Gaussian term of the full prior.
        """
        require_penalty(kind, sharpness)
        require_tensor("u", u)
        with torch.autocast(u.device.type, enabled=False):
            u = u.to(torch.promote_types(u.dtype, self.query.dtype))
            if self.normalise:
                u = u / _root_mean_square(u, padding)
            if self.mask == "inclusive" or (self.prior == "full" and padding is None):
                return self._exact(u, kind, padding, sharpness)
            if self.prior == "full":
                raise InputError("the full prior needs sequences without padding; use prior='margin', or pack them.")
            attention = self.attention()
            seen = attention.remember(u).unsqueeze(1)  # (batch, 1, T, p)
            query, key = u.unsqueeze(1) @ attention.query.mT, seen @ attention.key.mT  # (batch, H, T, r)
            value = seen.expand(-1, query.shape[1], -1, -1)  # W_V = I, (batch, H, T, p)
            eye = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
            return attention_penalty(
                query,
                key,
                value,
                eye.repeat(1, query.shape[1]),  # (p, H p)
                attention.query.flatten(0, 1),  # (H r, p)
                kind=kind,
                causal="strict",
                mask=None if padding is None else padding.bool()[:, None, None].expand(-1, 1, u.shape[1], -1),
                padding=padding,
                positions=positions,
                share=share,
                sharpness=sharpness,
            )

    def _exact(self, u: Tensor, kind: BarrierKind, padding: Tensor | None, sharpness: float) -> Penalty:
        if padding is not None and not bool(padding.all()):
            raise InputError("the inclusive mask of the stage needs sequences without padding; use mask='strict'.")
        attention = self.attention()
        evaluation = attention.mean_and_factors(u)
        matrix = (blocks.mean_jacobian if kind == "singular_value" else blocks.sylvester_core)(evaluation.factors)
        values, margins = penalty_and_margin(matrix, attention.dim, kind, sharpness)  # (batch, T)
        if self.prior == "full":
            constant = u.shape[-1] * (math.log(2 * math.pi) / 2 + math.log(self.noise_scale))
            values = values + (u - evaluation.mean).square().sum(-1) / (2 * self.noise_scale**2) + constant
        valid = torch.ones(u.shape[:2], dtype=torch.bool, device=u.device)
        where = torch.arange(u.shape[1], device=u.device)
        return Penalty(values, margins.detach(), where, valid, u.shape[1], valid.sum())


def _root_mean_square(u: Tensor, padding: Tensor | None) -> Tensor:
    """Root mean square of the tokens of each sequence, (batch, 1, 1); 1 for a sequence of padding only."""
    square = u.square().mean(-1, keepdim=True)  # (batch, T, 1)
    if padding is None:
        return square.mean(-2, keepdim=True).sqrt()
    kept = padding.bool().unsqueeze(-1)
    count = kept.sum(-2, keepdim=True)
    mean = square.where(kept, 0.0).sum(-2, keepdim=True) / count.clamp(min=1)
    return mean.where(count > 0, 1.0).sqrt()
