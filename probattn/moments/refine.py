r"""Rows that lose digits, computed again about a token of their own.

A covariance is the difference of two products, and logits of keys that share an offset are differences too. The first
pass takes both about the first token: every row of a causal attention sees it, so the value of a row does not depend on
later tokens to the last bit. Where the first token is far from what a row attends to (the sink of an attention, or
tokens that wander off), these differences cancel. Such rows are recognised by the sizes that cancel and computed again
in two steps: the first finds the token s* with the largest weight, the second measures keys and values from there,

.. math::
    \alpha_{is} \propto e^{c\, q_i \cdot (k_s - k_{s^*})}, \quad
    C_i = \sum_s \alpha_{is} (v_s - \bar v_i) (k_s - \bar k_i)^T ,

which has the rounding errors of the tokens attended to and no others. Logits beyond the range of the numbers are formed
from scaled factors: such an attention is hard, and the largest logit takes all weight. Derived here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from probattn.moments.dense import scaled_product
from probattn.moments.problem import CANCELLATION, Problem

__all__ = ["Rows", "lost_rows", "norm_bound"]

_SPREAD = 16  # a difference at least this part of what it is taken from has no digits that another origin would save
_NUMBERS = 1 << 21  # in the tokens of the rows that are computed together


def norm_bound(matrix: Tensor) -> Tensor:
    """Upper bound on the spectral norm, sqrt(norm_1 norm_inf); one for the identity, and cheap."""
    size = matrix.abs()
    return (size.sum(-1).amax(-1) * size.sum(-2).amax(-1)).sqrt()


def lost_rows(problem: Problem, covariance: Tensor, offset: Tensor, log_sum: Tensor, gain: Tensor | None) -> Tensor:
    """Rows of the first pass that lost digits, by what was subtracted in them.

    Args:
        problem: rows and tokens.
        covariance: C, (B, K, P, g, dv, r).
        offset: means less the first token, (B, K, P, g, dv + r).
        log_sum: log-sums of the same pass, (B, K, P, g); -inf for rows that see nothing.
        gain: size of what C will be multiplied by, (B or 1, K or 1, 1, 1); None: 1.

    Returns:
        Boolean, (B, K, P, g).
    """
    bound = CANCELLATION[offset.dtype]
    origin = problem.value[:, :, :1, None]  # (B, K, 1, 1, dv)
    parts = offset.split([origin.shape[-1], problem.key.shape[-1]], -1)
    far, pull, mean, start = (torch.linalg.vector_norm(part, dim=-1) for part in (*parts, parts[0] + origin, origin))
    # Every condition is written so that NaN does not pass.
    kept = (far * pull * (1.0 if gain is None else gain) <= bound) & (start <= bound * mean.clamp(min=1.0))
    if not problem.softcap:  # a cap bends the logits: they cannot be measured from another token
        kept &= abs(problem.scale) * torch.linalg.vector_norm(problem.query, dim=-1) * pull <= bound
    candidates: Tensor = ~kept & ~log_sum.isneginf()
    if not bool(candidates.any()):
        return candidates
    size = torch.linalg.vector_norm(covariance[candidates], dim=(-2, -1))
    right = ((far * pull)[candidates] <= _SPREAD * size) & size.isfinite()
    chosen: Tensor = candidates.masked_scatter(candidates, ~right)
    return chosen


class Rows(NamedTuple):
    """Some rows of a problem with their weights, R of them, and the tokens as they are seen from them.

    Attributes:
        place: (b, k, p, g) of each row, (R,) each.
        scale: c.
        query: c q, (R, r).
        value: v_s less its mean, (R, S, dv).
        key: k_s less its mean, (R, S, r); under a cap k_s itself.
        alpha: weights, (R, S).
        slope: of the cap, (R, S); None without one.
        bend: second derivative of the cap over its first, (R, S); None without one.
        offset: means less the origin, (R, dv + r).
        origin: point that means and log-sums are measured from, (R, dv + r).
        log_sum: of the exponentials of logits measured from there, (R,); -inf for a row that sees nothing.
    """

    place: tuple[Tensor, ...]
    scale: float
    query: Tensor
    value: Tensor
    key: Tensor
    alpha: Tensor
    slope: Tensor | None
    bend: Tensor | None
    offset: Tensor
    origin: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, problem: Problem, chosen: Tensor) -> Iterator[Rows]:
        """The rows that are set in a boolean tensor, (B, K, P, g), in chunks of bounded memory."""
        index = chosen.nonzero(as_tuple=True)
        if not len(index[0]):
            return
        count = max(1, _NUMBERS // (problem.key.shape[2] * (problem.key.shape[-1] + problem.value.shape[-1])))
        for chunk in zip(*(axis.split(count) for axis in index), strict=True):
            yield cls._build(problem, chunk)

    @classmethod
    def _build(cls, problem: Problem, index: tuple[Tensor, ...]) -> Rows:
        batch, head, position, _ = index
        seen = max(1, int(problem.limit[position].max()))
        query = problem.scale * problem.query[index]  # (R, r)
        visible, bias = _visible(problem, index, seen)
        some = visible.any(-1, keepdim=True)
        # Tokens that are not seen may hold anything, and do not enter.
        key, value = (
            part[:, :, :seen][batch, head].masked_fill(~visible.unsqueeze(-1), 0.0)
            for part in (problem.key, problem.value)
        )

        def shown(logits: Tensor) -> Tensor:
            return (logits if bias is None else logits + bias).masked_fill(~visible, -torch.inf)

        rough = _rough_logits(query, key)
        largest = shown(rough).argmax(-1)[:, None, None]  # (R, 1, 1)
        origin_value, origin_key = (part.take_along_dim(largest, 1) for part in (value, key))  # (R, 1, dv or r)
        slope = bend = None
        if problem.softcap:  # it bends the logits: the keys cannot be moved
            origin_key = torch.zeros_like(origin_key)
        key = key - origin_key
        found = scaled_product(query.unsqueeze(-2), key.mT).squeeze(-2)  # (R, S)
        if problem.softcap:
            bent = torch.tanh(found / problem.softcap)
            found, slope, bend = problem.softcap * bent, 1 - bent.square(), -2 / problem.softcap * bent
        found = shown(found).masked_fill(~some, 0.0)
        alpha = torch.softmax(found, -1).masked_fill(~some, 0.0)
        log_sum = torch.logsumexp(found, -1).masked_fill(~some.squeeze(-1), -torch.inf)
        value = value - origin_value
        weights = alpha if slope is None else alpha * slope
        offset_value, offset_key = alpha.unsqueeze(-2) @ value, weights.unsqueeze(-2) @ key  # (R, 1, dv or r)
        value, key = value - offset_value, key - offset_key if slope is None else key
        offset = torch.cat([offset_value, offset_key], -1).squeeze(1)
        origin = torch.cat([origin_value, origin_key], -1).squeeze(1)
        return cls(index, problem.scale, query, value, key, alpha, slope, bend, offset, origin, log_sum)

    def covariance(self) -> Tensor:
        """C, (R, dv, r)."""
        weights = self.alpha if self.slope is None else self.alpha * self.slope
        return (weights.unsqueeze(-1) * self.value).mT @ self.key

    def backward(
        self, gradient: Tensor | None, on_mean: Tensor, on_log: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, (R, r), and of the tokens seen, (R, S, r) and (R, S, dv), for each row apart.

        Args:
            gradient: G, of the covariance, (R, dv, r); None: zero.
            on_mean: [h | g], of the means, (R, dv + r).
            on_log: w, of the log-sum, (R,); None: zero.
        """
        size, rank = self.value.shape[-1], self.key.shape[-1]
        weights = self.alpha if self.slope is None else self.alpha * self.slope
        on_value, on_key = on_mean.unsqueeze(-2).split([size, rank], -1)  # (R, 1, dv), (R, 1, r)
        to_key = on_key.expand(self.key.shape)  # g + G^T v_s, what each unit of weight adds
        to_value = torch.zeros_like(self.value)
        if gradient is not None:
            carried = self.key @ gradient.mT  # G k_s, (R, S, dv)
            to_key = to_key + self.value @ gradient
            to_value = weights.unsqueeze(-1) * carried
            on_value = on_value - weights.unsqueeze(-2) @ carried
        to_value = to_value + self.alpha.unsqueeze(-1) * on_value
        to_weights = (self.key * to_key).sum(-1)  # (R, S)
        to_alpha = (self.value @ on_value.mT).squeeze(-1)
        to_alpha = to_alpha + (to_weights if self.slope is None else self.slope * to_weights)
        # A token without weight adds nothing, however large it is.
        to_weights, to_alpha = (part.where(self.alpha != 0, 0.0) for part in (to_weights, to_alpha))
        to_logits = self.alpha * (to_alpha - (self.alpha * to_alpha).sum(-1, keepdim=True))
        to_query = torch.zeros_like(self.query)
        if on_log is not None:
            on_log = on_log.where(~self.log_sum.isneginf(), 0.0).unsqueeze(-1)
            to_logits = to_logits + self.alpha * on_log
            if self.slope is None:
                to_query = on_log * self.offset[:, size:]  # the keys at hand are measured from their mean
        if self.slope is not None:  # of l through tanh, and through the slope itself
            assert self.bend is not None
            to_logits = self.slope * (to_logits + self.alpha * to_weights * self.bend)
        to_query = self.scale * (to_query + (to_logits.unsqueeze(-2) @ self.key).squeeze(-2))
        to_key = weights.unsqueeze(-1) * to_key + to_logits.unsqueeze(-1) * self.query.unsqueeze(-2)
        return to_query, to_key, to_value


def _rough_logits(query: Tensor, key: Tensor) -> Tensor:
    """Logits by which the largest is found, (R, S), divided by their size in rows where they may overflow."""
    plain = (query.unsqueeze(-2) @ key.mT).squeeze(-2)
    sizes = query.abs().amax(-1, keepdim=True), key.abs().amax((-2, -1), keepdim=True)
    bound = sizes[0] * sizes[1].squeeze(-1) * query.shape[-1]
    beyond = ~(bound < torch.finfo(query.dtype).max)
    if not bool(beyond.any()):
        return plain
    query, key = (part / size.where(size > 0, 1.0) for part, size in zip((query, key), sizes, strict=True))
    return torch.where(beyond, (query.unsqueeze(-2) @ key.mT).squeeze(-2), plain)


def _visible(problem: Problem, index: tuple[Tensor, ...], seen: int) -> tuple[Tensor, Tensor | None]:
    """Mask of the first tokens that each row sees, (R, S), and the addition of a mask to its logits, (R, S)."""
    batch, head, position, member = index
    token = torch.arange(seen, device=position.device)
    visible = (token >= problem.first[position, None]) & (token < problem.limit[position, None])
    mask = problem.mask
    if mask is None:
        return visible, None
    row = head * problem.query.shape[3] + member
    own = mask[batch if mask.shape[0] > 1 else 0, row if mask.shape[1] > 1 else 0, position, :seen]  # (R, S)
    if mask.dtype == torch.bool:
        return visible & own, None
    return visible & (own > torch.finfo(mask.dtype).min / 2), own  # libraries write "never" as the lowest number
