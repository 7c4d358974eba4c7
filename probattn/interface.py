"""The interface of an attention: what densities, barriers, margins and solvers ask of one."""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from probattn.errors import require_choice

__all__ = ["Attention", "Mask", "require_mask"]

Mask = Literal["strict", "inclusive"]


def require_mask(mask: str) -> None:
    """Refuse a mask that does not exist.

    Args:
        mask: name of the mask.

    Raises:
        InputError: naming the masks that exist.

    Example:
        >>> require_mask("strict")
    """
    require_choice("mask", mask, get_args(Mask))


class Attention(Protocol):
    r"""A causal attention :math:`u \mapsto \mu(u)` with its diagonal Jacobian blocks.

    Two kinds implement it: :class:`~probattn.attention.CausalAttention`, given by linear maps, and the attention
    sublayer of a transformer. Arrays of tokens have the shape ``(*batch, T, p)``.

    Attributes:
        mask: "strict" (the past of i is s < i) or "inclusive" (s <= i).
    """

    mask: Mask

    @property
    def dim(self) -> int:
        """Number p of features of a token."""

    @property
    def batch_shape(self) -> torch.Size:
        """Batch axes of the parameters."""

    @property
    def like(self) -> Tensor:
        """A parameter, for its dtype and device."""

    def mean(self, u: Tensor) -> Tensor:
        """The attention mean mu, ``(*batch, T, p)``."""

    def residual(self, u: Tensor) -> Tensor:
        """The residual map e = u - mu(u), ``(*batch, T, p)``."""

    def mean_jacobian(self, u: Tensor) -> Tensor:
        """Diagonal blocks M_i = dmu_i/du_i, ``(*batch, T, p, p)``."""

    def jacobian(self, u: Tensor) -> Tensor:
        """Diagonal blocks J_i = I - M_i, ``(*batch, T, p, p)``."""

    def core(self, u: Tensor) -> Tensor:
        """Smallest K_i with det(I - K_i) = det J_i and the non-zero eigenvalues of M_i, ``(*batch, T, m, m)``."""

    def logabsdet(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Sign and ``log|det J_i|``, ``(*batch, T)`` each."""

    def residual_and_logabsdet(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The residual, ``(*batch, T, p)``, and ``log|det J_i|``, ``(*batch, T)``, in one pass."""

    def detach(self) -> Attention:
        """The same attention cut off from the graph of its parameters."""

    def expand(self, batch_shape: Any) -> Attention:
        """The same attention with its batch axes expanded."""
