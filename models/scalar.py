"""The teaching model: tokens on a line, one slope a, one noise scale."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probattn.attention import CausalAttention, Mask, require_mask
from probattn.distributions import LatentAttention
from probattn.errors import InputError
from probattn.models.module import SequenceModel

__all__ = ["ScalarModel", "scalar_attention"]


def scalar_attention(a: float | Tensor, *, mask: Mask = "strict") -> CausalAttention:
    """The scalar instance l_is = a u_s u_i, whose blocks are J_i = 1 - a Var_i under the strict mask.

    Args:
        a: a number, or a tensor of any batch shape (*batch,).
        mask: as in :class:`CausalAttention`.

    Example:
        >>> scalar_attention(0.5).bilinear
        tensor([[[0.5000]]], dtype=torch.float64)
    """
    slope = a if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.float64)
    return CausalAttention.from_bilinear(slope[..., None, None, None], mask=mask)


class ScalarModel(SequenceModel):
    r"""a ~ N(0, prior_scale^2), sigma ~ LogNormal(0, 1/2), and N sequences from the scalar attention.

    Args:
        length: T.
        prior_scale: standard deviation of the prior of a.
        mask: as in :class:`CausalAttention`.

    Sites: ``a``, ``noise_scale``, ``u`` in the plate ``sequences``.

    Raises:
        InputError: a length below 1, a prior scale that is not positive.

    Example:
        >>> _ = pyro.set_rng_seed(0)
        >>> ScalarModel(4, prior_scale=0.1)(sequences=3).shape
        torch.Size([3, 4, 1])
    """

    def __init__(self, length: int, *, prior_scale: float = 1.0, mask: Mask = "strict") -> None:
        super().__init__()
        if length < 1 or not prior_scale > 0:
            raise InputError(f"length is {length} and prior_scale {prior_scale}; both must be positive.")
        require_mask(mask)
        self.length, self.prior_scale, self.mask = length, prior_scale, mask

    def forward(self, u: Tensor | None = None, *, sequences: int | None = None, total: int | None = None) -> Tensor:
        """Score or draw sequences; see :meth:`EmbeddingModel.forward` for the arguments."""
        size = self.batch_size(u, sequences)
        a = self.parameter("a", dist.Normal(0.0 * self.unit, self.prior_scale))
        noise_scale = self.parameter("noise_scale", dist.LogNormal(0.0 * self.unit, 0.5))
        with pyro.plate("sequences", total or size, subsample_size=size):
            law = LatentAttention(scalar_attention(a, mask=self.mask), noise_scale.unsqueeze(-1), self.length)
            return pyro.sample("u", law, obs=u)
