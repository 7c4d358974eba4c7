"""The next token of a layer given its past: mean and Jacobian at any number of candidates, from cached keys and values.

What :mod:`probattn.solve` asks of a past is here, so that its solvers, starts and rules of selection take a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.layers.factors import build_factors
from probattn.hf.layers.past import Attended
from probattn.hf.layers.sublayer import Projected, Sublayer, averages_to_mean, project

if TYPE_CHECKING:
    from probattn.hf.layers.layer import AttentionLayer

__all__ = ["LayerContext"]


@dataclass(frozen=True, eq=False)
class LayerContext:
    """Keys and values of a past, and the next-token map that they define.

    Candidates u have the shape ``(*candidates, *batch, p)``. Where the layer has positions, the first n are those of
    the past and the next is that of the candidate; behind the last they go on by one.

    Attributes:
        attention: the layer.
        tokens: the past itself, ``(*batch, n, p)``.
        key: its keys, rotated, ``(*batch, K, n, r)``.
        value: its values, ``(*batch, K, n, dv)``.
        visible: None, as every candidate has the whole past; for the solvers.
    """

    attention: AttentionLayer
    tokens: Tensor
    key: Tensor
    value: Tensor
    visible: None = None

    @classmethod
    def of(cls, layer: AttentionLayer, u: Tensor) -> LayerContext:
        """Build the context of the tokens u_1, ..., u_n.

        Args:
            layer: the layer.
            u: tokens, ``(*batch, n, p)``; n may be 0.

        Raises:
            InputError: the layer has a mask of its own, or the last axis is not p.
        """
        if layer.visible is not None:
            raise InputError("the layer has a mask (visible) for a whole sequence; a context is built without one.")
        if u.dim() < 2 or u.shape[-1] != layer.dim:
            raise InputError(f"the past has shape {tuple(u.shape)}; it must be (*batch, n, p) with p = {layer.dim}.")
        batch = torch.broadcast_shapes(u.shape[:-2], layer.batch_shape)
        u = u.expand(*batch, *u.shape[-2:])
        layer = layer.spread(batch)
        tokens = _projected(layer, layer.sublayer, u, 0)
        key, value = (part.reshape(*batch, *part.shape[1:]) for part in (tokens.key, tokens.value))
        return cls(layer, u, key, value)

    def extend(self, u: Tensor) -> LayerContext:
        """The context with one more token u, ``(*batch, p)``, behind it."""
        batch = torch.broadcast_shapes(u.shape[:-1], self.batch_shape)
        u = u.expand(*batch, u.shape[-1]).unsqueeze(-2)
        attention = self.attention.spread(batch)
        own = _projected(attention, attention.sublayer, u, self.length)

        def joined(past: Tensor, new: Tensor) -> Tensor:
            return torch.cat([past.expand(*batch, *past.shape[len(self.batch_shape) :]), new], -2)

        key, value = (part.reshape(*batch, *part.shape[1:]) for part in (own.key, own.value))
        joint: dict[str, Any] = {
            "tokens": joined(self.tokens, u),
            "key": joined(self.key, key),
            "value": joined(self.value, value),
        }
        return replace(self, attention=attention, **joint)

    def first(self, n: int) -> LayerContext:
        """The context of the first n tokens."""
        parts = {name: getattr(self, name)[..., :n, :] for name in ("tokens", "key", "value")}
        return replace(self, **parts)

    def select(self, index: tuple[Tensor, ...], batch: torch.Size) -> LayerContext:
        """The contexts at S places of the batch that this one expands to, as one with a batch axis of S.

        Args:
            index: indices along the axes of ``batch``, ``(S,)`` each.
            batch: broadcast of the batch axes of this context.
        """
        count, layer = len(self.batch_shape), replace(self.attention, batch_shape=torch.Size())
        if layer.positions is not None and layer.positions.dim() > 1:
            layer = layer.at(layer.positions.expand(*batch, -1)[index])
        if layer.scaling is not None:
            layer = replace(layer, scaling=layer.scaling.expand(batch).select(index))
        parts = {name: getattr(self, name) for name in ("tokens", "key", "value")}
        chosen = {name: part.expand(*batch, *part.shape[count:])[index] for name, part in parts.items()}
        return replace(self, attention=layer, **chosen)

    @property
    def length(self) -> int:
        """n, the number of tokens."""
        return self.tokens.shape[-2]

    @property
    def batch_shape(self) -> torch.Size:
        """Batch axes of the pasts."""
        return self.tokens.shape[:-2]

    @property
    def largest(self) -> Tensor:
        """Norm of the largest token, ``(*batch,)``."""
        norm: Tensor = torch.linalg.vector_norm(self.tokens, dim=-1)
        return norm.amax(-1) if self.length else norm.new_zeros(self.batch_shape)

    @property
    def on_a_line(self) -> bool:
        """Return False, since the exact results for one-dimensional tokens under the strict mask do not apply."""
        return False

    @property
    def values(self) -> Tensor:
        """Contributions W_O v of each head and each token of the past to the stream, ``(*batch, H, n, p)``.

        The means of a layer lie in the hull of these, but for the bias and the norm behind; solvers start there.
        """
        output = self.attention.sublayer.output  # (p, H, dv)
        value = self.value.repeat_interleave(output.shape[1] // self.value.shape[-3], -3)  # (*batch, H, n, dv)
        if self.attention.scaling is not None:
            value = self.attention.scaling.strength[..., None, None] * value
        return value @ output.permute(1, 2, 0)

    def contraction_bound(self) -> Tensor:
        """Upper bound on ``|dmu/du|`` for every u, ``(*batch,)``: +inf, as none is known with the token's own key."""
        return self.tokens.new_full(self.batch_shape, torch.inf)

    def mean(self, u: Tensor) -> Tensor:
        """The mean mu(past, u) at candidates u, same shape."""
        sublayer = self.attention.sublayer
        average = self._attend(sublayer, self._next(sublayer, u), u.shape[:-1], derivatives=False).average
        return averages_to_mean(sublayer, average)[0].reshape(u.shape)

    def mean_and_jacobian(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, ``(*candidates, *batch, p)``, and J = I - dmu/du, ``(*candidates, *batch, p, p)``, at candidates u."""
        sublayer = self.attention.sublayer
        tokens = self._next(sublayer, u)
        attended = self._attend(sublayer, tokens, u.shape[:-1], derivatives=True)
        mean, before = averages_to_mean(sublayer, attended.average)
        flat, row = u.reshape(-1, 1, u.shape[-1]), torch.zeros(1, dtype=torch.long, device=u.device)
        change = build_factors(sublayer, flat, tokens, attended, before, row).mean_jacobian()
        identity = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        return mean.reshape(u.shape), identity - change.reshape(*u.shape, u.shape[-1])

    def pull_back(self, u: Tensor, w: Tensor) -> Tensor:
        """Gradient of w . mu(past, u) by the tokens of the past.

        Args:
            u: one token, ``(*batch, p)``.
            w: ``(*batch, p)``.

        Returns:
            ``(*batch, n, p)``.
        """
        with torch.enable_grad():
            past = self.tokens.detach().requires_grad_()
            mean = LayerContext.of(self.attention.detach(), past).mean(u.detach())
            (gradient,) = torch.autograd.grad(mean, past, w)
        return gradient

    def _next(self, sublayer: Sublayer, u: Tensor) -> Projected:
        """Queries, keys and values of the candidates, each a sequence of one token."""
        axes = u.shape[:-1]
        if u.shape[-1:] != (sublayer.dim,) or axes[len(axes) - len(self.batch_shape) :] != self.batch_shape:
            raise InputError(
                f"candidates have shape {tuple(u.shape)}; it must be (*candidates, *batch, p) with batch axes "
                f"{tuple(self.batch_shape)} and p = {sublayer.dim}."
            )
        return _projected(self.attention, sublayer, u.unsqueeze(-2), self.length)

    def _attend(self, sublayer: Sublayer, tokens: Projected, axes: torch.Size, *, derivatives: bool) -> Attended:
        """Averages of past and own token, with tokens of shape ``(N, 1)``, and without derivatives nothing else."""
        query = tokens.query.squeeze(2).reshape(*axes, *tokens.query.shape[1:2], *tokens.query.shape[3:])
        key, value = (part.reshape(*axes, *part.shape[1:]) for part in (tokens.key, tokens.value))  # (*axes, K, 1, r)
        seen = self.length if sublayer.window is None else min(self.length, sublayer.window - 1)
        batch = (*axes, sublayer.groups, -1, -1)
        keys = torch.cat([self.key[..., self.length - seen :, :].expand(batch), key], -2)  # (*axes, K, n + 1, r)
        values = torch.cat([self.value[..., self.length - seen :, :].expand(batch), value], -2)
        logits = sublayer.scale * query @ keys.mT  # (*axes, K, g, n + 1)
        slope: Tensor | float = 1.0
        if sublayer.softcap is not None:
            bent = torch.tanh(logits / sublayer.softcap)
            logits, slope = sublayer.softcap * bent, 1 - bent.square()
        alpha = logits.softmax(-1)
        average = alpha @ values  # (*axes, K, g, dv)

        def heads(part: Tensor, features: int) -> Tensor:  # (N, 1, H, ...)
            return part.reshape(axes.numel(), 1, sublayer.heads, *part.shape[part.dim() - features :])

        if not derivatives:
            empty = average.new_empty(0)
            return Attended(heads(average, 1), empty, empty, empty)
        if sublayer.softcap is None:  # what is subtracted changes nothing; under a cap the weights do not sum to one
            keys = keys - alpha.mean(-2, keepdim=True) @ keys
        away = values.unsqueeze(-3) - average.unsqueeze(-2)  # (*axes, K, g, n + 1, dv)
        away = sublayer.scale * (alpha * slope).unsqueeze(-1) * away
        covariance = away.mT @ keys.unsqueeze(-3)  # (*axes, K, g, dv, r)
        return Attended(heads(average, 1), heads(covariance, 2), heads(alpha[..., -1], 0), heads(away[..., -1, :], 1))


def _projected(layer: AttentionLayer, sublayer: Sublayer, u: Tensor, start: int) -> Projected:
    """As :func:`project`, for tokens ``(*candidates, *batch, m, p)`` that stand behind ``start`` others."""
    count, length = u.shape[:-2].numel(), u.shape[-2]
    flat = u.reshape(count, *u.shape[-2:])
    places = torch.arange(start, start + length, device=u.device)
    if not length:  # nothing to rotate, and some rotary embeddings ask for the largest position
        return project(sublayer._replace(rotary=None), flat, places.unsqueeze(0))
    if layer.positions is None:
        return project(sublayer, flat, places.unsqueeze(0))
    known = layer.positions.to(u.device)
    last = known.shape[-1] - 1
    positions = known[..., places.clamp(max=last)] + (places - last).clamp(min=0)  # (m,) or (*batch, m)
    return project(sublayer, flat, positions.expand(u.shape[:-1]).reshape(count, length))
