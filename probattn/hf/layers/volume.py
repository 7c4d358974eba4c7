r"""The sum of log|det J_i| over positions of a layer with factors on its heads, and its gradient by these factors.

The queries of some heads may be changed too (:mod:`probattn.hf.layers.update`).

The graph of T blocks of p x p numbers is never held. A few positions at a time, each block is formed, factored once,
and its factorisation serves the determinant and

.. math:: \frac{\partial \log|\det(I - K)|}{\partial K} = -(I - K)^{-\top},

which is carried back at once to the heads' covariances and own weights, and to changed query maps. From there automatic
differentiation goes on to the gains, the inverse temperatures, the share and the factors of a change of low rank
through one pass of the attention. Derived here.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.hf.layers.factors import LayerFactors
from probattn.hf.layers.layer import AttentionLayer
from probattn.hf.layers.scaling import HeadScaling
from probattn.hf.layers.update import QueryUpdate, updated, updated_layers
from probattn.numerics.linalg import TOGETHER
from probattn.numerics.lu import factor

__all__ = ["Volume", "VolumeMemory", "log_volume"]

_NUMBERS = 1 << 22  # numbers that the square matrices of a chunk of positions may hold
_COVARIANCES = 1 << 25  # numbers that the covariances of a group of sequences may hold
_KEPT = 4  # results that a memory keeps


class Volume(NamedTuple):
    """Log-determinants summed over positions.

    Attributes:
        value: sum of log|det J_i|, ``(*batch,)``, differentiable once in the factors on the heads and in the update.
        smallest_sign: the smallest sign of det J_i at the positions, ``(*batch,)``.
    """

    value: Tensor
    smallest_sign: Tensor


class _Result(NamedTuple):
    value: Tensor  # (B,)
    sign: Tensor  # (B,)
    # By gain, inverse temperature and share of each sequence; by A and B of each update.
    gradient: tuple[Tensor, ...] | None


class VolumeMemory:
    """The last few results by their factors, for evaluations in which only other parameters change.

    Differences by the scales of a noise, for example, leave the determinants as they are.
    """

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[Any, ...], tuple[Tensor, _Result]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_kept": OrderedDict()}

    def find(
        self, u: Tensor, rows: Tensor, scaling: HeadScaling, gradient: bool, update: QueryUpdate | None = None
    ) -> _Result | None:
        """The result for the same tokens, positions, factors and update, if it is known."""
        key = _key(u, rows, scaling, update)
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        result = self._kept[key][1]
        return None if gradient and result.gradient is None else result

    def keep(
        self, u: Tensor, rows: Tensor, scaling: HeadScaling, result: _Result, update: QueryUpdate | None = None
    ) -> None:
        """Remember a result, and forget the oldest."""
        # The tokens are kept alive, so that no others have their place.
        self._kept[_key(u, rows, scaling, update)] = (u, result)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)


def log_volume(
    layer: AttentionLayer,
    u: Tensor,
    rows: Tensor | None = None,
    *,
    update: QueryUpdate | None = None,
    memory: VolumeMemory | None = None,
) -> Volume:
    r"""Sum log|det J_i| over positions, with a gradient by the factors on the heads and by a change of the queries.

    Args:
        layer: a layer with factors, from :meth:`AttentionLayer.scaled`; its parameters count as constants.
        u: tokens, ``(*batch, T, p)``, constants too.
        rows: positions, ``(P,)``, increasing; None: all.
        update: changes of low rank of the queries of some heads, with batch axes or none.
        memory: results that are known, if they are to be used again.

    Returns:
        :class:`Volume`. Time per position O(m^3) with m = min(p, H dv): a factorisation, and with the gradient an
        inverse; memory O(H P r dv) per sequence and a few matrices of m x m. Updates are taken one after the other. A
        gradient in which the sequences of one update have different weights is computed again, one at a time.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from probattn.hf import attention_layer
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> layer = attention_layer(LlamaForCausalLM(config), 0)
        >>> gain = torch.ones(2, requires_grad=True)
        >>> log_volume(layer.scaled(gain), torch.randn(4, 8)).value.backward()
        >>> gain.grad.shape
        torch.Size([2])
    """
    scaling = layer.scaled().scaling if layer.scaling is None else layer.scaling
    assert scaling is not None
    batch = torch.broadcast_shapes(u.shape[:-2], layer.batch_shape, () if update is None else update.batch_shape)
    rows = torch.arange(u.shape[-2], device=u.device) if rows is None else rows
    heads, *changes = (None,) if update is None else update
    value, sign = _Volume.apply(layer, u, rows, memory, heads, *scaling.expand(batch), *changes)  # type: ignore[no-untyped-call]
    return Volume(value, sign)


_LEAVES = 5  # the first argument of the function below that has a gradient


class _Volume(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        layer: AttentionLayer,
        u: Tensor,
        rows: Tensor,
        memory: VolumeMemory | None,
        heads: tuple[int, ...] | None,
        gain: Tensor,
        inverse_temperature: Tensor,
        share: Tensor,
        *changes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        scaling, batch = HeadScaling(gain, inverse_temperature, share), share.shape
        update = None if heads is None else QueryUpdate(heads, *changes)
        wanted = any(ctx.needs_input_grad[_LEAVES:])
        result = None if memory is None else memory.find(u, rows, scaling, wanted, update)
        if result is None:
            if update is None:
                tokens = u.detach().expand(*batch, *u.shape[-2:]).reshape(-1, *u.shape[-2:])
                result = _evaluate(_flattened(layer, batch), tokens, rows, scaling.flatten(), wanted)
            else:
                result = _evaluate_updated(replace(layer, scaling=scaling), u.detach(), rows, update, wanted)
            if memory is not None:
                memory.keep(u, rows, scaling, result, update)
        if wanted and result.gradient is not None:
            ctx.save_for_backward(*result.gradient)
        if update is not None:
            ctx.alone = partial(
                _evaluate_updated, replace(layer, scaling=scaling), u.detach(), rows, update, True, alone=True
            )
            ctx.lead = update.batch_shape
        sign = result.sign.reshape(batch).clone()
        ctx.mark_non_differentiable(sign)
        return result.value.reshape(batch).clone(), sign

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        factors, changes = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
        weights = grad.reshape(-1)
        found = [(_beside(weights, part) * part).reshape((*grad.shape, *part.shape[1:])) for part in factors]
        if changes:
            places = _places(ctx.lead, grad.shape).to(grad.device)
            least, most = (
                weights.new_zeros(len(changes[0])).scatter_reduce(0, places, weights, how, include_self=False)
                for how in ("amin", "amax")
            )
            if torch.equal(least, most):
                changes = [_beside(least, part) * part for part in changes]
            else:
                each = ctx.alone().gradient[3:]
                changes = [
                    torch.zeros_like(whole).index_add(0, places, _beside(weights, part) * part)
                    for whole, part in zip(changes, each, strict=True)
                ]
            found += [part.reshape((*ctx.lead, *part.shape[1:])) for part in changes]
        return (*[None] * _LEAVES, *found)


def _beside(weights: Tensor, part: Tensor) -> Tensor:
    """Weights ``(B,)`` with the axes of a part ``(B, *event)``."""
    return weights.reshape(-1, *[1] * (part.dim() - 1))


def _places(lead: torch.Size, batch: torch.Size) -> Tensor:
    """Number of the update that each sequence of a batch has, ``(B,)``."""
    return torch.arange(lead.numel()).reshape(lead).expand(batch).reshape(-1)


def _key(u: Tensor, rows: Tensor, scaling: HeadScaling, update: QueryUpdate | None) -> tuple[Any, ...]:
    parts: tuple[Any, ...] = (*scaling, *(() if update is None else update[1:]))
    numbers = tuple(part.detach().cpu().contiguous().numpy().tobytes() for part in parts)
    heads = None if update is None else update.heads
    return (u.data_ptr(), tuple(u.shape), u._version, tuple(rows.tolist()), heads, *numbers)


def _evaluate_updated(
    layer: AttentionLayer, u: Tensor, rows: Tensor, update: QueryUpdate, gradient: bool, *, alone: bool = False
) -> _Result:
    """The sequences of one update after those of another; the gradient by it is their sum, or that of each alone."""
    assert layer.scaling is not None
    batch = layer.scaling.batch_shape
    tokens = u.expand(*batch, *u.shape[-2:]).reshape(-1, *u.shape[-2:])
    found, places, changes = [], [], []
    for one, change, index in updated_layers(layer, update, batch):
        assert one.scaling is not None
        parts = torch.arange(len(index), device=u.device).split(1 if alone else _together(layer, rows))
        groups = [
            _group(_chosen(one, part), tokens[index[part]], rows, one.scaling.select((part,)), gradient, change)
            for part in parts
        ]
        found.extend(groups)
        places.append(index)
        if gradient:
            own = zip(*(group.gradient[3:] for group in groups if group.gradient is not None), strict=True)
            changes.append([torch.cat(part) if alone else torch.cat(part).sum(0, keepdim=True) for part in own])
    order = torch.cat(places).argsort()
    value, sign = (torch.cat([getattr(one, name) for one in found])[order] for name in ("value", "sign"))
    if not gradient:
        return _Result(value, sign, None)
    factors = zip(*(one.gradient[:3] for one in found if one.gradient is not None), strict=True)
    by_update = [torch.cat(part) for part in zip(*changes, strict=True)]
    by_update = [part[order] for part in by_update] if alone else by_update
    return _Result(value, sign, (*(torch.cat(part)[order] for part in factors), *by_update))


def _evaluate(layer: AttentionLayer, u: Tensor, rows: Tensor, scaling: HeadScaling, gradient: bool) -> _Result:
    """A group of sequences at a time, ``(B, T, p)``; positions and mask of the layer have one batch axis or none."""
    found = []
    for part in torch.arange(len(u), device=u.device).split(_together(layer, rows)):
        found.append(_group(_chosen(layer, part), u[part], rows, scaling.select((part,)), gradient))
    value, sign = (torch.cat([getattr(one, name) for one in found]) for name in ("value", "sign"))
    gradients = [one.gradient for one in found if one.gradient is not None]
    if not gradients:
        return _Result(value, sign, None)
    return _Result(value, sign, tuple(torch.cat(parts) for parts in zip(*gradients, strict=True)))


def _together(layer: AttentionLayer, rows: Tensor) -> int:
    """Number of sequences in a group."""
    sublayer = layer.sublayer
    each = len(rows) * sublayer.output[0].numel() * sublayer.query.weight.shape[1]
    return max(1, _COVARIANCES // each)


def _chosen(layer: AttentionLayer, part: Tensor) -> AttentionLayer:
    """The layer for some sequences, without factors on its heads and without a graph."""
    own: dict[str, Any] = {
        name: given if given is None or given.dim() == axes else given[part]
        for name, given, axes in (("positions", layer.positions, 1), ("visible", layer.visible, 2))
    }
    return replace(layer, attached=False, batch_shape=torch.Size(), scaling=None, **own)


def _group(
    layer: AttentionLayer,
    u: Tensor,
    rows: Tensor,
    scaling: HeadScaling,
    gradient: bool,
    update: QueryUpdate | None = None,
) -> _Result:
    with torch.set_grad_enabled(gradient):
        leaves = [
            part.detach().requires_grad_(gradient) for part in (*scaling, *(() if update is None else update[1:]))
        ]
        scaled = layer.scaled(*leaves[:3])
        scaled = scaled if update is None else updated(scaled, QueryUpdate(update.heads, *leaves[3:]))
        factors = scaled.mean_and_factors(u, rows).factors
        parts = _parts(factors)
        kept = [part.detach().requires_grad_(gradient and part.requires_grad) for part in parts]
        query = factors.query.detach().requires_grad_(gradient and factors.query.requires_grad)
        values, signs = [], []
        size = min(len(factors.output), factors.size)
        count = len(factors.own_weight)
        step = max(1, _NUMBERS // size**2)
        for start in range(0, count, step):
            some = _slice(factors._replace(query=query), kept, slice(start, start + step))
            sign, value = _chunk(some, gradient)
            values.append(value)
            signs.append(sign)
        value, sign = (torch.cat(found).view(len(u), len(rows)) for found in (values, signs))
        if not gradient:
            return _Result(value.sum(-1), sign.amin(-1), None)
        both = zip([*parts, factors.query], [*kept, query], strict=True)
        pairs = [(part, one.grad) for part, one in both if one.grad is not None]
        outer = torch.autograd.grad(
            [part for part, _ in pairs], leaves, [grad for _, grad in pairs], materialize_grads=True
        )
        changes = tuple(part.unsqueeze(0) for part in outer[3:])  # (1, *event), the sum over the sequences
        return _Result(value.sum(-1), sign.amin(-1), (*outer[:3], *changes))


def _chunk(factors: LayerFactors, gradient: bool) -> tuple[Tensor, Tensor]:
    """Signs and log-determinants of some blocks, ``(n,)`` each; the gradient goes to the parts of the factors."""
    if not gradient and TOGETHER < factors.size <= len(factors.output):
        return factor(factors.identity_less_core(), overwrite=True).logabsdet()
    core = factors.sylvester_core()
    with torch.no_grad():
        identity = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        factored = factor(identity - core.detach(), overwrite=True)
        sign, value = factored.logabsdet()
        inverse = factored.solve(identity.expand_as(core), transposed=True) if gradient else None
    if inverse is not None:
        core.backward(-inverse)
    return sign, value


def _parts(factors: LayerFactors) -> list[Tensor]:
    """Quantities that depend on the factors on the heads."""
    parts = [factors.covariance, factors.own_weight, factors.own_value, factors.own_key]
    if factors.output_norm is not None:
        parts += [factors.output_norm.scale, factors.output_norm.directions]
    return parts


def _slice(factors: LayerFactors, parts: list[Tensor], part: slice) -> LayerFactors:
    """The factors at some of the N tokens, with other tensors in the place of :func:`_parts`."""
    covariance, own_weight, own_value, own_key, *behind = (one[part] for one in parts)
    norm, output_norm = factors.norm, factors.output_norm
    if norm is not None:
        norm = norm._replace(scale=norm.scale[part], directions=norm.directions[part])
    if output_norm is not None:
        output_norm = output_norm._replace(scale=behind[0], directions=behind[1])
    return factors._replace(
        covariance=covariance,
        own_weight=own_weight,
        own_value=own_value,
        own_key=own_key,
        norm=norm,
        output_norm=output_norm,
        tokens=own_weight.shape[:1],
    )


def _flattened(layer: AttentionLayer, batch: torch.Size) -> AttentionLayer:
    """The layer with one batch axis in its positions and its mask, where these have any."""
    parts: dict[str, Any] = {}
    for name, given, axes in (("positions", layer.positions, 1), ("visible", layer.visible, 2)):
        if given is not None and given.dim() > axes:
            own = given.shape[-axes:]
            parts[name] = given.expand(*batch, *own).reshape(-1, *own)
    return replace(layer, **parts)
