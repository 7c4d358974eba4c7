r"""The blocks M_i of a layer as linear maps: products with M_i and its transpose from the attention weights alone.

With :math:`A_{is} = c\, \alpha_{is} \sigma_{is}` (sigma the slope of a cap on the logits, else one) and a change z of
the token u_i,

.. math::
    \dot x = N' z, \quad \dot q = Q' \dot x, \quad \dot k = K' \dot x, \quad \dot v = V' \dot x, \qquad
    \dot{\bar v} = \sum_s A_{is} (\dot q \cdot k_s)(v_s - \bar v_i) + A_{ii} (q_i \cdot \dot k)(v_i - \bar v_i)
        + \alpha_{ii} \dot v, \qquad M_i z = O' \dot{\bar v},

so that no covariance is formed. A product takes O(H T (r + dv)) per token beside the maps of the layer, where forming
the covariances takes O(H T r dv). Derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.hf.layers.sublayer import Projected, Sublayer, averages_to_mean, mapped
from probattn.hf.layers.tokenwise import Norm, NormJacobian, Projection, Rotation
from probattn.moments.dense import past_weights

__all__ = ["TokenMap", "token_map"]

_BY_ROW = ("weight", "own_weight", "own_alpha", "away", "average", "query")


class TokenMap(NamedTuple):
    """M at the tokens of some rows of a batch, as a linear map of ``(B, P, n, p)``, n directions per token.

    Attributes:
        sublayer: the parameters.
        weight: A, ``(B, K, P, g, T)``.
        own_weight: A_ii, ``(B, K, P, g)``.
        own_alpha: alpha_ii, ``(B, K, P, g)``.
        away: v_i - vbar_i, ``(B, K, P, g, dv)``.
        average: vbar, ``(B, K, P, g, dv)``.
        query: q_i, rotated, ``(B, K, P, g, r)``.
        key: k, rotated, of all tokens, ``(B, K, T, r)``.
        value: v of all tokens, ``(B, K, T, dv)``.
        rotation: of the rows; None: there is none.
        norm: N', ``(B, P)`` tokens; None: there is none, as for the three that follow.
        query_norm: ``(B, K, P, g)`` tokens.
        key_norm: ``(B, K, P)`` tokens.
        output_norm: N_o', ``(B, P)`` tokens.
    """

    sublayer: Sublayer
    weight: Tensor
    own_weight: Tensor
    own_alpha: Tensor
    away: Tensor
    average: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    rotation: Rotation | None
    norm: NormJacobian | None
    query_norm: NormJacobian | None
    key_norm: NormJacobian | None
    output_norm: NormJacobian | None

    def product(self, z: Tensor) -> Tensor:
        """M z.

        Args:
            z: directions, ``(B, P, n, p)``.

        Returns:
            ``(B, P, n, p)``, differentiable in everything that the layer is made of.
        """
        x = z if self.norm is None else self.norm.pushforward(z.mT).mT
        query, key = self._heads(self.sublayer.query, x), self._heads(self.sublayer.key, x)
        value = self._heads(self.sublayer.value, x)  # (B, K, P, 1, n, dv)
        if self.query_norm is not None:
            query = self.query_norm.pushforward(query.mT).mT
        if self.key_norm is not None:
            key = self.key_norm.pushforward(key.squeeze(3).mT).mT.unsqueeze(3)
        if self.rotation is not None:
            rotation = self.rotation.unsqueeze(1, 3, 3)
            query, key = rotation(query), rotation(key)  # (B, K, P, g, n, r), (B, K, P, 1, n, r)
        change = _all_tokens(query, self.key) * self.weight.unsqueeze(4)  # (B, K, P, g, n, T)
        mean = _all_tokens(change, self.value.mT) - change.sum(-1, keepdim=True) * self.average.unsqueeze(4)
        own = self.own_weight.unsqueeze(-1) * (key * self.query.unsqueeze(4)).sum(-1)  # (B, K, P, g, n)
        mean = mean + own.unsqueeze(-1) * self.away.unsqueeze(4) + self.own_alpha[..., None, None] * value
        stream = _product(mean.permute(0, 2, 4, 1, 3, 5).flatten(3), self.sublayer.output.flatten(1).mT)  # (B, P, n, p)
        return stream if self.output_norm is None else self.output_norm.pushforward(stream.mT).mT

    def transposed_product(self, w: Tensor) -> Tensor:
        """M^T w, shapes as in :meth:`product`."""
        rows = w if self.output_norm is None else self.output_norm.pullback(w)
        heads = _product(rows, self.sublayer.output.flatten(1))
        heads = heads.unflatten(-1, (self.sublayer.groups, -1, self.away.shape[-1]))  # (B, P, n, K, g, dv)
        mean = heads.permute(0, 3, 1, 4, 2, 5)  # (B, K, P, g, n, dv)
        change = _all_tokens(mean, self.value) - (mean * self.average.unsqueeze(4)).sum(-1, keepdim=True)
        query = _all_tokens(change * self.weight.unsqueeze(4), self.key.mT)  # (B, K, P, g, n, r)
        own = self.own_weight.unsqueeze(-1) * (mean * self.away.unsqueeze(4)).sum(-1)  # (B, K, P, g, n)
        key = (own.unsqueeze(-1) * self.query.unsqueeze(4)).sum(3, keepdim=True)  # (B, K, P, 1, n, r)
        value = (self.own_alpha[..., None, None] * mean).sum(3, keepdim=True)
        if self.rotation is not None:
            rotation = self.rotation.unsqueeze(1, 3, 3)
            query, key = rotation.transposed(query), rotation.transposed(key)
        if self.query_norm is not None:
            query = self.query_norm.pullback(query)
        if self.key_norm is not None:
            key = self.key_norm.pullback(key.squeeze(3)).unsqueeze(3)
        maps = ((self.sublayer.query, query), (self.sublayer.key, key), (self.sublayer.value, value))
        x = torch.stack([_from_heads(projection, part) for projection, part in maps]).sum(0)
        return x if self.norm is None else self.norm.pullback(x)

    def at(self, index: Tensor) -> TokenMap:
        """The same map at some of the rows."""

        def taken(norm: NormJacobian | None, axis: int) -> NormJacobian | None:
            if norm is None:
                return None
            scale, directions = (part.index_select(axis, index) for part in (norm.scale, norm.directions))
            return norm._replace(scale=scale, directions=directions)

        parts = {name: getattr(self, name).index_select(2, index) for name in _BY_ROW}
        return self._replace(
            **parts,
            rotation=None if self.rotation is None else self.rotation.at(index),
            norm=taken(self.norm, 1),
            query_norm=taken(self.query_norm, 2),
            key_norm=taken(self.key_norm, 2),
            output_norm=taken(self.output_norm, 1),
        )

    def detach(self) -> TokenMap:
        """The same map cut off from its graph."""
        return mapped(Tensor.detach, self)

    def _heads(self, projection: Projection, x: Tensor) -> Tensor:
        """W x of each head, ``(B, K, P, g, n, r)``, g being 1 for keys and values."""
        heads = _product(x, projection.weight.flatten(0, 1).mT)
        heads = heads.unflatten(-1, (self.sublayer.groups, -1, projection.weight.shape[1]))  # (B, P, n, K, g, r)
        permuted: Tensor = heads.permute(0, 3, 1, 4, 2, 5)
        return permuted


def token_map(sublayer: Sublayer, u: Tensor, tokens: Projected, rows: Tensor, mask: Tensor | None) -> TokenMap:
    """The map M at some rows.

    Args:
        sublayer: the parameters.
        u: tokens of the whole sequence, ``(B, T, p)``.
        tokens: their queries (of the rows alone), keys and values.
        rows: positions, ``(P,)``, increasing.
        mask: tokens that each position sees, ``(1 or B, 1, T, T)`` boolean, instead of the past and the window.

    Returns:
        :class:`TokenMap`, differentiable. Time and memory O(H P T).
    """
    query, key, value = tokens.query, tokens.key, tokens.value
    length, group = key.shape[2], query.shape[3]
    if sublayer.softcap is None:
        # A constant changes neither weights nor products. Keys of language models share a large offset, which would
        # cost digits in what cancels.
        later = key[:, :, 1:] if length > 1 else key
        key = key - later.detach().mean(2, keepdim=True)
    logits = sublayer.scale * query.flatten(2, 3) @ key.mT  # (B, K, P g, T)
    slope: Tensor | float = sublayer.scale
    if sublayer.softcap is not None:
        bent = torch.tanh(logits / sublayer.softcap)
        logits, slope = sublayer.softcap * bent, sublayer.scale * (1 - bent.square())
    first = torch.zeros_like(rows)
    limit = torch.full_like(rows, length) if mask is not None else rows + 1
    if mask is None and sublayer.window is not None:
        first = (rows + 1 - sublayer.window).clamp(min=0)
    alpha, _ = past_weights(logits, first, limit, None if mask is None else mask[:, :, rows])
    weight = (alpha * slope).unflatten(2, (-1, group))  # (B, K, P, g, T)
    average = (alpha @ value).unflatten(2, (-1, group))  # (B, K, P, g, dv)
    place = rows.view(1, 1, -1, 1, 1).expand(*weight.shape[:-1], 1)
    before = averages_to_mean(sublayer, average.movedim(2, 1).flatten(2, 3))[1]  # (B, P, p)

    def jacobian(norm: Norm | None, x: Tensor) -> NormJacobian | None:
        return None if norm is None else norm.jacobian(x)

    return TokenMap(
        sublayer,
        weight,
        weight.gather(-1, place).squeeze(-1),
        alpha.unflatten(2, (-1, group)).gather(-1, place).squeeze(-1),
        value[:, :, rows].unsqueeze(3) - average,
        average,
        query,
        key,
        value,
        None if tokens.rotation is None else tokens.rotation.at(rows),
        jacobian(sublayer.norm, u[:, rows]),
        jacobian(sublayer.query_norm, tokens.raw_query),
        jacobian(sublayer.key_norm, tokens.raw_key[:, :, rows]),
        jacobian(sublayer.output_norm, before),
    )


def _all_tokens(part: Tensor, tokens: Tensor) -> Tensor:
    """Products with vectors of all tokens: ``(B, K, P, g, n, r)`` and ``(B, K, T, r)`` to ``(B, K, P, g, n, T)``."""
    products = part.flatten(2, 4) @ tokens.mT
    found: Tensor = products.unflatten(2, part.shape[2:5])
    return found


def _from_heads(projection: Projection, part: Tensor) -> Tensor:
    """Sum over heads of W^T x, ``(B, P, n, p)``, from x, ``(B, K, P, g, n, r)``."""
    return _product(part.permute(0, 2, 4, 1, 3, 5).flatten(3), projection.weight.flatten(0, 1))


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows times a matrix, ``(B, P, n, .)``, as one product: torch repeats the matrix for rows that do not fold."""
    flat: Tensor = rows.reshape(-1, rows.shape[-1]) @ matrix
    return flat.view(*rows.shape[:-1], matrix.shape[-1])
