r"""Attention of many query rows over one set of tokens: the mean of each row and its Jacobian, by matrix products.

The rows are candidates for one token (the starts of a search) or the tokens of a whole stretch (each of which sees only
what lies before it). In the identified products, the token s pulls with :math:`g_s = A^T u_s` and carries
:math:`o_s = C u_s`, and for each head

.. math::
    \mu(u) = \sum_s \alpha_s(u)\, o_s, \qquad
    \frac{\partial \mu}{\partial u} = \sum_s \alpha_s\, o_s g_s^T - \bar o\, \bar g^T, \qquad
    \alpha(u) = \mathrm{softmax}_s(u \cdot g_s) .

With the rows of a head side by side each sum is one product with a matrix of the tokens, where one row at a time would
read the tokens again for each.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["Tokens"]

# |obar| |gbar|, measured from the first token, beyond which the difference of the two moments loses too many digits.
_CANCELLATION = {torch.float32: 1e3, torch.float64: 1e4}
_PRODUCTS = 1 << 24  # numbers that the products o_s g_s^T may take


class Tokens:
    """What the rows attend to.

    Args:
        moved: o_s, (*batch, H, n, p), n >= 1.
        pulled: g_s, (*batch, H, n, p).

    Example:
        >>> o = torch.tensor([[[-1.0], [1.0]]])
        >>> mean, jacobian = Tokens(o, 0.5 * o).mean_and_jacobian(torch.tensor([[0.0], [2.0]]))  # mean = tanh(a u)
        >>> mean.flatten(), jacobian.flatten()
        (tensor([0.0000, 0.7616]), tensor([0.5000, 0.7900]))
    """

    def __init__(self, moved: Tensor, pulled: Tensor) -> None:
        self.moved, self.pulled = moved, pulled

    @cached_property
    def _moments(self) -> Tensor | None:
        """The columns o, g and o g^T, measured from the first token, (*batch, H, n, 2 p + p^2); None: too many."""
        o, g = self._centred
        if o.numel() * o.shape[-1] > _PRODUCTS:
            return None
        return torch.cat([o, g, (o.unsqueeze(-1) * g.unsqueeze(-2)).flatten(-2)], dim=-1)

    @cached_property
    def _centred(self) -> tuple[Tensor, Tensor]:
        # A covariance does not change with the origin, but far from it the difference of two moments loses digits.
        return self.moved - self.moved[..., :1, :], self.pulled - self.pulled[..., :1, :]

    def mean(self, u: Tensor, visible: Tensor | None = None) -> Tensor:
        r"""The attention mean of each row, :math:`\sum_h \sum_s \alpha^h_{rs} o^h_s`.

        Args:
            u: rows, (*batch, R, p).
            visible: which tokens a row sees, boolean (R, n), at least one a row; None: all of them.

        Returns:
            (*batch, R, p). Time O(H R n p); where torch has a fused kernel, no weights are kept.
        """
        heads, length, dim = self.moved.shape[-3:]
        batch = torch.broadcast_shapes(u.shape[:-2], self.moved.shape[:-3])
        count = math.prod(batch)
        query = u.unsqueeze(-3).expand(*batch, heads, *u.shape[-2:]).reshape(count, heads, *u.shape[-2:])
        key, value = (
            part.expand(*batch, heads, length, dim).reshape(count, heads, length, dim)
            for part in (self.pulled, self.moved)
        )
        average = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=1.0)
        return average.sum(-3).view(*batch, *u.shape[-2:])

    def mean_and_jacobian(self, u: Tensor, visible: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The mean of each row, (*batch, R, p), and its block J = I - dmu/du, (*batch, R, p, p).

        Args:
            u: rows, (*batch, R, p).
            visible: which tokens a row sees, boolean (R, n), at least one a row; None: all of them.

        Returns:
            Both. Time O(H R n p^2), memory O(H n (R + p^2)).
        """
        rows, dim = u.shape[-2:]
        logits = u.unsqueeze(-3) @ self.pulled.mT  # (*batch, H, R, n)
        if visible is not None:
            logits = logits.masked_fill_(~visible, torch.finfo(u.dtype).min)
        weights = torch.softmax(logits, dim=-1)
        moments = self._moments if rows >= dim else None
        if moments is not None:
            far, pull, second = (weights @ moments).split([dim, dim, dim * dim], dim=-1)
            second = second.unflatten(-1, (dim, dim))
        else:  # few rows, or tokens too wide for all their products at once
            o, g = self._centred
            far, pull = weights @ o, weights @ g
            weighted = (weights.unsqueeze(-2) * o.mT.unsqueeze(-3)).flatten(-3, -2)  # (*batch, H, R p, n)
            second = (weighted @ g).unflatten(-2, (rows, dim))
        change = second - far.unsqueeze(-1) * pull.unsqueeze(-2)
        size = torch.linalg.vector_norm(far, dim=-1) * torch.linalg.vector_norm(pull, dim=-1)
        if bool((size > _CANCELLATION[u.dtype]).any()):
            o, g = (part.unsqueeze(-3) for part in self._centred)  # (*batch, H, 1, n, p)
            change = (weights.unsqueeze(-1) * (o - far.unsqueeze(-2))).mT @ (g - pull.unsqueeze(-2))
        mean = (far + self.moved[..., :1, :]).sum(-3)
        return mean, torch.eye(dim, dtype=u.dtype, device=u.device) - change.sum(-4)
