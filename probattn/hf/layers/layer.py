"""The attention sublayer of a language model as an attention: mean, Jacobian blocks, determinants, attribution."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn import blocks
from probattn.errors import InputError
from probattn.hf.layers.context import LayerContext
from probattn.hf.layers.factors import LayerFactors, build_factors
from probattn.hf.layers.past import attend, average
from probattn.hf.layers.scaling import HeadScaling, head_scaling
from probattn.hf.layers.sublayer import Sublayer, averages_to_mean, mapped, project, same_parts
from probattn.interface import Mask
from probattn.moments.dense import SUPPORTED
from probattn.numerics import linalg

__all__ = ["AttentionLayer", "MeanAndLayerFactors"]

_NO_BATCH = torch.Size()
_NUMBERS = 1 << 24  # how many numbers the square matrices of a chunk of tokens may hold


class MeanAndLayerFactors(NamedTuple):
    """Mean and blocks at some positions.

    Attributes:
        mean: mu, ``(*batch, P, p)``.
        factors: M_i = dmu_i/du_i in factors, with tokens of shape ``(*batch, P)``.
    """

    mean: Tensor
    factors: LayerFactors


@dataclass(eq=False)
class AttentionLayer:
    r"""The attention sublayer of a ``transformers`` model as it is, on the residual stream before its norm.

    .. math::
        \mu_i(u) = O\Bigl(\sum_{s \le i} \alpha_{is} v_s\Bigr), \qquad
        \alpha_{is} \propto \exp(c\, q_i \cdot k_s), \qquad q_i, k_i, v_i = Q_i(u_i), K_i(u_i), V_i(u_i),

    so that the model's stream behind the attention is u + mu(u). The token is the stream *before* the norm: no number
    below depends on the basis in which a head keeps its queries, keys and values. Made by
    :func:`~probattn.hf.layers.attention_layer`. Parameters are read from the model at each call, and gradients flow to
    them; dropout is off.

    Attributes:
        read: returns the parameters as the model has them now.
        name: the model type.
        number: of the layer, from 0.
        dtype: in which everything is computed.
        positions: of the tokens for the rotation, ``(T,)`` or ``(*batch, T)`` whole numbers; None: 0, 1, ..., T - 1.
        visible: tokens that each token sees, ``(T, T)`` or ``(*batch, T, T)`` boolean; None: itself and its past within
            the window.
        batch_shape: batch axes, which broadcast with those of the tokens; the parameters have none.
        attached: whether gradients flow to the parameters.
        scaling: factors on the heads, see :meth:`scaled`; None: the layer as it was trained.
        mask: always "inclusive": a token attends to itself too.
    """

    read: Callable[[], Sublayer]
    name: str
    number: int
    dtype: torch.dtype
    positions: Tensor | None = None
    visible: Tensor | None = None
    batch_shape: torch.Size = _NO_BATCH
    attached: bool = True
    scaling: HeadScaling | None = None
    mask: Mask = field(default="inclusive", init=False)

    def __repr__(self) -> str:
        sublayer = self.sublayer
        sizes = f"heads={sublayer.heads}, keys={sublayer.groups}, dim={sublayer.dim}, dtype={self.dtype}"
        return f"AttentionLayer({self.name!r}, layer {self.number}, {sizes})"

    @property
    def sublayer(self) -> Sublayer:
        """The parameters, in this layer's precision."""

        def convert(part: Tensor) -> Tensor:
            return part.to(self.dtype) if self.attached else part.detach().to(self.dtype)

        scaling = (
            None if self.scaling is None else HeadScaling(*(part.to(self.dtype) for part in self.scaling.flatten()))
        )
        return mapped(convert, self.read())._replace(scaling=scaling)

    @property
    def dim(self) -> int:
        """p, the number of features of the residual stream."""
        return self.sublayer.dim

    @property
    def heads(self) -> int:
        """H."""
        return self.sublayer.heads

    @property
    def like(self) -> Tensor:
        """A parameter, for its dtype and device."""
        return self.sublayer.output

    def at(self, positions: Tensor) -> AttentionLayer:
        """The same layer with the positions of its tokens, ``(T,)`` or ``(*batch, T)`` whole numbers."""
        return replace(self, positions=positions)

    def seeing(self, visible: Tensor) -> AttentionLayer:
        """The same layer with the tokens that each token sees, ``(T, T)`` or ``(*batch, T, T)`` boolean.

        The blocks are those of the Jacobian in a token by itself also where a mask looks ahead; their determinants
        make up that of the whole only where it does not.
        """
        if visible.dtype != torch.bool:
            raise InputError(f"visible is {visible.dtype}; it must be boolean, True where a token is seen.")
        return replace(self, visible=visible)

    def to(self, dtype: torch.dtype) -> AttentionLayer:
        """The same layer in another precision, float32 or float64."""
        _require_precision(dtype)
        return replace(self, dtype=dtype)

    def detach(self) -> AttentionLayer:
        """The same layer cut off from the graph of its parameters."""
        return replace(self, attached=False, scaling=None if self.scaling is None else self.scaling.detach())

    def expand(self, batch_shape: Any) -> AttentionLayer:
        """The same layer with batch axes, for processes that have some; the parameters broadcast."""
        return replace(self, batch_shape=torch.Size(batch_shape))

    def scaled(
        self,
        gain: float | Tensor = 1.0,
        inverse_temperature: float | Tensor = 1.0,
        share: float | Tensor = 1.0,
    ) -> AttentionLayer:
        r"""The same layer with its heads made stronger or weaker, sharper or flatter.

        .. math::
            \mu_i = s\, N_o\Bigl(\sum_h g_h W_O^h \bar v^h_i(\tau_h) + b_O\Bigr), \qquad
            \alpha^h_{it} \propto \exp(c\, \tau_h\, q^h_i \cdot k^h_t)

        Args:
            gain: g, a number or ``(*batch, H)``.
            inverse_temperature: tau, a number or ``(*batch, H)``; logits are multiplied by it before they are capped.
            share: s, a number or ``(*batch,)``; behind the norm of the output, where there is one.

        Returns:
            A layer whose batch axes are those of the factors too; gradients flow to the factors. They replace factors
            that were there.

        Raises:
            InputError: factors for another number of heads or of another precision.
        """
        scaling = head_scaling(self.heads, self.like, gain, inverse_temperature, share)
        batch = torch.broadcast_shapes(self.batch_shape, scaling.batch_shape)
        return replace(self, scaling=scaling, batch_shape=batch)

    def spread(self, batch: torch.Size) -> AttentionLayer:
        """The same layer with the factors on its heads expanded to batch axes."""
        return self if self.scaling is None else replace(self, scaling=self.scaling.expand(batch))

    def equals(self, other: object) -> bool:
        """True if another layer has the same parameters, rotation, precision, positions and mask."""
        if not isinstance(other, AttentionLayer):
            return False
        mine, theirs = ((self.dtype, self.positions, self.visible), (other.dtype, other.positions, other.visible))
        return self is other or (same_parts(mine, theirs) and same_parts(self.sublayer, other.sublayer))

    def mean(self, u: Tensor) -> Tensor:
        """The attention mean mu, what the sublayer adds to the stream, ``(*batch, T, p)``."""
        u, batch = self._tokens(u)
        sublayer = self.spread(batch).sublayer
        rows = torch.arange(u.shape[1], device=u.device)
        tokens = project(sublayer, u, self._positions(u, batch))
        mean, _ = averages_to_mean(sublayer, average(sublayer, tokens, rows, self._mask(u, batch)))
        return mean.reshape(*batch, *mean.shape[1:])

    def residual(self, u: Tensor) -> Tensor:
        """The residual map e = u - mu(u), ``(*batch, T, p)``."""
        return u - self.mean(u)

    def mean_and_factors(self, u: Tensor, rows: Tensor | None = None) -> MeanAndLayerFactors:
        """Mean and blocks in factors, in one pass.

        Args:
            u: tokens of the whole sequence, ``(*batch, T, p)``.
            rows: positions to evaluate, ``(P,)``, increasing; None: all T.

        Returns:
            :class:`MeanAndLayerFactors`. Time O(H T P r dv), memory O(H P r dv).
        """
        chunks = list(self._chunks(u, rows, None))
        return chunks[0]

    def mean_jacobian(self, u: Tensor, rows: Tensor | None = None) -> Tensor:
        """Diagonal blocks M_i = dmu_i/du_i, ``(*batch, P, p, p)``.

        Args:
            u: tokens, ``(*batch, T, p)``.
            rows: as in :meth:`mean_and_factors`.
        """
        parts = [part.factors.mean_jacobian() for part in self._chunks(u, rows, self.dim)]
        return torch.cat(parts, -3)

    def jacobian(self, u: Tensor, rows: Tensor | None = None) -> Tensor:
        """Diagonal blocks J_i = I - M_i, ``(*batch, P, p, p)``."""
        return torch.eye(self.dim, dtype=u.dtype, device=u.device) - self.mean_jacobian(u, rows)

    def core(self, u: Tensor, rows: Tensor | None = None) -> Tensor:
        """The smallest matrix with the determinant det(I - K) = det J and the non-zero eigenvalues of M.

        Args:
            u: tokens, ``(*batch, T, p)``.
            rows: as in :meth:`mean_and_factors`.

        Returns:
            K, ``(*batch, P, m, m)``, m = min(p, H dv).
        """
        parts = [part.factors.sylvester_core() for part in self._chunks(u, rows, self._size())]
        return torch.cat(parts, -3)

    def logabsdet(self, u: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sign and ``log|det J_i|``, in chunks of tokens.

        Args:
            u: tokens, ``(*batch, T, p)``.
            rows: as in :meth:`mean_and_factors`.

        Returns:
            sign and ``log|det J_i|``, ``(*batch, P)`` each.
        """
        found = [
            blocks.logabsdet_one_minus(part.factors.sylvester_core()) for part in self._chunks(u, rows, self._size())
        ]
        sign, value = (torch.cat(parts, -1) for parts in zip(*found, strict=True))
        return sign, value

    def residual_and_logabsdet(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The residual, ``(*batch, T, p)``, and ``log|det J_i|``, ``(*batch, T)``, in one pass."""
        means, values = [], []
        for part in self._chunks(u, None, self._size()):
            means.append(part.mean)
            values.append(blocks.logabsdet_one_minus(part.factors.sylvester_core())[1])
        return u - torch.cat(means, -2), torch.cat(values, -1)

    def head_attribution(self, u: Tensor, rows: Tensor | None = None) -> Tensor:
        r"""Contribution of each head to the block's volume: -tr(J_i^-1 M_i^h), with M_i = sum_h M_i^h.

        .. math::
            -\mathrm{tr}(J^{-1} M^h) = r_v - \mathrm{tr}_h (I - K)^{-1}

        with tr_h over the features of head h in the core K, and r_v their number. Without a norm behind the attention
        this is the derivative of ``log|det J_i|`` by a gain of the head at one; it does not depend on a basis, and its
        sum over heads is -tr(J^-1 M). Derived here.

        Args:
            u: tokens, ``(*batch, T, p)``.
            rows: as in :meth:`mean_and_factors`.

        Returns:
            ``(*batch, P, H)``.
        """
        sublayer = self.sublayer
        size = sublayer.output.shape[2]
        identity = torch.eye(sublayer.heads * size, dtype=self.dtype, device=u.device)
        found = []
        for part in self._chunks(u, rows, sublayer.heads * size):
            inverse = linalg.inverse(identity - part.factors.head_core(), check=False)  # NaN where there is none
            found.append(size - inverse.diagonal(dim1=-2, dim2=-1).unflatten(-1, (-1, size)).sum(-1))
        return torch.cat(found, -2)

    def context(self, u: Tensor) -> LayerContext:
        """Keys and values of tokens u, ``(*batch, n, p)``, for the token that comes next; n may be 0."""
        return LayerContext.of(self, u)

    def next_mean_and_jacobian(self, context: LayerContext, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and Jacobian of one new token behind a context.

        Args:
            context: keys and values of the past.
            candidates: ``(*candidates, *batch, p)``.

        Returns:
            mu, ``(*candidates, *batch, p)``, and J = I - dmu/du, ``(*candidates, *batch, p, p)``.
        """
        return context.mean_and_jacobian(candidates)

    def _size(self) -> int:
        sublayer = self.sublayer
        return min(sublayer.dim, sublayer.heads * sublayer.output.shape[2])

    def _chunks(self, u: Tensor, rows: Tensor | None, size: int | None) -> Iterator[MeanAndLayerFactors]:
        """Mean and factors for some rows at a time, whose matrices of a size fit into a chunk; None: all at once."""
        u, batch = self._tokens(u)
        rows = torch.arange(u.shape[1], device=u.device) if rows is None else _require_rows(rows, u.shape[1])
        sublayer, mask = self.spread(batch).sublayer, self._mask(u, batch)
        tokens = project(sublayer, u, self._positions(u, batch))
        step = len(rows) if size is None else max(1, _NUMBERS // (size * size * len(u)))
        for part in rows.split(max(1, step)):
            attended = attend(sublayer, tokens, part, mask)
            mean, before = averages_to_mean(sublayer, attended.average)
            factors = build_factors(sublayer, u, tokens, attended, before, part)
            shape = torch.Size((*batch, len(part)))
            yield MeanAndLayerFactors(mean.reshape(*shape, -1), factors._replace(tokens=shape))

    def _tokens(self, u: Tensor) -> tuple[Tensor, torch.Size]:
        """Tokens with one batch axis, and the batch axes that it stands for."""
        sublayer = self.sublayer
        if u.dim() < 2 or u.shape[-1] != sublayer.dim or u.shape[-2] < 1:
            raise InputError(
                f"u has shape {tuple(u.shape)}; it must be (*batch, T, p) with the p = {sublayer.dim} features of the "
                "residual stream in the last axis and at least one token in the one before."
            )
        like = sublayer.output
        if (u.dtype, u.device) != (like.dtype, like.device):
            raise InputError(
                f"u is {u.dtype} on {u.device} but the layer computes in {like.dtype} on {like.device}; convert one of "
                "them: layer.to(dtype) or u.to(...)."
            )
        batch = torch.broadcast_shapes(u.shape[:-2], self.batch_shape)
        return u.expand(*batch, *u.shape[-2:]).reshape(-1, *u.shape[-2:]), batch

    def _positions(self, u: Tensor, batch: torch.Size) -> Tensor:
        """Positions, ``(1 or B, T)``."""
        if self.positions is None:
            return torch.arange(u.shape[1], device=u.device).unsqueeze(0)
        return _fitted("positions", self.positions, u, batch, 1)

    def _mask(self, u: Tensor, batch: torch.Size) -> Tensor | None:
        """The mask, ``(1 or B, 1, T, T)``; None: there is none."""
        return None if self.visible is None else _fitted("visible", self.visible, u, batch, 2).unsqueeze(1)


def _fitted(name: str, given: Tensor, u: Tensor, batch: torch.Size, axes: int) -> Tensor:
    """Inputs per token, or per pair of tokens, with one batch axis."""
    shape = given.shape[-axes:]
    try:
        fits = shape == u.shape[1:2] * axes and torch.broadcast_shapes(given.shape[:-axes], batch) == batch
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"{name} has shape {tuple(given.shape)}; for tokens with batch axes {tuple(batch)} its last "
            f"{axes} axes must be {u.shape[1]} long and those before broadcast to {tuple(batch)}."
        )
    given = given.to(u.device)
    if given.dim() == axes:
        return given.unsqueeze(0)
    return given.expand(*batch, *shape).reshape(-1, *shape)


def _require_rows(rows: Tensor, length: int) -> Tensor:
    if (
        rows.dim() != 1
        or not len(rows)
        or bool((rows.diff() <= 0).any())
        or not 0 <= int(rows[0]) <= int(rows[-1]) < length
    ):
        raise InputError(
            f"rows is {rows.tolist() if rows.numel() < 20 else tuple(rows.shape)}; it must hold increasing positions "
            f"between 0 and {length - 1}, at least one."
        )
    return rows


def _require_precision(dtype: torch.dtype) -> None:
    if dtype not in SUPPORTED:
        raise InputError(f"dtype is {dtype}; log-determinants need float32 or float64.")
