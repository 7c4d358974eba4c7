"""Teaching model: tokens on a line, one slope a, one noise scale."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probattn.attention import CausalAttention, Mask, require_mask
from probattn.distributions import LatentAttention, ResidualNoise
from probattn.errors import require_positive
from probattn.models.module import SequenceModel

__all__ = ["ScalarModel", "scalar_attention"]


def scalar_attention(a: float | Tensor, *, mask: Mask = "strict") -> CausalAttention:
    r"""Build the attention on the line with logits :math:`\ell_{is} = a\, u_s u_i`.

    Its Jacobian blocks are :math:`J_i = 1 - a \operatorname{Var}_i` under the strict mask.

    Args:
        a: slope, a number or a tensor of batch shape ``(*batch)``.
        mask: tokens that each token sees, "strict" or "inclusive".

    Returns:
        An attention with one head, p = 1 and batch shape ``(*batch)``.

    Raises:
        InputError: the mask does not exist.

    Example:
        >>> scalar_attention(0.5).qk_matrix
        tensor([[[0.5000]]], dtype=torch.float64)
    """
    slope = a if isinstance(a, Tensor) else torch.tensor(a, dtype=torch.float64)
    return CausalAttention.from_qk_matrix(slope[..., None, None, None], heads=1, mask=mask)


class ScalarModel(SequenceModel):
    r"""Sequences on the line from a scalar attention whose slope and noise scale are unknown.

    .. math::
        a \sim N(0, s^2), \qquad \log \sigma \sim N(0, t^2), \qquad u^{(n)} \sim \mathrm{LatentAttention}(a, \sigma)

    Args:
        length: number T of tokens in a sequence.
        prior_scale: standard deviation s of the prior of a.
        mask: tokens that each token sees, "strict" or "inclusive".
        noise_spread: standard deviation t of the prior of log sigma.
        jacobian: include the log-determinants in the likelihood; see
            :class:`~probattn.models.embedding.EmbeddingModel`.

    Sites: ``a``, ``noise_scale``, and ``u`` in the plate ``sequences``.

    Raises:
        InputError: the length or a standard deviation is not positive, or the mask does not exist.

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
            require_positive(name, value)
        require_mask(mask)
        self.dim, self.noise_spread, self.jacobian = 1, noise_spread, jacobian
        self.length, self.prior_scale, self.mask = length, prior_scale, mask

    def forward(self, u: Tensor | None = None, *, sequences: int | None = None, total: int | None = None) -> Tensor:
        """Score or draw sequences.

        Args:
            u: observed sequences, ``(N, T, 1)`` or ``(particles, N, T, 1)``; None draws them.
            sequences: number of sequences to draw where u is None.
            total: size of the complete data set where u is a minibatch of it; the likelihood is scaled by total / N.

        Returns:
            The sequences, ``(*particles, N, T, 1)``.

        Raises:
            InputError: u has another number of axes, or the number of sequences is not positive.
        """
        size = self.batch_size(u, sequences)
        values = {name: self.parameter(name, prior) for name, prior in self.parameter_priors().items()}
        with pyro.plate("sequences", total or size, subsample_size=size):
            return pyro.sample("u", self.likelihood(values), obs=u)

    def parameter_priors(self) -> dict[str, dist.TorchDistribution]:
        """Prior of every parameter, by site."""
        zero = 0.0 * self.unit
        return {"a": dist.Normal(zero, self.prior_scale), "noise_scale": dist.LogNormal(zero, self.noise_spread)}

    def likelihood(self, values: Mapping[str, Tensor]) -> LatentAttention:
        """Distribution of one sequence given values of the sites.

        Args:
            values: slope ``a`` and ``noise_scale``, ``(*batch)`` each.
        """
        family = LatentAttention if self.jacobian else ResidualNoise
        noise_scale = values["noise_scale"].unsqueeze(-1)
        return family(self.attention_of(values), noise_scale, self.length)

    def attention_of(self, values: Mapping[str, Tensor]) -> CausalAttention:
        """Attention with a given slope ``a``, ``(*batch)``."""
        return scalar_attention(values["a"], mask=self.mask)
