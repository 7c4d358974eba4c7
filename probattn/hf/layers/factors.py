r"""The blocks M_i = dmu_i/du_i of a transformer's attention sublayer, in factors.

.. math::
    M_i = O'_i \bigl[\, c\, C^h_i Q'^h_i + \alpha^h_{ii} V'^h_i
          + c\, \alpha^h_{ii} \sigma^h_{ii} (v^h_i - \bar v^h_i)\, q_i^{hT} K'^h_i \,\bigr]_h

with the token-wise Jacobians :math:`Q'_i = R_i N_q' W_Q N'`, :math:`K'_i = R_i N_k' W_K N'`, :math:`V'_i = W_V N'` and
:math:`O'_i = N_o' W_O`. Rotation and norm of a query act on rows of the covariance, so that the three maps of the heads
stay what they are for every token:

.. math:: M_i = O'_i\, B_i\, N'_i, \qquad B^h_i = \tilde C^h_i W_Q^h + \alpha^h_{ii} W_V^h + a^h_i (b^h_i W_K^h) .

The core :math:`K_i = B_i N'_i O'_i` of size H dv has the same determinant det(I - K_i) and the same non-zero
eigenvalues (Sylvester). As the norms are diagonal but for one or two directions each, :math:`W N'_i O'_i` is a matrix
G = W diag(g g_o) W_O of the layer, times a number, less a matrix of low rank. Derived here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probattn.hf.layers.past import Attended
from probattn.hf.layers.sublayer import Projected, Sublayer
from probattn.hf.layers.tokenwise import NormJacobian

__all__ = ["LayerFactors", "build_factors", "to_heads"]


class LayerFactors(NamedTuple):
    """The blocks M at N tokens, in factors.

    Attributes:
        covariance: C~, the covariance of values and keys carried back through the rotation and the norm of the query,
            ``(N, H, dv, r)``.
        own_weight: alpha_ii, ``(N, H)``.
        own_value: a, ``(N, H, dv)``.
        own_key: b, the token's query carried back through the rotation and the norm of its key, ``(N, H, r)``.
        query: W_Q, ``(H, r, p)``.
        key: W_K, ``(K, r, p)``.
        value: W_V, ``(K, dv, p)``.
        output: W_O, ``(p, H, dv)``.
        norm: N', the norm in front, of N tokens; None: there is none.
        output_norm: N_o', the norm behind; None: there is none.
        tokens: axes of the N tokens, ``(*batch, P)``.
    """

    covariance: Tensor
    own_weight: Tensor
    own_value: Tensor
    own_key: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    norm: NormJacobian | None
    output_norm: NormJacobian | None
    tokens: torch.Size

    @property
    def size(self) -> int:
        """H dv, the number of features that the heads give together."""
        return self.output.shape[1] * self.output.shape[2]

    def mean_jacobian(self) -> Tensor:
        """Multiply the factors out: M, ``(*batch, P, p, p)``. Time O(p^2 H dv) per token."""
        covariance = self.covariance.permute(1, 2, 0, 3)  # (H, dv, N, r)
        inner = (covariance.flatten(1, 2) @ self.query).unflatten(1, covariance.shape[1:3])  # B, (H, dv, N, p)
        group = self.output.shape[1] // len(self.key)
        values = self.value.repeat_interleave(group, 0).unsqueeze(2)  # (H, dv, 1, p)
        inner.addcmul_(self.own_weight.mT[:, None, :, None], values)
        keys = self.own_key.movedim(1, 0) @ self.key.repeat_interleave(group, 0)  # b W_K, (H, N, p)
        inner.addcmul_(self.own_value.permute(1, 2, 0).unsqueeze(-1), keys.unsqueeze(1))
        change = self.output.flatten(1) @ inner.flatten(0, 1).flatten(1)  # W_O B, (p, N p)
        change = change.unflatten(1, (-1, len(self.output))).movedim(1, 0).contiguous()  # (N, p, p)
        change = change if self.norm is None else self.norm.pullback(change)
        change = change if self.output_norm is None else self.output_norm.pushforward(change)
        return _unfolded(change, self.tokens)

    def sylvester_core(self) -> Tensor:
        """The smallest matrix with the determinant det(I - K) = det(I - M) and the non-zero eigenvalues of M.

        Returns:
            K, ``(*batch, P, m, m)``, m = min(p, H dv). Time O(m^2 r) per token where the heads are fewer than the
            features, else as :meth:`mean_jacobian`.
        """
        return self.head_core() if self.size <= len(self.output) else self.mean_jacobian()

    def head_core(self) -> Tensor:
        """K = B N' O', ``(*batch, P, H dv, H dv)``, in the heads' features side by side.

        Time O((H dv)^2 r) per token.
        """
        scale, carried, lefts, right = self.between()
        group = self.output.shape[1] // len(self.key)
        covariance = (scale[:, None, None, None] * self.covariance).movedim(1, 0)  # (H, N, dv, r)
        core = (covariance.flatten(1, 2) @ (self.query @ carried)).unflatten(1, covariance.shape[1:3])  # (H, N, dv, m)
        weight = (scale.unsqueeze(-1) * self.own_weight).mT[..., None, None]  # (H, N, 1, 1)
        core.addcmul_(weight, (self.value @ carried).repeat_interleave(group, 0).unsqueeze(1))
        # What is left, a and b W_K of rank one and the norms' share, is one product of few columns.
        own_value = (scale[:, None, None] * self.own_value).movedim(1, 0).unsqueeze(-1)  # (H, N, dv, 1)
        own_key = self.own_key.movedim(1, 0) @ (self.key @ carried).repeat_interleave(group, 0)  # (H, N, m)
        left = self._apply_heads(-scale[:, None, None] * lefts).movedim(1, 0)  # (H, N, dv, e)
        columns = torch.cat([own_value, left], -1)
        rows = torch.cat([own_key.unsqueeze(-2), right.expand(len(core), *right.shape)], -2)  # (H, N, 1 + e, m)
        core.view(-1, *core.shape[2:]).baddbmm_(columns.flatten(0, 1), rows.flatten(0, 1))
        return _unfolded(core.movedim(0, 1).flatten(1, 2), self.tokens)

    def between(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take N' N_o' W_O = s (A - L^T R) apart.

        Returns:
            s, ``(N,)``; A, which belongs to the layer, ``(p, m)``; L, ``(N, e, p)``, and R, ``(N, e, m)``, with one row
            for each direction that a norm takes away.
        """
        scale, carried = self.own_weight.new_ones(len(self.own_weight)), self.output.flatten(1)
        left, right = carried.new_empty(len(scale), 0, len(carried)), carried.new_empty(len(scale), 0, self.size)
        for norm in (self.output_norm, self.norm):  # from the right to the left
            if norm is None:
                continue
            directions = norm.directions.mT  # E^T, (N, e, p)
            away = directions @ carried - (directions @ left.mT) @ right  # E^T (A - L^T R)
            left, right = torch.cat([left, directions], 1), torch.cat([right, away], 1)
            scale = scale * norm.scale
            if norm.gain is not None:
                left, carried = left * norm.gain, norm.gain.unsqueeze(-1) * carried
        return scale, carried, left, right

    def product(self, columns: Tensor) -> Tensor:
        """M A without forming M.

        Args:
            columns: A, ``(*batch, P, p, n)``.

        Returns:
            ``(*batch, P, p, n)``. Time O(H r (p + dv) n) per token.
        """
        return self.to_stream(self.to_heads(columns))

    def to_heads(self, columns: Tensor) -> Tensor:
        """B N' A, a change of the heads' averages, ``(*batch, P, H dv, n)``, from columns A, ``(*batch, P, p, n)``."""
        columns = columns.flatten(0, -3)
        columns = columns if self.norm is None else self.norm.pushforward(columns)
        return _unfolded(self._apply_heads(columns.mT).flatten(1, 2), self.tokens)

    def to_stream(self, columns: Tensor) -> Tensor:
        """O' A, the change of mu, ``(*batch, P, p, n)``, from changes A of the averages, ``(*batch, P, H dv, n)``."""
        columns = columns.flatten(0, -3)
        stream = (columns.mT @ self.output.flatten(1).mT).mT
        stream = stream if self.output_norm is None else self.output_norm.pushforward(stream)
        return _unfolded(stream, self.tokens)

    def transposed_product(self, columns: Tensor) -> Tensor:
        """M^T A without forming M, shapes and time as in :meth:`product`."""
        return self.to_heads_transposed(self.to_stream_transposed(columns))

    def to_stream_transposed(self, columns: Tensor) -> Tensor:
        """O'^T A, ``(*batch, P, H dv, n)``, from columns A, ``(*batch, P, p, n)``."""
        rows = columns.flatten(0, -3).mT  # (N, n, p)
        rows = rows if self.output_norm is None else self.output_norm.pullback(rows)
        return _unfolded((rows @ self.output.flatten(1)).mT, self.tokens)

    def to_heads_transposed(self, columns: Tensor) -> Tensor:
        """N'^T B^T A, ``(*batch, P, p, n)``, from columns A, ``(*batch, P, H dv, n)``."""
        heads = columns.flatten(0, -3).unflatten(1, self.output.shape[1:]).mT  # (N, H, n, dv)
        groups = (len(self.key), -1)
        result = _from_heads(heads @ self.covariance, self.query)
        shared = (heads * self.own_weight[..., None, None]).unflatten(1, groups).sum(2)  # (N, K, n, dv)
        pulled = (heads @ self.own_value.unsqueeze(-1)) * self.own_key.unsqueeze(-2)  # (N, H, n, r)
        result = result + _from_heads(shared, self.value) + _from_heads(pulled.unflatten(1, groups).sum(2), self.key)
        result = result if self.norm is None else self.norm.pullback(result)
        return _unfolded(result.mT, self.tokens)

    def identity_less_core(self, sign: int = 1) -> Tensor:
        """I - s K for the core K of the heads' features, without derivatives and in half the traffic of memory.

        Args:
            sign: s, 1 or -1.

        Returns:
            ``(N, H dv, H dv)``, all tokens in one axis. Time O((H dv)^2 r) per token.
        """
        scale, carried, lefts, right = self.between()
        heads, size = self.output.shape[1:]
        group = heads // len(self.key)
        weights = (-sign * scale).unsqueeze(-1) * self.own_weight  # (N, H)
        covariance = scale[:, None, None, None] * self.covariance
        query, key, value = (part @ carried for part in (self.query, self.key, self.value))
        # The slope by the own key and the norms' share are one product of few columns.
        left = self._apply_heads(-scale[:, None, None] * lefts)  # (N, H, dv, e)
        columns = torch.cat([(scale[:, None, None] * self.own_value).unsqueeze(-1), left], -1)  # (N, H, dv, 1 + e)
        own_key = self.own_key.movedim(1, 0) @ key.repeat_interleave(group, 0)  # (H, N, m)
        rows = torch.cat([own_key.movedim(0, 1).unsqueeze(2), right.unsqueeze(1).expand(-1, heads, -1, -1)], 2)
        whole = carried.new_empty(len(scale), heads, size, self.size)
        if whole.device.type == "cpu":  # one part after the other, which the cache holds
            for token, shares in enumerate(weights.tolist()):
                for head, weight in enumerate(shares):
                    part = whole[token, head]
                    left_factor, right_factor = covariance[token, head], query[head]
                    torch.addmm(value[head // group], left_factor, right_factor, beta=weight, alpha=-sign, out=part)
                    part.addmm_(columns[token, head], rows[token, head], alpha=-sign)
        else:
            for head in range(heads):
                part = whole[:, head]  # (N, dv, m)
                torch.mul(weights[:, head, None, None], value[head // group], out=part)
                part.baddbmm_(covariance[:, head], query[head].expand(len(scale), -1, -1), alpha=-sign)
                part.baddbmm_(columns[:, head], rows[:, head], alpha=-sign)
        whole = whole.flatten(1, 2)
        whole.diagonal(dim1=-2, dim2=-1).add_(1.0)
        return whole

    def of_tokens(self, index: Tensor) -> LayerFactors:
        """The factors at some of the N tokens, ``(n,)`` numbers, with tokens of shape ``(n,)``."""

        def norm(part: NormJacobian | None) -> NormJacobian | None:
            return None if part is None else part._replace(scale=part.scale[index], directions=part.directions[index])

        return self._replace(
            covariance=self.covariance[index],
            own_weight=self.own_weight[index],
            own_value=self.own_value[index],
            own_key=self.own_key[index],
            norm=norm(self.norm),
            output_norm=norm(self.output_norm),
            tokens=torch.Size([len(index)]),
        )

    def _apply_heads(self, rows: Tensor) -> Tensor:
        """B A, ``(N, H, dv, n)``, for the columns of A given as rows, ``(N, n, p)``."""
        result = self.covariance @ to_heads(rows, self.query)
        group = self.output.shape[1] // len(self.key)
        values = to_heads(rows, self.value).repeat_interleave(group, 1)  # (N, H, dv, n)
        result = result + self.own_weight[..., None, None] * values
        keys = to_heads(rows, self.key).repeat_interleave(group, 1)  # (N, H, r, n)
        return result + self.own_value.unsqueeze(-1) * (self.own_key.unsqueeze(-2) @ keys)


def build_factors(
    sublayer: Sublayer, u: Tensor, tokens: Projected, attended: Attended, before: Tensor, rows: Tensor
) -> LayerFactors:
    """Factor the blocks at some positions.

    Args:
        sublayer: the parameters.
        u: tokens of the whole sequence, ``(B, T, p)``.
        tokens: their queries, keys and values.
        attended: derivatives of the averages at the positions.
        before: what the norm behind was given there, ``(B, P, p)``.
        rows: the positions, ``(P,)``.

    Returns:
        The factors, with tokens of shape ``(B, P)``.
    """
    covariance, back = attended.covariance, tokens.query[:, :, rows]  # (B, P, H, dv, r) and (B, K, P, g, r)
    if tokens.rotation is not None:
        rotation = tokens.rotation.at(rows)
        covariance = rotation.unsqueeze(2, 2).transposed(covariance)
        back = rotation.unsqueeze(1, 3).transposed(back)
    if sublayer.query_norm is not None:
        raw = tokens.raw_query[:, :, rows].movedim(2, 1).flatten(2, 3)  # (B, P, H, r)
        covariance = sublayer.query_norm.jacobian(raw).pullback(covariance)
    own_weight, own_slope = attended.own_weight, attended.own_slope
    if sublayer.scaling is not None:  # own_slope has the inverse temperature already, from the query
        scaling = sublayer.scaling.repeat(len(u))
        strength, factor = scaling.strength.unsqueeze(1), scaling.inverse_temperature.unsqueeze(1)  # (1 or B, 1, H)
        covariance = (strength * factor)[..., None, None] * covariance
        own_weight, own_slope = strength * own_weight, strength.unsqueeze(-1) * own_slope
    back = back.movedim(2, 1)  # (B, P, K, g, r)
    if sublayer.key_norm is not None:
        back = sublayer.key_norm.jacobian(tokens.raw_key[:, :, rows].movedim(2, 1)).pullback(back)
    return LayerFactors(
        covariance.flatten(0, 1),
        own_weight.flatten(0, 1),
        own_slope.flatten(0, 1),
        back.flatten(2, 3).flatten(0, 1),
        sublayer.query.weight,
        sublayer.key.weight,
        sublayer.value.weight,
        sublayer.output,
        None if sublayer.norm is None else sublayer.norm.jacobian(u[:, rows].flatten(0, 1)),
        None if sublayer.output_norm is None else sublayer.output_norm.jacobian(before.flatten(0, 1)),
        before.shape[:2],
    )


def _unfolded(part: Tensor, tokens: torch.Size) -> Tensor:
    """Give the axes of the tokens back."""
    return part.reshape(*tokens, *part.shape[1:])


def to_heads(rows: Tensor, weight: Tensor) -> Tensor:
    """W x for each head, ``(N, heads, r, n)``, from rows x, ``(N, n, p)``, in one product."""
    heads: Tensor = (rows @ weight.flatten(0, 1).mT).unflatten(-1, weight.shape[:2]).permute(0, 2, 3, 1)
    return heads


def _from_heads(heads: Tensor, weight: Tensor) -> Tensor:
    """Sum over heads of x W, ``(N, n, p)``, from rows x, ``(N, heads, n, r)``."""
    summed: Tensor = heads.transpose(1, 2).flatten(2) @ weight.flatten(0, 1)
    return summed
