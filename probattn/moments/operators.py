r"""Moments of the past under attention weights in memory linear in T, with a backward pass derived by hand.

For a row i, which is a position and a query head, and the tokens s that it sees,

.. math::
    l_{is} = c\, q_i \cdot k_s, \quad \alpha_{i\cdot} = \mathrm{softmax}(l_{i\cdot}), \quad
    C_i = \frac{1}{c} \frac{\partial}{\partial q_i} \sum_s \alpha_{is} v_s
        = \sum_s \alpha_{is} v_s k_s^T - \bar v_i \bar k_i^T ,

with the means and :math:`\Lambda_i = \log \sum_s e^{l_{is}}`; the sum over s is one matrix product of the weights with
the rows :math:`v_s \otimes k_s`. Weights exist for one block of rows at a time and are computed again in the backward
pass. On a CPU a compiled kernel does both for small heads. With G_i, h_i, g_i and w_i the gradients of a loss L by C_i,
the two means and Lambda_i,

.. math::
    x_{is} = v_s^T G_i k_s + v_s \cdot (h_i - G_i \bar k_i) + k_s \cdot (g_i - G_i^T \bar v_i), \quad
    \frac{\partial L}{\partial l_{is}} = \alpha_{is} \Bigl[ x_{is} - \sum_t \alpha_{it} x_{it} + w_i \Bigr], \\
    \frac{\partial L}{\partial v_s} \ni \alpha_{is} [ G_i (k_s - \bar k_i) + h_i ], \quad
    \frac{\partial L}{\partial k_s} \ni \alpha_{is} [ G_i^T (v_s - \bar v_i) + g_i ] .

Logits may be capped, :math:`\tau \tanh(l / \tau)`: by the chain rule the slope :math:`1 - \tanh^2` of the cap then
multiplies the weight of every key. Derivatives beyond the first, and forward mode, go through the same sums written
out. Derived here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.moments import passes
from probattn.moments.dense import dense_moments
from probattn.moments.problem import Problem
from probattn.numerics.derivatives import pushforward

__all__ = ["OriginMoments", "PastMoments", "origin_moments", "past_moments"]


class PastMoments(NamedTuple):
    """Attention-weighted moments of the tokens visible to each row; a row that sees nothing has zeros and -inf.

    Attributes:
        covariance: C, (B, K, P, g, dv, r).
        mean: [vbar | kbar], the keys weighed as in C, (B, K, P, g, dv + r).
        log_sum: Lambda, (B, K, P, g); alpha_is = exp(l_is - Lambda_i).
    """

    covariance: Tensor
    mean: Tensor
    log_sum: Tensor


class OriginMoments(NamedTuple):
    r"""The same moments measured from a token near to what a row attends to, which keeps their digits.

    With the origin :math:`[v_o | k_o]` of a row its means are origin + offset, and its log-sum is that of
    :math:`c\, q_i \cdot (k_s - k_o)`. Under a cap, which bends the logits, the origin of the keys is zero.

    Attributes:
        covariance: C, (B, K, P, g, dv, r).
        offset: [vbar | kbar] - origin, (B, K, P, g, dv + r); its gradient is that of the means.
        log_sum: log of the sum of a row's exponentials, (B, K, P, g).
        origin: constant without a gradient, (B, K, P, g, dv + r); zero for a row that sees nothing.
    """

    covariance: Tensor
    offset: Tensor
    log_sum: Tensor
    origin: Tensor


def past_moments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    gain: Tensor | None = None,
) -> PastMoments:
    r"""Covariance, means and log-sum of rows that see the tokens first_i <= s < limit_i which the mask allows.

    Args:
        query: q, (B, K, P, g, r): P positions, and g query heads that share each of K key heads.
        key: k, (B, K, S, r).
        value: v, (B, K, S, dv).
        first: index of the first token that a position may see, (P,).
        limit: index behind the last one, (P,), not decreasing; the tokens from limit_P on cost nothing.
        mask: tokens that a row may see of these, (B or 1, K g or 1, P, S): boolean, or added to the logits; None: all.
        scale: c.
        softcap: tau; None: logits are not capped.
        gain: size of what C will be multiplied by, (B or 1, K or 1), which says how much its rounding errors matter;
            None: 1.

    Returns:
        :class:`PastMoments`, differentiable in query, key and value. Time O(B K g P S r dv), memory
        O(B K S (r + dv) + B K g P r dv); derivatives beyond the first, and forward mode, O(B K (g P + dv r) S). Rows
        whose differences cancel are computed again, see :mod:`probattn.moments.refine`.

    Raises:
        InputError: axes or dtypes of query, key and value, or lengths of first and limit, that do not agree.

    Example:
        >>> k = torch.tensor([-1.0, 1.0]).view(1, 1, 2, 1)
        >>> moments = past_moments(torch.zeros(1, 1, 1, 1, 1), k, k, torch.tensor([0]), torch.tensor([2]))
        >>> moments.covariance.item(), moments.mean.flatten(), moments.log_sum.exp().item()
        (1.0, tensor([0., 0.]), 2.0)
    """
    found = origin_moments(query, key, value, first, limit, mask=mask, scale=scale, softcap=softcap, gain=gain)
    origin_key = found.origin[..., value.shape[-1] :]
    return PastMoments(
        found.covariance, found.origin + found.offset, found.log_sum + scale * (query * origin_key).sum(-1)
    )


def origin_moments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    gain: Tensor | None = None,
) -> OriginMoments:
    """Moments of the past, each row measured from a token near to what it attends to.

    Args:
        query: q, (B, K, P, g, r); this and the others as in :func:`past_moments`.
        key: k, (B, K, S, r).
        value: v, (B, K, S, dv).
        first: (P,).
        limit: (P,).
        mask: (B or 1, K g or 1, P, S).
        scale: c.
        softcap: tau.
        gain: (B or 1, K or 1).

    Returns:
        :class:`OriginMoments`.

    Raises:
        InputError: as :func:`past_moments`.
    """
    _require_fit(query, key, value, first, limit)
    if gain is not None:
        gain = gain.detach()[..., None, None]
    function = _Moments if torch.compiler.is_compiling() else _MomentsForward
    found = function.apply(query, key, value, first, limit, mask, gain, scale, softcap or 0.0)  # type: ignore[no-untyped-call]
    return OriginMoments(*found[:4])


def _require_fit(query: Tensor, key: Tensor, value: Tensor, first: Tensor, limit: Tensor) -> None:
    """Raise unless the axes agree: the kernels read memory by the sizes of the query alone."""
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    fits = tuple(map(len, shapes)) == (5, 4, 4) and key.shape == (*query.shape[:2], key.shape[2], query.shape[-1])
    if not fits or value.shape[:3] != key.shape[:3]:
        raise InputError(
            f"query, key and value have shapes {shapes}; they must be (B, K, P, g, r), (B, K, S, r) and (B, K, S, dv)."
        )
    if not query.dtype == key.dtype == value.dtype:
        raise InputError(
            f"query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; bring them together with .to(...)."
        )
    if not first.shape == limit.shape == query.shape[2:3]:
        raise InputError(
            f"first and limit have shapes {tuple(first.shape)} and {tuple(limit.shape)}; both must be "
            f"({query.shape[2]},), one for each position of the query."
        )


@torch.library.custom_op("probattn::past_moments", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    mask: Tensor | None,
    gain: Tensor | None,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False):
        return passes.forward(Problem(query, key, value, first, limit, mask, scale, softcap), gain)


@torch.library.custom_op("probattn::past_moments_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    on_mean: Tensor | None,
    on_log: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    first: Tensor,
    limit: Tensor,
    mask: Tensor | None,
    origin: Tensor,
    way: Tensor,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    problem = Problem(query, key, value, first, limit, mask, scale, softcap)
    with torch.autocast(query.device.type, enabled=False):
        return passes.backward((gradient, on_mean, on_log), problem, origin, way)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    size, rank = value.shape[-1], query.shape[-1]
    shapes = ((size, rank), (size + rank,), (), (size + rank,))
    found = (query.new_empty(*query.shape[:-1], *last) for last in shapes)
    return (*found, query.new_empty(query.shape[:-1], dtype=torch.int8))  # type: ignore[return-value]


@_backward.register_fake
def _(
    gradient: Tensor, on_mean: Any, on_log: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


class _Moments(torch.autograd.Function):
    """The two operators as one function that autograd, ``torch.func`` and ``torch.compile`` understand."""

    # Not torch.library.register_autograd, whose functions torch.func does not understand.
    generate_vmap_rule = True

    @staticmethod
    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first: Tensor,
        limit: Tensor,
        mask: Tensor | None,
        gain: Tensor | None,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # spelled out: torch's compiler counts the arguments
        found: tuple[Tensor, ...] = _forward(query, key, value, first, limit, mask, gain, scale, softcap)
        return found  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, _, ctx.scale, ctx.softcap = inputs
        constants = output[3:]  # origin and pass
        ctx.mark_non_differentiable(*constants)
        ctx.save_for_backward(*tensors, *constants)
        ctx.save_for_forward(*tensors, *constants)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors  # once: checkpoints do not unpack them again
        query, _, value = tensors[:3]
        if gradient is None:
            gradient = query.new_zeros(*query.shape[:-1], value.shape[-1], query.shape[-1])
        function = _Gradients if torch.compiler.is_compiling() else _GradientsForward
        gradients = function.apply(gradient, *others[:2], *tensors, ctx.scale, ctx.softcap)  # type: ignore[no-untyped-call]
        return (*gradients, None, None, None, None, None, None)


class _MomentsForward(_Moments):
    """The same with forward-mode derivatives, which torch.compile does not support in custom functions."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        query, key, value, first, limit, mask, origin, _ = ctx.saved_tensors

        def moments(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            return dense_moments(query, key, value, first, limit, mask, ctx.scale, ctx.softcap, origin)

        return (*pushforward(moments, (query, key, value), tangents[:3]), None, None)


class _Gradients(torch.autograd.Function):
    """The gradients by the backward operator; their own gradients are those of the sums written out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        gradient: Tensor,
        on_mean: Tensor | None,
        on_log: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        first: Tensor,
        limit: Tensor,
        mask: Tensor | None,
        origin: Tensor,
        way: Tensor,
        scale: float,
        softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # spelled out, as above
        gradients: tuple[Tensor, Tensor, Tensor] = _backward(
            gradient, on_mean, on_log, query, key, value, first, limit, mask, origin, way, scale, softcap
        )
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.scale, ctx.softcap = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        function, given = _dense_gradients(ctx)
        found = dict(zip(given, torch.func.vjp(function, *given.values())[1](gradients), strict=True))
        return (*(found.get(place) for place in range(6)), *[None] * 7)


class _GradientsForward(_Gradients):
    """The same with derivatives in forward mode."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, ...]:
        function, given = _dense_gradients(ctx)
        return pushforward(function, [*given.values()], [tangents[place] for place in given])


def _dense_gradients(ctx: Any) -> tuple[Callable[..., tuple[Tensor, ...]], dict[int, Tensor]]:
    """The backward operator, written out, as a function of those of its six differentiable arguments that are given."""
    *tensors, first, limit, mask, origin, _ = ctx.saved_tensors
    given = {place: part for place, part in enumerate(tensors) if part is not None}
    wanted = [place for place in given if place < 3]

    def gradients(*parts: Tensor) -> tuple[Tensor, ...]:
        coming, tensors = parts[: len(wanted)], parts[len(wanted) :]

        def moments(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
            found = dense_moments(query, key, value, first, limit, mask, ctx.scale, ctx.softcap, origin)
            return tuple(found[place] for place in wanted)

        result: tuple[Tensor, ...] = torch.func.vjp(moments, *tensors)[1](coming)
        return result

    return gradients, given


def _folded(size: int, axes: tuple[int | None, ...], parts: tuple[Any, ...]) -> list[Any]:
    """Fold the axis of ``torch.func.vmap`` into the batch axis of tensors; other arguments stay as they are."""
    folded: list[Any] = []
    for axis, part in zip(axes, parts, strict=True):
        if not isinstance(part, Tensor) or part.dim() - (axis is not None) < 4:
            if axis is not None:
                raise NotImplementedError("first, limit and the scales cannot vary under torch.func.vmap.")
            folded.append(part)
            continue
        moved = part.movedim(axis, 0) if axis is not None else part.expand(size, *part.shape)
        folded.append(moved)
    # That of the query, which is never broadcast: the first tensor with axes for vmap, B, K, P, g and r.
    batch = next(part.shape[1] for part in folded if isinstance(part, Tensor) and part.dim() > 5)
    return [
        part.expand(size, batch, *part.shape[2:]).flatten(0, 1) if isinstance(part, Tensor) and part.dim() > 4 else part
        for part in folded
    ]


@_forward.register_vmap
def _(info: Any, axes: tuple[int | None, ...], *parts: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    results = _forward(*_folded(info.batch_size, axes, parts))
    return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0,) * 5


@_backward.register_vmap
def _(info: Any, axes: tuple[int | None, ...], *parts: Any) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    results = _backward(*_folded(info.batch_size, axes, parts))
    return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0, 0)
