r"""The next-token map: mean and Jacobian of a token given its past, at any number of candidates.

In the identified products :math:`A_h = c W_K^T W_Q` and :math:`C_h = W_O W_V` a token s of the past has the key
:math:`g_s = A_h^T u_s` and the value :math:`o_s = C_h u_s`, both computed once per token, and for each head

.. math::
    \alpha(u) = \mathrm{softmax}_s(u \cdot g_s), \qquad \mu(u) = \sum_s \alpha_s o_s, \qquad
    \frac{\partial \mu}{\partial u} = \mathrm{Cov}_\alpha(o, g) = \sum_s \alpha_s\, o_s g_s^T - \bar o\, \bar g^T .

Under the inclusive mask the token has a key and a value of its own, and its share is added in closed form. With a
memory radius keys and values are those of phi(u_s), and under the inclusive mask the token enters as phi(u). The
candidates of a head stand side by side, so that each sum is one matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.errors import InputError
from probattn.interface import Attention
from probattn.solve.bound import bound_from_diameters, memory_bound, projection_slack, running_diameters

__all__ = ["Context", "context_of"]

# |obar| |gbar|, measured from the first token, beyond which the difference of the two moments loses too many digits.
_CANCELLATION = {torch.float32: 1e3, torch.float64: 1e4}
_PRODUCTS = 1 << 24  # numbers that the products o_s g_s^T may take


@dataclass(frozen=True, eq=False)
class Context:
    """Keys and values of a past, and the next-token map that they define.

    Candidates u have the shape ``(*candidates, *batch, p)``. Where ``visible`` is given, the last axis of the
    candidates runs over tokens with pasts of their own.

    Attributes:
        attention: the attention.
        values: o_s = C u_s, ``(*batch, H, n, p)``.
        keys: g_s = A^T u_s, ``(*batch, H, n, p)``.
        tokens: u_s, ``(*batch, n, p)``.
        diameters: of the values and of the keys, ``(*batch, H)`` each.
        largest: norm of the largest token as the memory holds it, ``(*batch,)``.
        ceiling: bound on ``|dmu/du|`` that no further token can raise, ``(*batch,)``; inf without a memory radius.
        visible: tokens of the past that each of m candidates sees, at least one per candidate, boolean (m, n); None:
            all of them.

    Example:
        >>> attention = CausalAttention.from_qk_matrix(torch.tensor([[0.5]]))
        >>> context = Context.of(attention, torch.tensor([[-1.0], [1.0]]))
        >>> mean, jacobian = context.mean_and_jacobian(torch.tensor([[0.0], [2.0]]))  # mean = tanh(a u)
        >>> mean.flatten(), jacobian.flatten()
        (tensor([0.0000, 0.7616]), tensor([0.5000, 0.7900]))
    """

    attention: CausalAttention
    values: Tensor
    keys: Tensor
    tokens: Tensor
    diameters: tuple[Tensor, Tensor]
    largest: Tensor
    ceiling: Tensor
    visible: Tensor | None = None

    @classmethod
    def of(cls, attention: CausalAttention, u: Tensor) -> Context:
        """Build the context of the tokens u_1, ..., u_n.

        Args:
            attention: the attention.
            u: tokens, ``(*batch, n, p)``; n may be 0.

        Raises:
            InputError: if the last axis is not p.
        """
        if u.dim() < 2 or u.shape[-1] != attention.dim:
            raise InputError(
                f"the past has shape {tuple(u.shape)}; it must be (*batch, n, p) with p = {attention.dim}."
            )
        values, keys = _project(attention, u)
        nothing = values.new_zeros(values.shape[:-2])
        diameters = (running_diameters(values, nothing, 0)[-1], running_diameters(keys, nothing, 0)[-1])
        norm = torch.linalg.vector_norm(attention.remember(u), dim=-1)
        largest = norm.amax(-1) if u.shape[-2] else norm.new_zeros(norm.shape[:-1])
        return cls(attention, values, keys, u, diameters, largest, memory_bound(attention))

    def join(self, u: Tensor) -> Context:
        """The context with tokens u, ``(*batch, m, p)``, behind it and the diameters of the past, in O(H m p^2)."""
        values, keys = _project(self.attention, u)
        tokens = _append(self.tokens, u)
        return replace(self, values=_append(self.values, values), keys=_append(self.keys, keys), tokens=tokens)

    def extend(self, u: Tensor) -> Context:
        """The context with one more token u, ``(*batch, p)``. O(H n p)."""
        joined = self.join(u.unsqueeze(-2))
        diameters = (
            running_diameters(joined.values, self.diameters[0], self.length)[-1],
            running_diameters(joined.keys, self.diameters[1], self.length)[-1],
        )
        norm = torch.linalg.vector_norm(self.attention.remember(u.unsqueeze(-2)), dim=-1).squeeze(-1)
        largest = torch.maximum(self.largest, norm)
        return replace(joined, diameters=diameters, largest=largest)

    def first(self, n: int, diameters: tuple[Tensor, Tensor] | None = None, largest: Tensor | None = None) -> Context:
        """The context of the first n tokens; its diameters, if not given, are those of the whole."""
        return replace(
            self,
            values=self.values[..., :n, :],
            keys=self.keys[..., :n, :],
            tokens=self.tokens[..., :n, :],
            diameters=self.diameters if diameters is None else diameters,
            largest=self.largest if largest is None else largest,
            visible=None,
        )

    def select(self, index: tuple[Tensor, ...], batch: torch.Size) -> Context:
        """The contexts at K places of the batch that this one expands to, as one with a batch axis of K.

        Args:
            index: indices along the axes of ``batch``, (K,) each.
            batch: broadcast of the batch axes of this context, after the axis of m candidates where each of these has
                a past of its own.
        """
        visible = self.visible
        if visible is not None:
            visible = visible.flatten(1)[index[0]][:, None, None, :]  # (K, 1, 1, n)
        values, keys = (part.expand(*batch, *part.shape[-3:])[index] for part in (self.values, self.keys))
        diameters = (self.diameters[0].expand(*batch, -1)[index], self.diameters[1].expand(*batch, -1)[index])
        attention = self.attention.expand(batch).select(index)
        tokens = self.tokens.expand(*batch, *self.tokens.shape[-2:])[index]
        largest, ceiling = (part.expand(batch)[index] for part in (self.largest, self.ceiling))
        return Context(attention, values, keys, tokens, diameters, largest, ceiling, visible)

    def to(self, dtype: torch.dtype) -> Context:
        """The same context in another precision."""
        if self.values.dtype == dtype:
            return self
        diameters = self.diameters[0].to(dtype), self.diameters[1].to(dtype)
        attention, largest, ceiling = self.attention.to(dtype), self.largest.to(dtype), self.ceiling.to(dtype)
        values, keys, tokens = self.values.to(dtype), self.keys.to(dtype), self.tokens.to(dtype)
        return Context(attention, values, keys, tokens, diameters, largest, ceiling, self.visible)

    @property
    def length(self) -> int:
        """n, the number of tokens."""
        return self.values.shape[-2]

    @property
    def batch_shape(self) -> torch.Size:
        """Batch axes of the pasts."""
        return self.values.shape[:-3]

    @property
    def on_a_line(self) -> bool:
        """True if tokens are one-dimensional and the mask is strict, so that the exact results on a line apply."""
        return self.values.shape[-1] == 1 and self.attention.mask == "strict"

    def contraction_bound(self) -> Tensor:
        """Upper bound on ``|dmu/du|`` for every u, ``(*batch,)``; +inf under the inclusive mask without a radius."""
        if self.attention.mask == "inclusive":
            return self.ceiling.expand(self.largest.shape)
        if self.length < 2:
            return self.values.new_zeros(self.batch_shape)
        bound = bound_from_diameters(self.diameters, projection_slack(self.attention), self.largest)
        return torch.minimum(bound, self.ceiling)

    def mean(self, u: Tensor) -> Tensor:
        """The attention mean mu(u) of candidates u, ``(*candidates, *batch, p)``. Time O(H n p) per candidate."""
        if self._nothing_seen:
            return self.attention.start.expand(u.shape)
        rows = self._rows(u)
        if self.attention.mask == "strict":
            return self._from_rows(self._fused_mean(rows).sum(-3), u)
        rows = self.attention.remember(rows)
        mean, _, _, log_sum = self._moments(rows, covariance=False)
        return self._from_rows(self._with_own(rows, mean, log_sum)[0].sum(-3), u)

    def mean_and_jacobian(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, ``(*candidates, *batch, p)``, and J = d(u - mu)/du, ``(*candidates, *batch, p, p)``, of candidates u.

        Time O(H n p^2) per candidate, memory O(H n) per candidate and O(H n p^2) once.
        """
        dim = u.shape[-1]
        identity = torch.eye(dim, dtype=u.dtype, device=u.device)
        if self._nothing_seen:
            return self.attention.start.expand(u.shape), identity.expand(*u.shape, dim)
        rows, entry = self._rows(u), None
        if self.attention.mask == "inclusive":
            rows, entry = self.attention.remember(rows), self.attention.remember_jacobian(rows)
        mean, mean_key, change, log_sum = self._moments(rows, covariance=True)
        if self.attention.mask == "inclusive":
            mean, weight, away = self._with_own(rows, mean, log_sum)
            tokens = rows.unsqueeze(-3)
            key = tokens @ self.attention.qk_matrix  # the token's own g, (*batch, H, R, p)
            pull = tokens @ self.attention.qk_matrix.mT  # A u
            own = self.attention.ov_matrix.unsqueeze(-3) + away.unsqueeze(-1) * pull.unsqueeze(-2)
            through = away.unsqueeze(-1) * (key - mean_key).unsqueeze(-2)
            weight = weight.unsqueeze(-1)
            change = (1 - weight) * change + weight * (through + own)
        moved = change.sum(-4)  # (*batch, R, p, p)
        jacobian = identity - (moved if entry is None else moved @ entry)
        return self._from_rows(mean.sum(-3), u), self._from_rows(jacobian, u, axes=2)

    def pull_back(self, u: Tensor, w: Tensor) -> Tensor:
        r"""Gradient of :math:`w \cdot \mu(u)` by the tokens of the past.

        With attention weights alpha it is :math:`\sum_h \alpha_s [C^T w + (o_s - \bar o) \cdot w\; A u]`, times
        :math:`\varphi'(u_s)` with a memory radius.

        Args:
            u: one token, ``(*batch, p)``.
            w: ``(*batch, p)``.

        Returns:
            ``(*batch, n, p)``. Time O(H n p). Derived here.
        """
        attention = self.attention
        rows = u.unsqueeze(-2)  # (*batch, 1, p)
        token = (rows if attention.mask == "strict" else attention.remember(rows)).unsqueeze(-3)  # (*batch, 1, 1, p)
        values, keys = self.values, self.keys
        if attention.mask == "inclusive":
            own = _project(attention, rows)
            values, keys = _append(values, own[0]), _append(keys, own[1])
        weights = torch.softmax(token @ keys.mT, dim=-1)  # (*batch, H, 1, n or n + 1)
        average = weights @ values
        column = w[..., None, :, None]  # (*batch, 1, p, 1)
        carried = (attention.ov_matrix.mT @ column).mT  # C^T w, (*batch, H, 1, p)
        reach = (self.values - average) @ column  # (o_s - obar) . w, (*batch, H, n, 1)
        pull = carried + reach * (token @ attention.qk_matrix.mT)  # (*batch, H, n, p)
        gradient = (weights[..., : self.length].mT * pull).sum(-3)  # by what the memory holds, (*batch, n, p)
        slopes = attention.remember_jacobian(self.tokens)
        return gradient if slopes is None else (slopes @ gradient.unsqueeze(-1)).squeeze(-1)

    def line_cumulants(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For one-dimensional tokens, the means of the heads and the first two derivatives of the mean.

        Args:
            u: candidates, ``(*candidates, *batch, 1)``.

        Returns:
            mu_h and M_h of each head, ``(*candidates, *batch, H)``, and M' = d^2 mu / du^2, ``(*candidates, *batch)``:
            the mixed cumulants of values and keys under the tilted past.
        """
        rows = self._rows(u).unsqueeze(-3)  # (*batch, 1, R, 1)
        weights = torch.softmax(self._hide(rows @ self.keys.mT), dim=-1)  # (*batch, H, R, n)
        mean = weights @ self.values  # (*batch, H, R, 1)
        o, g = self.values.mT - mean, self.keys.mT - weights @ self.keys  # (*batch, H, R, n)
        first, second = (weights * o * g).sum(-1), (weights * o * g.square()).sum(-1)  # (*batch, H, R)
        return (
            self._from_rows(mean.squeeze(-1).movedim(-2, -1), u),
            self._from_rows(first.movedim(-2, -1), u),
            self._from_rows(second.sum(-2).unsqueeze(-1), u).squeeze(-1),
        )

    @property
    def _nothing_seen(self) -> bool:
        return self.length == 0 and self.attention.mask == "strict"

    def _rows(self, u: Tensor) -> Tensor:
        """Candidates ``(*candidates, *batch, p)`` side by side, ``(*batch, R, p)``."""
        axes = max(0, u.dim() - 1 - len(self.batch_shape))
        return u.reshape(math.prod(u.shape[:axes]), *u.shape[axes:]).movedim(0, -2)

    def _from_rows(self, part: Tensor, u: Tensor, axes: int = 1) -> Tensor:
        """The inverse of :meth:`_rows`, for rows with ``axes`` axes of their own."""
        count = max(0, u.dim() - 1 - len(self.batch_shape))
        return part.movedim(-1 - axes, 0).reshape(*u.shape[:count], *part.shape[: -1 - axes], *part.shape[-axes:])

    def _hide(self, logits: Tensor) -> Tensor:
        """Logits, ``(*batch, H, R, n)``, with the lowest number for tokens that a row does not see."""
        if self.visible is None:
            return logits
        visible = self.visible
        if visible.shape[-2] > 1:  # rows are (starts, m), the pasts of the m repeat
            visible = visible.repeat(*[1] * (visible.dim() - 2), logits.shape[-2] // visible.shape[-2], 1)
        return logits.masked_fill(~visible, torch.finfo(logits.dtype).min)

    def _fused_mean(self, rows: Tensor) -> Tensor:
        """Mean of the values under the weights of each head, ``(*batch, H, R, p)``; no weights are kept."""
        heads, length, dim = self.values.shape[-3:]
        batch = torch.broadcast_shapes(rows.shape[:-2], self.batch_shape)
        count = math.prod(batch)
        query = rows.unsqueeze(-3).expand(*batch, heads, *rows.shape[-2:]).reshape(count, heads, *rows.shape[-2:])
        key, value = (
            part.expand(*batch, heads, length, dim).reshape(count, heads, length, dim)
            for part in (self.keys, self.values)
        )
        visible = self.visible
        if visible is not None:
            if visible.shape[-2] > 1:
                visible = visible.repeat(*[1] * (visible.dim() - 2), rows.shape[-2] // visible.shape[-2], 1)
            if visible.dim() > 2:
                visible = visible.expand(*batch, 1, *visible.shape[-2:]).reshape(count, 1, *visible.shape[-2:])
        mean = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=1.0)
        return mean.view(*batch, heads, *rows.shape[-2:])

    def _moments(self, rows: Tensor, *, covariance: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Mean value and key, ``(*batch, H, R, p)``, their covariance (with one more p) and log-sum-exp (without p)."""
        count, dim = rows.shape[-2:]
        logits = self._hide(rows.unsqueeze(-3) @ self.keys.mT)  # (*batch, H, R, n)
        log_sum = torch.logsumexp(logits, dim=-1)
        if self.length == 0:  # only under the inclusive mask, where the own token weighs one
            nothing = logits.new_zeros(*logits.shape[:-1], dim)
            return nothing, nothing, logits.new_zeros(*logits.shape[:-1], dim, dim), log_sum
        weights = torch.softmax(logits, dim=-1)
        first = self.values[..., :1, :], self.keys[..., :1, :]
        # A covariance does not change with the origin, but far from it the difference of two moments loses digits.
        o, g = self._centred
        if not covariance:
            return weights @ o + first[0], weights @ g + first[1], logits.new_empty(0), log_sum
        products = self._products if count >= dim else None
        if products is not None:
            mean, mean_key, second = (weights @ products).split([dim, dim, dim * dim], dim=-1)
            second = second.unflatten(-1, (dim, dim))
        else:  # few rows, or tokens too wide for all their products at once
            mean, mean_key = weights @ o, weights @ g
            weighted = (weights.unsqueeze(-2) * o.mT.unsqueeze(-3)).flatten(-3, -2)  # (*batch, H, R p, n)
            second = (weighted @ g).unflatten(-2, (count, dim))
        change = second - mean.unsqueeze(-1) * mean_key.unsqueeze(-2)
        size = torch.linalg.vector_norm(mean, dim=-1) * torch.linalg.vector_norm(mean_key, dim=-1)
        if bool((size > _CANCELLATION[rows.dtype]).any()):
            away = o.unsqueeze(-3) - mean.unsqueeze(-2)  # (*batch, H, R, n, p)
            change = (weights.unsqueeze(-1) * away).mT @ (g.unsqueeze(-3) - mean_key.unsqueeze(-2))
        return mean + first[0], mean_key + first[1], change, log_sum

    def _with_own(self, rows: Tensor, mean: Tensor, log_sum: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean with the token itself, its weight (with 1 for p), its value less that mean; ``(*batch, H, R, p)``.

        Args:
            rows: candidates as the memory holds them.
            mean: mean value without them.
            log_sum: log-sum-exp without them.
        """
        value, key = _values_and_keys(self.attention, rows)  # (*batch, H, R, p)
        odds = (rows.unsqueeze(-3) * key).sum(-1) - log_sum
        weight, rest = odds.sigmoid().unsqueeze(-1), (-odds).sigmoid().unsqueeze(-1)
        away = rest * (value - mean)
        return value - away, weight, away

    @property
    def _centred(self) -> tuple[Tensor, Tensor]:
        """Values and keys less those of the first token."""
        return self.values - self.values[..., :1, :], self.keys - self.keys[..., :1, :]

    @property
    def _products(self) -> Tensor | None:
        """The columns o, g and o g^T, measured from the first token, ``(*batch, H, n, 2 p + p^2)``; None: too many."""
        if self.values.numel() * self.values.shape[-1] > _PRODUCTS:
            return None
        if self.values.requires_grad or self.keys.requires_grad:
            return self._form_products()
        return self._kept_products

    @cached_property
    def _kept_products(self) -> Tensor:
        return self._form_products()

    def _form_products(self) -> Tensor:
        o, g = self._centred
        return torch.cat([o, g, (o.unsqueeze(-1) * g.unsqueeze(-2)).flatten(-2)], dim=-1)


def context_of(attention: Attention, u: Tensor) -> Context:
    """The context of the tokens u_1, ..., u_n, ``(*batch, n, p)``, under any attention.

    The layer of a transformer brings a next-token map of its own, with the methods of :class:`Context` that solving
    needs.
    """
    if isinstance(attention, CausalAttention):
        return Context.of(attention, u)
    context: Context = cast(Any, attention).context(u)
    return context


def _project(attention: CausalAttention, u: Tensor) -> tuple[Tensor, Tensor]:
    """Values o = C phi(u) and keys g = A^T phi(u) of tokens u, ``(*batch, n, p)``: ``(*batch, H, n, p)`` each."""
    return _values_and_keys(attention, attention.remember(u))


def _values_and_keys(attention: CausalAttention, remembered: Tensor) -> tuple[Tensor, Tensor]:
    tokens = remembered.unsqueeze(-3)  # (*batch, 1, n, p)
    return tokens @ attention.ov_matrix.mT, tokens @ attention.qk_matrix


def _append(cached: Tensor, own: Tensor) -> Tensor:
    batch = torch.broadcast_shapes(cached.shape[:-2], own.shape[:-2])
    return torch.cat([cached.expand(*batch, *cached.shape[-2:]), own.expand(*batch, *own.shape[-2:])], dim=-2)
