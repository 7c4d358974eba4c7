r"""Covariances of the past under attention weights in memory linear in T, with a backward pass derived by hand.

For the rows i (a position and a query head) and the tokens s that they see,

.. math::
    l_{is} = c\, q_i \cdot k_s, \quad \alpha_{i\cdot} = \mathrm{softmax}(l_{i\cdot}), \quad
    C_i = \frac{1}{c} \frac{\partial}{\partial q_i} \sum_s \alpha_{is} v_s
        = \sum_s \alpha_{is} v_s k_s^T - \bar v_i \bar k_i^T ,

one matrix product of the weights with the rows :math:`v_s \otimes k_s`. The weights exist for one block of rows at a
time and are computed again in the backward pass; for small heads a compiled kernel does both, in C on a processor, in
Triton on a GPU. With :math:`G_i = \partial L / \partial C_i`,

.. math::
    \frac{\partial L}{\partial l_{is}} = \alpha_{is} [ (v_s - \bar v_i)^T G_i (k_s - \bar k_i)
        - \langle G_i, C_i \rangle ], \quad
    \frac{\partial L}{\partial v_s} \ni \alpha_{is} G_i (k_s - \bar k_i), \quad
    \frac{\partial L}{\partial k_s} \ni \alpha_{is} G_i^T (v_s - \bar v_i) .

Logits may be capped, :math:`\tau \tanh(l / \tau)`: then the slope :math:`g_{is} = 1 - \tanh^2` of the cap multiplies
the weights wherever a key is weighed, as the chain rule has it. Derived here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn import native

__all__ = ["past_covariance"]

# What a block may hold of weights and of products v (x) k, in numbers: small enough for a processor's cache.
_WEIGHTS, _PRODUCTS = 1 << 20, 1 << 20
_ROWS, _TOKENS = 128, 32  # rows in a block, and the fewest tokens whose products are formed together


def past_covariance(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    r"""C_i for rows that see the tokens first_i <= s < limit_i which the mask allows.

    Args:
        query: q, (B, K, P, g, r): P positions, and g query heads that share each of K key heads.
        key: k, (B, K, S, r).
        value: v, (B, K, S, dv).
        first: index of the first token that a position may see, (P,).
        limit: one more than the last, (P,), not decreasing; the tokens from limit_P on cost nothing.
        mask: what is allowed beside, (B or 1, K g or 1, P, S): boolean, or added to the logits; None: everything.
        scale: c.
        softcap: tau; None: logits are not capped.

    Returns:
        (B, K, P, g, dv, r), zero for a row that sees one token or none. Differentiable once in query, key and value;
        asking for more raises. Time O(B K g P S r dv), memory O(B K S (r + dv) + B K g P r dv).

    Example:
        >>> k = torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1)
        >>> past_covariance(torch.zeros(1, 1, 1, 1, 1), k, k, torch.tensor([0]), torch.tensor([2])).item()
        1.0
    """
    covariance: Tensor = _PastCovariance.apply(query, key, value, first, limit, mask, scale, softcap or 0.0)  # type: ignore[no-untyped-call]
    return covariance


@torch.library.custom_op("probattn::past_covariance", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    if native.takes_covariance(query, value, mask, softcap):
        return native.covariance(query, key, value, first, limit, scale)
    if query.is_cuda:
        from probattn import covariance_triton  # it imports Triton, which only a GPU needs

        if covariance_triton.supports(query, key, value, mask, softcap):
            return covariance_triton.forward(query, key, value, first, limit, scale)[0]
    problem = _Problem(query, key, value, first, limit, mask, scale, softcap)
    covariance = query.new_zeros(*query.shape[:-1], value.shape[-1], query.shape[-1])
    with torch.autocast(query.device.type, enabled=False):
        for block in problem.blocks():
            covariance[block.batch, :, block.rows] = block.covariance().view(*block.shape, *covariance.shape[-2:])
    return covariance


@torch.library.custom_op("probattn::past_covariance_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if native.takes_covariance(query, value, mask, softcap):
        return native.covariance_backward(gradient, query, key, value, first, limit, scale)
    if query.is_cuda:
        from probattn import covariance_triton

        if covariance_triton.supports(query, key, value, mask, softcap):
            return covariance_triton.backward(gradient, query, key, value, first, limit, scale)
    problem = _Problem(query, key, value, first, limit, mask, scale, softcap)
    to_query, to_key, to_value = (torch.zeros_like(part, memory_format=torch.contiguous_format) for part in problem[:3])
    with torch.autocast(query.device.type, enabled=False):
        for block in problem.blocks():
            incoming = gradient[block.batch, :, block.rows].flatten(2, 3)  # (b, K, R, dv, r)
            q, k, v = block.backward(incoming)
            to_query[block.batch, :, block.rows] = q.view(*block.shape, q.shape[-1])
            to_key[block.batch, :, : k.shape[2]] += k
            to_value[block.batch, :, : v.shape[2]] += v
    return to_query, to_key, to_value


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1], query.shape[-1])


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


class _PastCovariance(torch.autograd.Function):
    """The two operators as one function that autograd, ``torch.func`` and ``torch.compile`` understand."""

    # What torch.library.register_autograd would make of them, torch.func does not understand.
    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        covariance: Tensor = _forward(*arguments)
        return covariance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        gradients = _Once.apply(gradient, *ctx.saved_tensors, ctx.scale, ctx.softcap)  # type: ignore[no-untyped-call]
        return (*gradients, None, None, None, None, None)


class _Once(torch.autograd.Function):
    """The gradients, which cannot be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gradient: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first: Tensor,
        limit: Tensor,
        mask: Tensor | None,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # spelled out: torch's compiler counts the arguments
        gradients: tuple[Tensor, Tensor, Tensor] = _backward(
            gradient, query, key, value, first, limit, mask, scale, softcap
        )
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("past_covariance is differentiable once; its second derivative was asked for.")


def _folded(size: int, axes: tuple[int | None, ...], parts: tuple[Any, ...]) -> list[Any]:
    """Tensors whose axis of ``torch.func.vmap`` is folded into their batch axis; the rest as they are."""
    folded: list[Any] = []
    for axis, part in zip(axes, parts, strict=True):
        if not isinstance(part, Tensor) or part.dim() - (axis is not None) < 4:
            if axis is not None:
                raise NotImplementedError("first, limit and the scales cannot vary under torch.func.vmap.")
            folded.append(part)
            continue
        moved = part.movedim(axis, 0) if axis is not None else part.expand(size, *part.shape)
        folded.append(moved)
    batch = max(part.shape[1] for part in folded if isinstance(part, Tensor) and part.dim() > 4)
    return [
        part.expand(size, batch, *part.shape[2:]).flatten(0, 1) if isinstance(part, Tensor) and part.dim() > 4 else part
        for part in folded
    ]


@_forward.register_vmap
def _(info: Any, axes: tuple[int | None, ...], *parts: Any) -> tuple[Tensor, int]:
    result = _forward(*_folded(info.batch_size, axes, parts))
    return result.unflatten(0, (info.batch_size, -1)), 0


@_backward.register_vmap
def _(info: Any, axes: tuple[int | None, ...], *parts: Any) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    results = _backward(*_folded(info.batch_size, axes, parts))
    return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0, 0)


class _Problem(NamedTuple):
    """The arguments of :func:`past_covariance`."""

    query: Tensor
    key: Tensor
    value: Tensor
    first: Tensor
    limit: Tensor
    mask: Tensor | None
    scale: float
    softcap: float

    def blocks(self) -> Iterator[_Block]:
        """Blocks of rows with the tokens that any of them may see."""
        batch, heads, positions, group, _ = self.query.shape
        if 0 in self.query.shape or 0 in self.key.shape:
            return
        step = max(1, _ROWS // group)
        limits = self.limit.tolist()
        for begin in range(0, positions, step):
            rows = slice(begin, min(begin + step, positions))
            seen = limits[rows.stop - 1]
            count = max(1, _WEIGHTS // max(1, heads * (rows.stop - begin) * group * seen))
            for start in range(0, batch, count):
                yield _Block.build(self, slice(start, min(start + count, batch)), rows, limits[rows])


class _Block(NamedTuple):
    """Some rows of some of the batch.

    Attributes:
        batch, rows: which.
        limits: of the positions, not decreasing.
        shape: (b, K, positions, g).
        query: c q, (b, K, R, r).
        key, value: of the tokens seen, (b, K, S, r) and (b, K, S, dv), less a constant that changes nothing.
        alpha: weights, (b, K, R, S).
        slope: of the cap, (b, K, R, S); None without one.
        pull: the second derivative of the cap over its first, (b, K, R, S).
    """

    batch: slice
    rows: slice
    limits: list[int]
    shape: tuple[int, int, int, int]
    scale: float
    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor
    slope: Tensor | None
    pull: Tensor | None

    @classmethod
    def build(cls, problem: _Problem, batch: slice, rows: slice, limits: list[int]) -> _Block:
        """Weights of the block."""
        seen = limits[-1]
        query = problem.query[batch, :, rows]  # (b, K, positions, g, r)
        shape = tuple(query.shape[:-1])
        group = shape[-1]
        query = problem.scale * query.flatten(2, 3)  # (b, K, R, r)
        key, value = problem.key[batch, :, :seen], problem.value[batch, :, :seen]
        # Neither weights nor covariance change when a constant is subtracted, but logits and the difference of two
        # large products lose digits when the tokens share a large offset. Under a cap only the values may be moved: it
        # bends the logits, and its slopes do not sum to one.
        value = value - value[:, :, :1]
        if not problem.softcap:
            key = key - key[:, :, :1]
        slope = pull = None
        logits = query @ key.mT  # (b, K, R, S)
        if problem.softcap:
            bent = torch.tanh(logits / problem.softcap)
            logits, slope = problem.softcap * bent, 1 - bent.square()
            pull = -2 / problem.softcap * bent
        token = torch.arange(seen, device=query.device)
        visible = (token < problem.limit[rows, None]) & (token >= problem.first[rows, None])  # (positions, S)
        visible = visible.repeat_interleave(group, dim=0)  # (R, S)
        if problem.mask is not None:
            mask = problem.mask[batch if problem.mask.shape[0] > 1 else slice(None), :, rows, :seen]
            if mask.shape[1] > 1:
                mask = mask.unflatten(1, (shape[1], group)).movedim(2, 3).flatten(2, 3)  # (b, K, R, S)
            else:
                mask = mask.repeat_interleave(group, dim=2)  # (b, 1, R, S)
            if mask.dtype == torch.bool:
                visible = visible & mask
            else:
                logits = logits + mask
                visible = visible & (mask > torch.finfo(mask.dtype).min / 2)  # libraries write "never" as the lowest
        lowest = torch.finfo(logits.dtype).min
        alpha = torch.softmax(logits.masked_fill_(~visible, lowest), dim=-1)
        # Only in a row that sees nothing is the weight of what is not visible not zero yet.
        alpha = alpha.masked_fill_(~visible.any(-1, keepdim=True), 0.0)
        return cls(batch, rows, limits, shape, problem.scale, query, key, value, alpha, slope, pull)  # type: ignore[arg-type]

    def weights(self) -> Tensor:
        """What a key is weighed by, (b, K, R, S)."""
        return self.alpha if self.slope is None else self.alpha * self.slope

    def products(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Stretches of tokens, who sees any of them, and their rows [v_s (x) k_s, k_s], (b, K, S', (dv + 1) r)."""
        size = self.key.shape[0] * self.key.shape[1] * self.key.shape[-1] * (self.value.shape[-1] + 1)
        step = max(_TOKENS, min(self.key.shape[2], _PRODUCTS // max(1, size)))
        for start in range(0, self.key.shape[2], step):
            part = slice(start, start + step)
            key = self.key[:, :, part].unsqueeze(-2)  # (b, K, S', 1, r)
            rows = torch.cat([self.value[:, :, part].unsqueeze(-1) * key, key], dim=-2)
            yield part, slice(self.shape[-1] * bisect_right(self.limits, start), None), rows.flatten(-2)

    def covariance(self) -> Tensor:
        """C, (b, K, R, dv, r)."""
        weights = self.weights()
        size, rank = self.value.shape[-1], self.key.shape[-1]
        both = weights.new_zeros(*weights.shape[:-1], (size + 1) * rank)
        for part, late, rows in self.products():
            both[:, :, late] += weights[:, :, late, part] @ rows
        both = both.unflatten(-1, (size + 1, rank))  # second moment and, in the last row, the mean of the keys
        result: Tensor = both[..., :-1, :] - (self.alpha @ self.value).unsqueeze(-1) * both[..., -1:, :]
        return result

    def backward(self, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value from that of C, (b, K, R, dv, r)."""
        weights = self.weights()
        mean_value, mean_key = self.alpha @ self.value, weights @ self.key
        on_value = -(gradient @ mean_key.unsqueeze(-1)).squeeze(-1)  # of the mean value, (b, K, R, dv)
        on_key = -(mean_value.unsqueeze(-2) @ gradient)  # of the mean key, (b, K, R, 1, r)
        flat = torch.cat([gradient, on_key], dim=-2).flatten(-2)  # as the rows of products()
        to_value = self.alpha.mT @ on_value
        to_weights, to_key = weights.new_zeros(weights.shape), torch.zeros_like(self.key)
        for part, late, rows in self.products():
            to_weights[:, :, late, part] = flat[:, :, late] @ rows.mT
            outer = (weights[:, :, late, part].mT @ flat[:, :, late]).unflatten(
                -1, (-1, self.key.shape[-1])
            )  # (b, K, S', dv + 1, r)
            to_value[:, :, part] += (outer[..., :-1, :] @ self.key[:, :, part].unsqueeze(-1)).squeeze(-1)
            to_key[:, :, part] = (self.value[:, :, part].unsqueeze(-2) @ outer[..., :-1, :]).squeeze(-2)
            to_key[:, :, part] += outer[..., -1, :]
        to_alpha = on_value @ self.value.mT
        to_alpha += to_weights if self.slope is None else to_weights * self.slope
        to_logits = torch.ops.aten._softmax_backward_data(to_alpha, self.alpha, -1, self.alpha.dtype)
        if self.slope is not None:  # of l through tanh, and through the slope itself
            assert self.pull is not None
            to_logits = self.slope * (to_logits + self.alpha * to_weights * self.pull)
        to_key += to_logits.mT @ self.query
        # The constant that was taken off the keys adds nothing here, as the rows sum to zero.
        return self.scale * (to_logits @ self.key), to_key, to_value
