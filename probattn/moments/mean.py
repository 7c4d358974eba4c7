r"""Attention means of a whole sequence through torch's fused attention, in memory linear in its length.

Row i averages the values of the tokens s <= i,

.. math::
    \bar v_i = \sum_{s \le i} \alpha_{is} v_s, \qquad \alpha_{i\cdot} = \mathrm{softmax}_{s \le i}(q_i \cdot k_s),

and with :math:`h_i` the gradient of a loss L by :math:`\bar v_i`,

.. math::
    \frac{\partial L}{\partial v_s} = \sum_i \alpha_{is} h_i, \qquad
    \frac{\partial L}{\partial l_{is}} = \alpha_{is}\, h_i \cdot (v_s - \bar v_i) .

The fused forward pass keeps no weights; the backward pass forms them again for one block of rows at a time (Rabe and
Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135). Logits are measured from zero here. Rows whose logits
are so large that this costs digits are computed as in :mod:`probattn.moments.refine`. Derivatives beyond the first, and
forward mode, go through the sums written out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.moments.dense import attention_weights, median
from probattn.moments.problem import CANCELLATION, Problem
from probattn.moments.refine import Rows
from probattn.numerics.derivatives import pushforward

__all__ = ["causal_mean", "causal_weights"]

_ROWS, _WEIGHTS = 128, 1 << 20  # rows of a block, and the weights that it may hold


def causal_mean(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention means of rows that see the tokens up to their own place.

    Args:
        query: c q, already scaled, (B, H, T, r).
        key: k, (B, H, T, r).
        value: v, (B, H, T, dv).

    Returns:
        vbar, (B, H, T, dv), differentiable any number of times. Time O(B H T^2 (r + dv)), memory O(B H T (r + dv)),
        with the first derivative too; on devices without a fused kernel for this dtype, by blocks of rows.

    Example:
        >>> value = torch.tensor([1.0, 3.0, 5.0]).view(1, 1, 3, 1)
        >>> causal_mean(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), value).flatten()
        tensor([1., 2., 3.])
    """
    function = _Mean if torch.compiler.is_compiling() else _MeanForward
    mean: Tensor = function.apply(query, key, value)  # type: ignore[no-untyped-call]
    return mean


def causal_weights(query: Tensor, key: Tensor) -> Tensor:
    """The weights of :func:`causal_mean` themselves, dense.

    Args:
        query: c q, already scaled, ``(*batch, T, r)``.
        key: k, ``(*batch, T, r)``.

    Returns:
        alpha, ``(*batch, T, T)``. Where rows may lose digits, they are the means of unit vectors, in time O(T^3).
    """
    length = query.shape[-2]
    rows, tokens = (part.reshape(-1, 1, *part.shape[-2:]) for part in (query, key))
    try:
        plain = _Distant.find(rows, tokens, tokens) is None
    except RuntimeError:  # under torch.func.vmap a tensor has no truth value
        plain = False
    if plain:
        return attention_weights(query, key, _past(query))
    unit = torch.eye(length, dtype=query.dtype, device=query.device).expand(*rows.shape[:2], length, length)
    return causal_mean(rows, tokens, unit).view(*query.shape[:-1], length)


def _past(query: Tensor) -> Tensor:
    return torch.ones(query.shape[-2], query.shape[-2], dtype=torch.bool, device=query.device).tril()


def _dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention_weights(query, key - median(key), _past(query)) @ value  # the median keeps digits


def _fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The means by torch, whose kernels want as many values as keys in a head: zeros fill up the fewer."""
    width = max(query.shape[-1], value.shape[-1])
    query, key, filled = (torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in (query, key, value))
    mean = torch.nn.functional.scaled_dot_product_attention(query, key, filled, is_causal=True, scale=1.0)
    return mean[..., : value.shape[-1]].contiguous()


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Parts of the batch, their blocks of rows, and the weights of these, (b, H, rows, tokens)."""
    batch, heads, length, _ = query.shape
    count = max(1, _WEIGHTS // max(1, heads * min(_ROWS, length) * length))
    for start in range(0, batch, count):
        some = slice(start, start + count)
        for begin in range(0, length, _ROWS):
            rows = slice(begin, min(begin + _ROWS, length))
            logits = query[some, :, rows] @ key[some, :, : rows.stop].mT
            future = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(begin + 1)
            yield some, rows, logits.masked_fill_(future, -torch.inf).softmax(-1)


class _Distant(NamedTuple):
    """Rows whose logits or tokens are too large for the fused kernels, and what these may be given instead.

    Attributes:
        rows: True for such rows, (B, H, T, 1).
        problem: rows and tokens as they are.
        plain: query without those rows, key and value without the tokens that only they see.
    """

    rows: Tensor
    problem: Problem
    plain: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def find(cls, query: Tensor, key: Tensor, value: Tensor) -> _Distant | None:
        """Find such rows, if there are any; a large token counts for the rows that see it, and for no earlier one."""
        if query.dtype not in CANCELLATION or not query.numel():
            return None
        largest = torch.linalg.vector_norm(key, dim=-1).cummax(-1).values  # (B, H, T)
        kept = torch.linalg.vector_norm(query, dim=-1) * largest <= CANCELLATION[query.dtype]
        kept &= value.abs().amax(-1).cummax(-1).values.isfinite()
        if bool(kept.all()):
            return None
        rows = ~kept.unsqueeze(-1)
        place = torch.arange(query.shape[2], device=query.device)
        problem = Problem(query.unsqueeze(3), key, value, torch.zeros_like(place), place + 1, None, 1.0, 0.0)
        key, value = (part.masked_fill(~part.isfinite(), 0.0) for part in (key, value))
        return cls(rows, problem, (query.masked_fill(rows, 0.0), key, value))


@torch.library.custom_op("probattn::causal_mean", mutates_args=())
def _forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    distant = _Distant.find(query, key, value)
    plain = (query, key, value) if distant is None else distant.plain
    with torch.autocast(query.device.type, enabled=False):
        if query.device.type == "cpu" or query.dtype != torch.float64:
            mean = _fused(*plain)
        else:  # the fused kernels of a GPU are for single precision and less
            mean = value.new_empty(value.shape)
            for some, rows, weights in _blocks(*plain[:2]):
                mean[some, :, rows] = weights @ plain[2][some, :, : rows.stop]
        if distant is not None:
            for part in Rows.of(distant.problem, distant.rows):
                mean[part.place[:3]] = (part.origin + part.offset)[:, : value.shape[-1]]
    return mean


@torch.library.custom_op("probattn::causal_mean_backward", mutates_args=())
def _backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    distant = _Distant.find(query, key, value)
    plain = (query, key, value) if distant is None else distant.plain
    up = gradient if distant is None else gradient.masked_fill(distant.rows, 0.0)
    results = [torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in plain]
    with torch.autocast(query.device.type, enabled=False):
        for some, rows, weights in _blocks(*plain[:2]):
            q, k, v = plain[0][some, :, rows], plain[1][some, :, : rows.stop], plain[2][some, :, : rows.stop]
            slope = up[some, :, rows] @ v.mT
            slope = weights * (slope - (weights * slope).sum(-1, keepdim=True))  # of the logits
            results[0][some, :, rows] = slope @ k
            results[1][some, :, : rows.stop] += slope.mT @ q
            results[2][some, :, : rows.stop] += weights.mT @ up[some, :, rows]
        if distant is not None:
            for part in Rows.of(distant.problem, distant.rows):
                on_mean = torch.nn.functional.pad(gradient[part.place[:3]], (0, key.shape[-1]))
                found = part.backward(None, on_mean, None)
                results[0][part.place[:3]] = found[0]
                for whole, own in zip(results[1:], found[1:], strict=True):
                    whole[:, :, : own.shape[1]].index_put_(part.place[:2], own, accumulate=True)
    return results[0], results[1], results[2]


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return value.new_empty(value.shape)


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _folded(size: int, axes: tuple[int | None, ...], parts: tuple[Tensor, ...]) -> list[Tensor]:
    """Fold the axis of ``torch.func.vmap`` into the batch axis of tensors."""
    moved = (
        part.expand(size, *part.shape) if axis is None else part.movedim(axis, 0)
        for axis, part in zip(axes, parts, strict=True)
    )
    return [part.flatten(0, 1) for part in moved]


@_forward.register_vmap
def _(info: Any, axes: tuple[int | None, ...], *parts: Tensor) -> tuple[Tensor, int]:
    return _forward(*_folded(info.batch_size, axes, parts)).unflatten(0, (info.batch_size, -1)), 0


@_backward.register_vmap
def _(info: Any, axes: tuple[int | None, ...], *parts: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    results = _backward(*_folded(info.batch_size, axes, parts))
    return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0, 0)


class _Mean(torch.autograd.Function):
    """The two operators as one function that autograd, ``torch.func`` and ``torch.compile`` understand."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mean: Tensor = _forward(query, key, value)
        return mean

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        tensors = ctx.saved_tensors
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
            results: tuple[Tensor, ...] = torch.func.vjp(_dense, *tensors)[1](gradient)
        else:
            results = _backward(gradient, *tensors)
        return results


class _MeanForward(_Mean):
    """The same with forward-mode derivatives, which torch.compile does not support in custom functions."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        return pushforward(lambda *parts: (_dense(*parts),), ctx.saved_tensors, tangents)[0]
