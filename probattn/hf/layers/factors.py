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

__all__ = ["LayerFactors", "build_factors"]


class LayerFactors(NamedTuple):
    """The blocks M at some tokens, in factors.

    Attributes:
        covariance: C~, the covariance of values and keys carried back through the rotation and the norm of the query,
            (*tokens, H, dv, r).
        own_weight: alpha_ii, (*tokens, H).
        own_value: a, (*tokens, H, dv).
        own_key: b, the token's query carried back through the rotation and the norm of its key, (*tokens, H, r).
        query: W_Q, (H, r, p).
        key: W_K, (K, r, p).
        value: W_V, (K, dv, p).
        output: W_O, (p, H, dv).
        norm: N', the norm in front; None: there is none.
        output_norm: N_o', the norm behind; None: there is none.
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

    @property
    def size(self) -> int:
        """H dv, the number of features that the heads give together."""
        return self.output.shape[1] * self.output.shape[2]

    def mean_jacobian(self) -> Tensor:
        """Multiply the factors out: M, (*tokens, p, p). Time O(p^2 H dv) per token."""
        return self._to_stream(self._inner())

    def sylvester_core(self) -> Tensor:
        """The smallest matrix with the determinant det(I - K) = det(I - M) and the non-zero eigenvalues of M.

        Returns:
            K, (*tokens, m, m), m = min(p, H dv). Time O(m^2 r) per token where the heads are fewer than the features,
            else as :meth:`mean_jacobian`.
        """
        return self.head_core() if self.size <= self.output.shape[0] else self.mean_jacobian()

    def head_core(self) -> Tensor:
        """K = B N' O', (*tokens, H dv, H dv), in the heads' features side by side. Time O((H dv)^2 r) per token."""
        output = self.output.flatten(1)  # W_O, (p, m)
        carried = output if self.output_norm is None else _scale_rows(self.output_norm.gain, output)
        # What the norms take away is a product of p x e and e x m: N' N_o' W_O = s s_o (diag(g g_o) W_O - left right).
        lefts, rights, scale = [], [], None
        if self.output_norm is not None:
            directions = self.output_norm.directions  # F, (*tokens, p, f)
            onto = directions.mT @ output  # (*tokens, f, m)
            lefts.append(_scale_rows(self.output_norm.gain, directions))
            rights.append(onto)
            scale = self.output_norm.scale
        if self.norm is not None:
            directions = self.norm.directions  # E, (*tokens, p, e)
            onto = directions.mT @ carried  # (*tokens, e, m)
            if self.output_norm is not None:
                onto = onto - (directions.mT @ lefts[0]) @ rights[0]
            lefts.append(directions)
            rights.append(onto)
            scale = self.norm.scale if scale is None else scale * self.norm.scale
        gain = None if self.norm is None else self.norm.gain
        core = self._apply_heads(_scale_rows(gain, carried)).flatten(-3, -2)
        if lefts:
            left = _scale_rows(gain, torch.cat(lefts, -1))  # (*tokens, p, e + f)
            core = core - self._apply_heads(left).flatten(-3, -2) @ torch.cat(rights, -2)
        return core if scale is None else scale[..., None, None] * core

    def product(self, columns: Tensor) -> Tensor:
        """M A without forming M.

        Args:
            columns: A, (*tokens, p, n).

        Returns:
            (*tokens, p, n). Time O(H r (p + dv) n) per token.
        """
        return self._to_stream(self.to_heads(columns))

    def to_heads(self, columns: Tensor) -> Tensor:
        """B N' A, the change of the heads' averages: (*tokens, H dv, n) from columns (*tokens, p, n)."""
        columns = columns if self.norm is None else self.norm.pushforward(columns)
        return self._apply_heads(columns).flatten(-3, -2)

    def to_stream(self, columns: Tensor) -> Tensor:
        """O' A, what a change of the heads' averages does to mu: (*tokens, p, n) from columns (*tokens, H dv, n)."""
        return self._to_stream(columns)

    def transposed_product(self, columns: Tensor) -> Tensor:
        """M^T A without forming M, shapes as in :meth:`product`."""
        rows = columns.mT  # (*tokens, n, p)
        rows = rows if self.output_norm is None else self.output_norm.pullback(rows)
        rows = rows @ self.output.flatten(1)  # (*tokens, n, m)
        heads = rows.unflatten(-1, self.output.shape[1:]).movedim(-2, -3)  # (*tokens, H, n, dv)
        result = ((heads @ self.covariance) @ self.query).sum(-3)
        shared = (heads * self.own_weight[..., None, None]).unflatten(-3, (len(self.value), -1)).sum(-3)
        result = result + (shared @ self.value).sum(-3)
        pulled = (heads @ self.own_value.unsqueeze(-1)) * self.own_key.unsqueeze(-2)  # (*tokens, H, n, r)
        result = result + (pulled.unflatten(-3, (len(self.key), -1)).sum(-3) @ self.key).sum(-3)
        result = result if self.norm is None else self.norm.pullback(result)
        return result.mT

    def unfold(self, batch: torch.Size) -> LayerFactors:
        """The same with the first axis of the tokens unfolded into batch axes; the parameters have none."""

        def unfolded(part: Tensor) -> Tensor:
            return part.reshape(*batch, *part.shape[1:])

        def norm(part: NormJacobian | None) -> NormJacobian | None:
            if part is None:
                return None
            return part._replace(scale=unfolded(part.scale), directions=unfolded(part.directions))

        return self._replace(
            covariance=unfolded(self.covariance),
            own_weight=unfolded(self.own_weight),
            own_value=unfolded(self.own_value),
            own_key=unfolded(self.own_key),
            norm=norm(self.norm),
            output_norm=norm(self.output_norm),
        )

    def _inner(self) -> Tensor:
        """B N', (*tokens, H dv, p)."""
        group = self.output.shape[1] // len(self.key)
        inner = self.covariance @ self.query  # (*tokens, H, dv, p)
        inner = inner + self.own_weight[..., None, None] * self.value.repeat_interleave(group, 0)
        pull = self.own_key.unsqueeze(-2) @ self.key.repeat_interleave(group, 0)  # (*tokens, H, 1, p)
        inner = (inner + self.own_value.unsqueeze(-1) * pull).flatten(-3, -2)
        return inner if self.norm is None else self.norm.pullback(inner)

    def _apply_heads(self, columns: Tensor) -> Tensor:
        """B A, (*tokens, H, dv, n), for columns A, (*tokens, p, n) or (p, n)."""
        columns = columns.unsqueeze(-3)  # (*tokens, 1, p, n)
        group = self.output.shape[1] // len(self.key)
        result = self.covariance @ (self.query @ columns)
        values = (self.value @ columns).repeat_interleave(group, -3)  # (*tokens, H, dv, n)
        result = result + self.own_weight[..., None, None] * values
        keys = (self.key @ columns).repeat_interleave(group, -3)  # (*tokens, H, r, n)
        return result + self.own_value.unsqueeze(-1) * (self.own_key.unsqueeze(-2) @ keys)

    def _to_stream(self, columns: Tensor) -> Tensor:
        stream = self.output.flatten(1) @ columns
        return stream if self.output_norm is None else self.output_norm.pushforward(stream)


def build_factors(
    sublayer: Sublayer, u: Tensor, tokens: Projected, attended: Attended, before: Tensor, rows: Tensor
) -> LayerFactors:
    """Factor the blocks at some positions.

    Args:
        sublayer: the parameters.
        u: tokens of the whole sequence, (B, T, p).
        tokens: their queries, keys and values.
        attended: derivatives of the averages at the positions.
        before: what the norm behind was given there, (B, P, p).
        rows: the positions, (P,).

    Returns:
        The factors, with tokens of shape (B, P).
    """
    covariance, back = attended.covariance, tokens.query[:, :, rows]  # (B, P, H, dv, r) and (B, K, P, g, r)
    if tokens.rotation is not None:
        rotation = tokens.rotation._make(part[:, rows] for part in tokens.rotation)  # (1 or B, P, d)
        covariance = rotation.unsqueeze(2, 2).transposed(covariance)
        back = rotation.unsqueeze(1, 3).transposed(back)
    if sublayer.query_norm is not None:
        raw = tokens.raw_query[:, :, rows].movedim(2, 1).flatten(2, 3)  # (B, P, H, r)
        covariance = sublayer.query_norm.jacobian(raw).pullback(covariance)
    back = back.movedim(2, 1)  # (B, P, K, g, r)
    if sublayer.key_norm is not None:
        back = sublayer.key_norm.jacobian(tokens.raw_key[:, :, rows].movedim(2, 1)).pullback(back)
    return LayerFactors(
        covariance,
        attended.own_weight,
        attended.own_slope,
        back.flatten(2, 3),
        sublayer.query.weight,
        sublayer.key.weight,
        sublayer.value.weight,
        sublayer.output,
        None if sublayer.norm is None else sublayer.norm.jacobian(u[:, rows]),
        None if sublayer.output_norm is None else sublayer.output_norm.jacobian(before),
    )


def _scale_rows(gain: Tensor | None, matrix: Tensor) -> Tensor:
    return matrix if gain is None else gain.unsqueeze(-1) * matrix
