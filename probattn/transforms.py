"""The bijection between noise and tokens as a ``torch.distributions`` transform, alone and in a stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributions import ComposeTransform, Transform, constraints

from probattn.errors import InputError
from probattn.interface import Attention
from probattn.solve.selection import Selection, require_selection
from probattn.solve.sequence import solve_sequence

__all__ = ["AttentionTransform", "DeepTransform"]


class AttentionTransform(Transform):
    r"""Noise e to tokens u, the solution of u - mu(u) = e; its inverse is the residual map u - mu(u).

    .. math:: \log|\det \partial u / \partial e| = -\sum_i \log|\det J_i| = \sum_i b_i

    The inverse is explicit, the forward direction is solved. In the certified and regular regimes the map is a
    bijection as far as is known; where it folds, the forward direction raises (or follows the named rule) instead of
    picking a root silently.

    Args:
        attention: the attention; the transform is a light view of it, so build both anew inside a model.
        selection: rule where several solutions exist, see :mod:`probattn.solve.selection`.
        cache_size: 0 or 1, as in torch. A cache is stale after an in-place update of the parameters.

    Example:
        >>> from probattn import CausalAttention
        >>> transform = AttentionTransform(CausalAttention.from_qk_matrix(torch.tensor([[0.5]])))
        >>> u = torch.tensor([[-1.0], [1.0], [0.0]])
        >>> e = transform.inv(u)
        >>> bool(torch.allclose(transform(e), u, atol=1e-5)), float(transform.log_abs_det_jacobian(e, u).exp())
        (True, 2.0)
    """

    domain = constraints.independent(constraints.real, 2)
    codomain = constraints.independent(constraints.real, 2)
    bijective = True

    def __init__(self, attention: Attention, *, selection: Selection = "unique", cache_size: int = 0) -> None:
        require_selection(selection)
        self.attention = attention
        self.selection: Selection = selection
        super().__init__(cache_size=cache_size)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AttentionTransform) or self.selection != other.selection:
            return False
        mine, theirs = self.attention, other.attention
        return mine is theirs or (type(mine) is type(theirs) and bool(cast(Any, mine).equals(theirs)))

    def __hash__(self) -> int:
        # Equal transforms have equal shapes; the values stay out, as hashing them would copy them from the device.
        return hash((AttentionTransform, self.attention.mask, self.attention.dim))

    def __repr__(self) -> str:
        return f"AttentionTransform({self.attention!r})"

    def with_cache(self, cache_size: int = 1) -> AttentionTransform:
        """The same transform with the given cache size."""
        if self._cache_size == cache_size:
            return self
        return AttentionTransform(self.attention, selection=self.selection, cache_size=cache_size)

    def _call(self, x: Tensor) -> Tensor:
        return solve_sequence(self.attention, x, selection=self.selection)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.attention.residual(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det du/de|`` at the tokens y, ``(*batch,)``; the noise x is not needed."""
        return -self.attention.logabsdet(y)[1].sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Noise e = u - mu(u), ``(*batch, T, p)``, and ``log|det du/de|``, ``(*batch,)``, from one pass over u."""
        residual, logabs = self.attention.residual_and_logabsdet(y)
        return residual, -logabs.sum(-1)

    def forward_shape(self, shape: torch.Size | tuple[int, ...]) -> torch.Size:
        """Shape of the tokens for noise of a given shape: the batch axes broadcast with those of the attention."""
        return torch.Size((*torch.broadcast_shapes(tuple(shape[:-2]), self.attention.batch_shape), *shape[-2:]))

    def inverse_shape(self, shape: torch.Size | tuple[int, ...]) -> torch.Size:
        """Shape of the noise for tokens of a given shape, the same rule."""
        return self.forward_shape(shape)


class DeepTransform(ComposeTransform):
    r"""A stack of transforms of sequences: noise through the first layer, its tokens through the next, and so on.

    .. math:: u = t_L(\dots t_1(e)), \qquad
        \log|\det \partial u / \partial e| = \sum_l \log|\det \partial t_l|

    Between attentions there may be token-wise bijections, such as ``AffineTransform(..., event_dim=2)``. The stack is
    causal as its layers are. Its density is exact: as base of a ``TransformedDistribution`` a Gaussian gives a deep
    distribution of sequences, normalised where every layer is.

    Args:
        layers: transforms with events (T, p), in the order in which noise passes them.
        cache_size: 0 or 1, as in torch.

    Raises:
        InputError: no layers, one whose events are not sequences of vectors, or numbers of features that disagree.

    Cost: the sum of the layers'. The inverse and the log-determinants start at the tokens, where nothing is solved.

    Example:
        >>> from probattn import CausalAttention
        >>> slopes = (torch.tensor([[a]]) for a in (0.9, -0.9))  # contractions for every past
        >>> attentions = [CausalAttention.from_qk_matrix(slope, memory_radius=1.0) for slope in slopes]
        >>> deep = DeepTransform([AttentionTransform(attention) for attention in attentions])
        >>> u = torch.tensor([[-1.0], [1.0], [0.0]])
        >>> torch.allclose(deep(deep.inv(u)), u, atol=1e-5)
        True
    """

    def __init__(self, layers: Sequence[Transform], cache_size: int = 0) -> None:
        if not layers:
            raise InputError("a deep transform needs at least one layer.")
        dim: int | None = None
        for k, layer in enumerate(layers):
            if layer.domain.event_dim != 2 or layer.codomain.event_dim != 2 or not layer.bijective:
                raise InputError(
                    f"layer {k} is {layer!r}; it must be a bijection of sequences of vectors, with event_dim 2."
                )
            if isinstance(layer, AttentionTransform):
                if dim not in (None, layer.attention.dim):
                    raise InputError(f"layer {k} has {layer.attention.dim} features where those before it have {dim}.")
                dim = layer.attention.dim
        super().__init__(list(layers), cache_size=cache_size)

    def __hash__(self) -> int:
        return hash((DeepTransform, *self.parts))

    def with_cache(self, cache_size: int = 1) -> DeepTransform:
        """The same stack with the given cache size."""
        return self if self._cache_size == cache_size else DeepTransform(self.parts, cache_size=cache_size)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det du/de|`` at the tokens y, ``(*batch,)``; the noise x is not needed."""
        return self.inverse_and_ladj(y)[1]

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Noise, ``(*batch, T, p)``, and ``log|det du/de|``, ``(*batch,)``, from one pass over each layer."""
        total: Tensor | float = 0.0
        for layer in reversed(self.parts):
            if isinstance(layer, AttentionTransform):
                x, ladj = layer.inverse_and_ladj(y)
            else:
                x = layer.inv(y)
                ladj = layer.log_abs_det_jacobian(x, y)
            total, y = total + ladj, x
        return y, cast(Tensor, total)
