r"""A change of low rank in the query maps of some heads of a layer, which is one of their QK products.

.. math:: W_Q^h \to W_Q^h + B^h A^h, \qquad A^h \in \mathbb R^{R \times p}, \quad B^h \in \mathbb R^{r \times R}

Without a norm of the queries, logits are :math:`l_{it} = c\,(W_Q x_i + b_Q)^\top R_i^\top R_t\, k_t`, so that head h
compares tokens by the products :math:`W_Q^\top R_i^\top R_t W_K`, one for each relative position. All of them change
by

.. math:: (A^h)^\top \bigl( (B^h)^\top R_i^\top R_t W_K \bigr) ,

which has rank R at most, at every position. Every change :math:`A^\top C^\top` of the product that leaves the keys as
they are is of this kind: the columns of C then lie in the row space of W_K, so that :math:`C^\top = B^\top W_K`. The
keys have to stay, as several heads may share one W_K and all would change with it, while W_Q belongs to one head. A and
B are known up to :math:`(G A, B G^{-1})`; only :math:`B A` enters the layer.

With a norm of the queries (Qwen3, Gemma 3) the change stands inside the norm and is that of the weights all the same.
Derived here; the form is that of adapters (Hu et al., 2021, arXiv 2106.09685).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.layers.layer import AttentionLayer
from probattn.hf.layers.sublayer import Sublayer, mapped, project

__all__ = [
    "QueryUpdate",
    "UpdateSize",
    "logit_change",
    "query_update",
    "relative_size",
    "require_heads",
    "updated",
    "updated_layers",
    "updated_residual",
]


class QueryUpdate(NamedTuple):
    """Changes B A of the query maps of some heads.

    Attributes:
        heads: their numbers, increasing.
        down: A, ``(*batch, n, R, p)`` for n heads.
        up: B, ``(*batch, n, r, R)``.
    """

    heads: tuple[int, ...]
    down: Tensor
    up: Tensor

    @property
    def batch_shape(self) -> torch.Size:
        """Batch axes."""
        return self.down.shape[:-3]

    @property
    def product(self) -> Tensor:
        """B A, ``(*batch, n, r, p)``."""
        return self.up @ self.down

    def at(self, place: int) -> QueryUpdate:
        """One update of the batch, without batch axes.

        Args:
            place: its place in the flattened batch.
        """
        down, up = (part.reshape(-1, *part.shape[-3:])[place] for part in (self.down, self.up))
        return QueryUpdate(self.heads, down, up)


def require_heads(name: str, heads: Sequence[int], count: int) -> tuple[int, ...]:
    """Check numbers of heads.

    Args:
        name: name of the argument, for the message.
        heads: numbers, increasing.
        count: number of heads of the layer.

    Returns:
        The numbers.

    Raises:
        InputError: no number, numbers out of order or twice, or heads that the layer has not.
    """
    chosen = tuple(heads)
    if not chosen or list(chosen) != sorted(set(chosen)) or not 0 <= chosen[0] <= chosen[-1] < count:
        raise InputError(
            f"{name} is {list(chosen)}; it must hold increasing numbers from 0 to {count - 1}, at least one."
        )
    return chosen


def query_update(layer: AttentionLayer, heads: Sequence[int], down: Tensor, up: Tensor) -> QueryUpdate:
    """Check a change of low rank against a layer.

    Args:
        layer: layer whose queries change.
        heads: numbers of n heads, increasing.
        down: A, ``(*batch, n, R, p)``.
        up: B, ``(*batch, n, r, R)``.

    Returns:
        :class:`QueryUpdate` with batch axes expanded to each other; gradients flow to A and B.

    Raises:
        InputError: heads that the layer has not, or factors of other shapes, precision or device.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from probattn.hf import attention_layer
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> layer = attention_layer(LlamaForCausalLM(config), 0)
        >>> update = query_update(layer, [1], torch.ones(1, 1, 8), torch.zeros(1, 4, 1))
        >>> bool((updated(layer, update).mean(torch.ones(3, 8)) == layer.mean(torch.ones(3, 8))).all())
        True
    """
    sublayer = layer.sublayer
    chosen = require_heads("heads", heads, sublayer.heads)
    size, dim = sublayer.query.weight.shape[1:]
    shapes = f"down has shape {tuple(down.shape)} and up {tuple(up.shape)}"
    if down.dim() < 3 or up.dim() < 3 or down.shape[-2] != up.shape[-1] or down.shape[-2] < 1:
        raise InputError(f"{shapes}; they must be (*batch, n, R, p) and (*batch, n, r, R) with R at least 1.")
    if (down.shape[-3], down.shape[-1]) != (len(chosen), dim) or up.shape[-3:-1] != (len(chosen), size):
        raise InputError(f"{shapes}; for {len(chosen)} heads of this layer n, r, p are {len(chosen)}, {size}, {dim}.")
    for name, part in (("down", down), ("up", up)):
        if (part.dtype, part.device) != (sublayer.output.dtype, sublayer.output.device):
            raise InputError(
                f"{name} is {part.dtype} on {part.device} and the layer computes in {sublayer.output.dtype} on "
                f"{sublayer.output.device}; convert one of them."
            )
    try:
        batch = torch.broadcast_shapes(down.shape[:-3], up.shape[:-3])
    except RuntimeError:
        raise InputError(f"{shapes}; their batch axes must broadcast.") from None
    return QueryUpdate(chosen, down.expand(*batch, *down.shape[-3:]), up.expand(*batch, *up.shape[-3:]))


def updated(layer: AttentionLayer, update: QueryUpdate) -> AttentionLayer:
    """The layer with changed query maps, an attention like any other.

    Args:
        layer: layer to change; factors on its heads stay.
        update: change without batch axes, or with such of size one.

    Returns:
        A layer whose gradients flow to A and B, and to the parameters where those of the layer given did.

    Raises:
        InputError: several changes, which belong to several layers.
    """
    if update.batch_shape.numel() != 1:
        raise InputError(
            f"the update has batch axes {tuple(update.batch_shape)}; a layer has one change of its queries: take one "
            "of them with update.at(place)."
        )
    read = partial(_read, layer.read, layer.dtype, layer.attached, update.at(0))
    return replace(layer, read=read, attached=True)


def updated_layers(
    layer: AttentionLayer, update: QueryUpdate, batch: torch.Size
) -> Iterator[tuple[AttentionLayer, QueryUpdate, Tensor]]:
    """The layers of a batch, one for each update, before the update.

    Args:
        layer: layer, whose factors on heads, positions and mask may have batch axes.
        update: changes with batch axes.
        batch: batch axes of all together.

    Yields:
        The layer for the sequences that one update serves, their batch axes flattened to one; the update; the places of
        these sequences in the flattened batch, ``(n,)``.
    """
    places = torch.arange(update.batch_shape.numel()).reshape(update.batch_shape).expand(batch).reshape(-1)
    parts: dict[str, Tensor | None] = {}
    for name, given, axes in (("positions", layer.positions, 1), ("visible", layer.visible, 2)):
        parts[name] = given
        if given is not None and given.dim() > axes:
            parts[name] = given.expand(*batch, *given.shape[-axes:]).flatten(0, -axes - 1)
    scaling = None if layer.scaling is None else layer.scaling.expand(batch).flatten()
    for place in range(update.batch_shape.numel()):
        index = (places == place).nonzero().flatten().to(layer.like.device)
        changes: dict[str, Any] = {
            name: part if part is None or part is getattr(layer, name) else part[index] for name, part in parts.items()
        }
        chosen = None if scaling is None else scaling.select((index,))
        yield replace(layer, scaling=chosen, batch_shape=torch.Size(), **changes), update.at(place), index


def updated_residual(layer: AttentionLayer, update: QueryUpdate, u: Tensor) -> Tensor:
    """The residual map e = u - mu(u) of the layers of a batch of updates.

    Args:
        layer: layer before the update.
        update: changes, with batch axes or none.
        u: tokens, ``(*batch, T, p)``.

    Returns:
        ``(*batch, T, p)`` with the batch axes of tokens, layer and updates broadcast. Time that of one pass of the
        attention for each update.
    """
    batch = torch.broadcast_shapes(u.shape[:-2], layer.batch_shape, update.batch_shape)
    flat = u.expand(*batch, *u.shape[-2:]).reshape(-1, *u.shape[-2:])
    found, places = [], []
    for one, change, index in updated_layers(layer, update, batch):
        found.append(updated(one, change).residual(flat[index]))
        places.append(index)
    order = torch.cat(places).argsort()
    return torch.cat(found)[order].reshape(*batch, *u.shape[-2:])


class UpdateSize(NamedTuple):
    """Size of the change of a QK product beside the product itself, both at relative position 0.

    Attributes:
        frobenius: ratio of the Frobenius norms, ``(*batch, n)``.
        spectral: ratio of the largest singular values, ``(*batch, n)``.
    """

    frobenius: Tensor
    spectral: Tensor


@torch.no_grad()
def relative_size(layer: AttentionLayer, update: QueryUpdate) -> UpdateSize:
    r"""Norms of the change of the QK products, relative to those of the products as trained.

    .. math:: \frac{\lVert A^\top B^\top W_K \rVert}{\lVert W_Q^\top W_K \rVert}

    The norm in front of the projections belongs to no map and is left out. The numbers do not depend on how B A is
    written as a product.

    Args:
        layer: layer before the update.
        update: changes.

    Returns:
        :class:`UpdateSize`. Time O(n r p (R + r)), by factors and not by matrices p x p.
    """
    sublayer = layer.sublayer
    chosen = list(update.heads)
    key = sublayer.key.weight[[head // (sublayer.heads // sublayer.groups) for head in chosen]]  # (n, r, p)
    query = sublayer.query.weight[chosen]
    values = _singular_values(update.down, update.up.mT @ key)
    trained = _singular_values(query, key)
    return UpdateSize(values.norm(dim=-1) / trained.norm(dim=-1), values[..., 0] / trained[..., 0])


@torch.no_grad()
def logit_change(layer: AttentionLayer, update: QueryUpdate, u: Tensor, given: int = 0) -> Tensor:
    r"""Root mean square of what an update changes in the logits, less what it changes alike for all tokens seen.

    .. math:: \delta_{it} = l'_{it} - l_{it}, \qquad
        \sqrt{\operatorname{mean}_{i,t} \bigl( \delta_{it} - \operatorname{mean}_t \delta_{it} \bigr)^2}

    over tokens i behind the given ones and the tokens t that they see. A constant along t changes no weight of the
    attention. Logits are those at inverse temperature 1, before a cap.

    Args:
        layer: layer before the update, without mask or positions of its own.
        update: changes, ``(*batch,)``.
        u: tokens, ``(N, T, p)``.
        given: number of first tokens that do not count as i.

    Returns:
        ``(*batch, n)``. Time O(N T (R p + R r + T r)) for each change, one change after the other.
    """
    sublayer, length = layer.sublayer._replace(scaling=None), u.shape[1]
    place = torch.arange(length, device=u.device)
    tokens = project(sublayer, u, place.unsqueeze(0))
    x = u if sublayer.norm is None else sublayer.norm(u)
    group = sublayer.heads // sublayer.groups
    chosen = list(update.heads)
    key = tokens.key[:, [head // group for head in chosen]]  # (N, n, T, r)
    raw = tokens.raw_query.transpose(2, 3).flatten(1, 2)[:, chosen]
    before = tokens.query.transpose(2, 3).flatten(1, 2)[:, chosen]
    seen = place <= place.unsqueeze(-1)
    if sublayer.window is not None:
        seen = seen & (place > place.unsqueeze(-1) - sublayer.window)
    seen = seen[given:].to(u.dtype)  # (T - given, T)
    count = seen.sum(-1, keepdim=True)
    found = []
    for k in range(update.batch_shape.numel()):
        one = update.at(k)
        query = raw + (x.unsqueeze(1) @ one.down.mT) @ one.up.mT  # (N, n, T, r)
        query = query if sublayer.query_norm is None else sublayer.query_norm(query)
        query = query if tokens.rotation is None else tokens.rotation.unsqueeze(1)(query)
        change = sublayer.scale * (query - before)[:, :, given:] @ key.mT  # (N, n, T - given, T)
        change = seen * (change - (seen * change).sum(-1, keepdim=True) / count)
        found.append((change.square().sum((0, 2, 3)) / (len(u) * seen.sum())).sqrt())
    return torch.stack(found).reshape(*update.batch_shape, len(chosen))


def _read(read: Any, dtype: torch.dtype, attached: bool, update: QueryUpdate) -> Sublayer:
    """The parameters with changed query maps."""
    sublayer: Sublayer = read()
    sublayer = sublayer if attached else mapped(Tensor.detach, sublayer)
    weight = sublayer.query.weight.to(dtype)
    index = torch.tensor(update.heads, device=weight.device)
    changed = weight.index_add(0, index, update.product.to(dtype))
    return sublayer._replace(query=sublayer.query._replace(weight=changed))


def _singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of L^T M, ``(*batch, R)``, for wide L and M, ``(*batch, R, p)``, without forming p x p."""
    first, second = (torch.linalg.qr(part.mT, mode="r")[1] for part in (left, right))
    values: Tensor = torch.linalg.svdvals(first @ second.mT)
    return values
