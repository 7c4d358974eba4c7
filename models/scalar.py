"""The teaching model: tokens on a line, one slope a, one noise scale."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probattn.attention import CausalAttention, Mask, require_mask
from probattn.distributions import LatentAttention, ResidualNoise
from probattn.errors import InputError
from probattn.models.module import SequenceModel
from probattn.solve.search import Selection

__all__ = ["ScalarModel", "scalar_attention"]


def scalar_attention(a: float | Tensor, *, mask: Mask = "strict") -> CausalAttention:
    """The scalar instance l_is = a u_s u_i, whose blocks are J_i = 1 - a Var_i under the strict mask.

    Args:
        a: a number, or a tensor of any batch shape (*batch,).
        mask: as in :class:`CausalAttention`.

    Example:
        >>> scalar_attention(0.5).qk_matrix
        tensor([[[0.5000]]], dtype=torch.float64)
    """
    slope = a if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.float64)
    return CausalAttention.from_qk_matrix(slope[..., None, None, None], mask=mask)


class ScalarModel(SequenceModel):
    r"""a ~ N(0, prior_scale^2), log sigma ~ N(0, noise_spread^2), and N sequences from the scalar attention.

    Args:
        length: T.
        prior_scale: standard deviation of the prior of a.
        mask: as in :class:`CausalAttention`.
        noise_spread: standard deviation of the prior of log sigma.
        jacobian: as in :class:`~probattn.models.embedding.EmbeddingModel`.

    Sites: ``a``, ``noise_scale``, ``u`` in the plate ``sequences``.

    Raises:
        InputError: a length below 1, a prior scale that is not positive.

    Example:
        >>> _ = pyro.set_rng_seed(0)
        >>> ScalarModel(4, prior_scale=0.1)(sequences=3).shape
        torch.Size([3, 4, 1])
    """

    def __init__(
        self,
        length: int,
        *,
        prior_scale: float = 1.0,
        mask: Mask = "strict",
        noise_spread: float = 0.5,
        jacobian: bool = True,
    ) -> None:
        super().__init__()
        for name, value in (("length", length), ("prior_scale", prior_scale), ("noise_spread", noise_spread)):
            if not value > 0:
                raise InputError(f"{name} is {value}; it must be positive.")
        require_mask(mask)
        self.dim, self.noise_spread, self.jacobian = 1, noise_spread, jacobian
        self.length, self.prior_scale, self.mask = length, prior_scale, mask

    def forward(self, u: Tensor | None = None, *, sequences: int | None = None, total: int | None = None) -> Tensor:
        """Score or draw sequences; see :meth:`EmbeddingModel.forward` for the arguments."""
        size = self.batch_size(u, sequences)
        values = {name: self.parameter(name, law) for name, law in self.parameter_priors().items()}
        with pyro.plate("sequences", total or size, subsample_size=size):
            return pyro.sample("u", self.likelihood(values), obs=u)

    def parameter_priors(self) -> dict[str, dist.TorchDistribution]:
        """The prior of every parameter."""
        zero = 0.0 * self.unit
        return {"a": dist.Normal(zero, self.prior_scale), "noise_scale": dist.LogNormal(zero, self.noise_spread)}

    def likelihood(self, values: Mapping[str, Tensor], selection: Selection = "unique") -> LatentAttention:
        """See :meth:`EmbeddingModel.likelihood`."""
        law = LatentAttention if self.jacobian else ResidualNoise
        noise_scale = values["noise_scale"].unsqueeze(-1)
        return law(self.attention_of(values), noise_scale, self.length, selection=selection)

    def attention_of(self, values: Mapping[str, Tensor]) -> CausalAttention:
        """The attention with a given slope ``a``, (*batch,)."""
        return scalar_attention(values["a"], mask=self.mask)
