"""The next token of a layer given keys and values of a past: its mean and its Jacobian, at any number of candidates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

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

    Candidates u have the shape (*candidates, *batch, p).

    Attributes:
        layer: the layer.
        keys: rotated, (*batch, K, n, r).
        values: (*batch, K, n, dv).
        position: of the next token, 0-dimensional or (*batch,).
    """

    layer: AttentionLayer
    keys: Tensor
    values: Tensor
    position: Tensor

    @classmethod
    def of(cls, layer: AttentionLayer, u: Tensor) -> LayerContext:
        """Build the context of the tokens u_1, ..., u_n.

        Args:
            layer: the layer; its positions, where it has some, are those of the n tokens.
            u: tokens, (*batch, n, p); n may be 0.

        Raises:
            InputError: the layer has a mask of its own, the last axis is not p, or positions of another length.
        """
        if layer.visible is not None:
            raise InputError("the layer has a mask (visible) for a whole sequence; a context is built without one.")
        sublayer = layer.sublayer
        if u.dim() < 2 or u.shape[-1] != sublayer.dim:
            raise InputError(f"the past has shape {tuple(u.shape)}; it must be (*batch, n, p) with p = {sublayer.dim}.")
        batch, length = torch.broadcast_shapes(u.shape[:-2], layer.batch_shape), u.shape[-2]
        positions = torch.arange(length, device=u.device) if layer.positions is None else layer.positions.to(u.device)
        if positions.shape[-1] != length:
            raise InputError(f"the layer has {positions.shape[-1]} positions for {length} tokens; set layer.at(...).")
        ahead = positions[..., -1] + 1 if length else torch.zeros((), dtype=torch.long, device=u.device)
        tokens = _projected(sublayer, u.expand(*batch, *u.shape[-2:]), positions)
        shape = tokens.key.shape
        return cls(
            layer, tokens.key.reshape(*batch, *shape[1:]), tokens.value.reshape(*batch, *tokens.value.shape[1:]), ahead
        )

    def extend(self, u: Tensor) -> LayerContext:
        """The context with one more token u, (*batch, p), behind it."""
        batch = torch.broadcast_shapes(u.shape[:-1], self.keys.shape[:-3])
        u = u.expand(*batch, u.shape[-1]).unsqueeze(-2)
        tokens = _projected(self.layer.sublayer, u, self.position.unsqueeze(-1))
        parts = []
        for past, own in ((self.keys, tokens.key), (self.values, tokens.value)):
            past = past.expand(*batch, *past.shape[-3:])
            parts.append(torch.cat([past, own.reshape(*batch, *own.shape[1:])], -2))
        return replace(self, keys=parts[0], values=parts[1], position=self.position + 1)

    @property
    def length(self) -> int:
        """n, the number of tokens."""
        return self.keys.shape[-2]

    def mean(self, u: Tensor) -> Tensor:
        """The mean mu(past, u) at candidates u, same shape."""
        sublayer, tokens = self.layer.sublayer, self._next(u)
        average = self._attend(sublayer, tokens, u.shape[:-1], derivatives=False).average
        return averages_to_mean(sublayer, average)[0].reshape(u.shape)

    def mean_and_jacobian(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Mean, (*candidates, *batch, p), and J = I - dmu/du, (*candidates, *batch, p, p), at candidates u."""
        sublayer, tokens = self.layer.sublayer, self._next(u)
        attended = self._attend(sublayer, tokens, u.shape[:-1], derivatives=True)
        mean, before = averages_to_mean(sublayer, attended.average)
        flat, row = u.reshape(-1, 1, u.shape[-1]), torch.zeros(1, dtype=torch.long, device=u.device)
        change = build_factors(sublayer, flat, tokens, attended, before, row).mean_jacobian()
        identity = torch.eye(u.shape[-1], dtype=u.dtype, device=u.device)
        return mean.reshape(u.shape), identity - change.reshape(*u.shape, u.shape[-1])

    def _next(self, u: Tensor) -> Projected:
        """Queries, keys and values of the candidates, each a sequence of one token."""
        axes = u.shape[:-1]
        if u.shape[-1:] != (self.layer.dim,) or axes[len(axes) - self.keys.dim() + 3 :] != self.keys.shape[:-3]:
            raise InputError(
                f"candidates have shape {tuple(u.shape)}; it must be (*candidates, *batch, p) with batch axes "
                f"{tuple(self.keys.shape[:-3])} and p = {self.layer.dim}."
            )
        return _projected(self.layer.sublayer, u.unsqueeze(-2), self.position.unsqueeze(-1))

    def _attend(self, sublayer: Sublayer, tokens: Projected, axes: torch.Size, *, derivatives: bool) -> Attended:
        """Averages of past and own token, with tokens of shape (N, 1), and without derivatives nothing else."""
        query = tokens.query.squeeze(2).reshape(*axes, *tokens.query.shape[1:2], *tokens.query.shape[3:])
        key, value = (part.reshape(*axes, *part.shape[1:]) for part in (tokens.key, tokens.value))  # (*axes, K, 1, r)
        seen = self.length if sublayer.window is None else min(self.length, sublayer.window - 1)
        batch = (*axes, *self.keys.shape[-3:-2], -1, -1)
        keys = torch.cat([self.keys[..., self.length - seen :, :].expand(batch), key], -2)  # (*axes, K, n + 1, r)
        values = torch.cat([self.values[..., self.length - seen :, :].expand(batch), value], -2)
        logits = sublayer.scale * query @ keys.mT  # (*axes, K, g, n + 1)
        slope: Tensor | float = 1.0
        if sublayer.softcap is not None:
            bent = torch.tanh(logits / sublayer.softcap)
            logits, slope = sublayer.softcap * bent, 1 - bent.square()
        alpha = logits.softmax(-1)
        average = alpha @ values  # (*axes, K, g, dv)

        def heads(part: Tensor, features: int) -> Tensor:  # (N, 1, H, ...)
            return part.reshape(-1, 1, sublayer.heads, *part.shape[part.dim() - features :])

        if not derivatives:
            empty = average.new_empty(0)
            return Attended(heads(average, 1), empty, empty, empty)
        if sublayer.softcap is None:  # what is subtracted changes nothing; under a cap the weights do not sum to one
            keys = keys - alpha.mean(-2, keepdim=True) @ keys
        away = values.unsqueeze(-3) - average.unsqueeze(-2)  # (*axes, K, g, n + 1, dv)
        away = sublayer.scale * (alpha * slope).unsqueeze(-1) * away
        covariance = away.mT @ keys.unsqueeze(-3)  # (*axes, K, g, dv, r)
        return Attended(heads(average, 1), heads(covariance, 2), heads(alpha[..., -1], 0), heads(away[..., -1, :], 1))


def _projected(sublayer: Sublayer, u: Tensor, positions: Tensor) -> Projected:
    """As :func:`project`, with positions (*batch, m), the last axes of tokens (*candidates, *batch, m, p)."""
    flat = u.reshape(u.shape[:-2].numel(), *u.shape[-2:])
    if not u.shape[-2]:  # nothing to rotate, and some rotary embeddings ask for the largest position
        return project(sublayer._replace(rotary=None), flat, positions)
    if positions.dim() == 1:
        return project(sublayer, flat, positions.unsqueeze(0))
    return project(sublayer, flat, positions.expand(u.shape[:-1]).reshape(-1, u.shape[-2]))
