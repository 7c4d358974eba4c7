"""Observed sequences of vectors, with priors on the attention parameters and on the noise."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor

from probattn.attention import CausalAttention, Mask, require_mask
from probattn.distributions import LatentAttention
from probattn.errors import InputError
from probattn.models.module import SequenceModel

__all__ = ["EmbeddingModel"]


class EmbeddingModel(SequenceModel):
    r"""Sequences u_1..u_T in R^p from a causal attention whose parameters are unknown.

    .. math::
        W_Q, W_K \sim N(0, s^2 / p), \quad [W_V \sim N(0, s^2 / p),\; W_O \sim N(0, s^2 / d_v)], \quad
        \log \sigma_j \sim N(0, 1/4), \quad u^{(n)} \sim \mathrm{LatentAttention}(W, \sigma)

    Only the products A = c W_K^T W_Q and W_O W_V and the multiset of heads are identified: read those, not the factors.

    Args:
        length: T.
        dim: p.
        heads: H.
        rank: r; None: p.
        value_dim: dv; None fixes W_V = W_O = I.
        prior_scale: s.
        mask: as in :class:`CausalAttention`.

    Sites: ``query``, ``key``, [``value``, ``output``], ``noise_scale``, and ``u`` in the plate ``sequences``. Every
        expression is
    written for leading batch axes, so particles and parallel predictive draws vectorise.

    Raises:
        InputError: a size below 1, a prior scale that is not positive.

    Example:
        >>> _ = pyro.set_rng_seed(0)
        >>> EmbeddingModel(5, 2, prior_scale=0.3)(sequences=3).shape
        torch.Size([3, 5, 2])
    """

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        heads: int = 1,
        rank: int | None = None,
        value_dim: int | None = None,
        prior_scale: float = 1.0,
        mask: Mask = "strict",
    ) -> None:
        super().__init__()
        rank = dim if rank is None else rank
        sizes = {
            "length": length,
            "dim": dim,
            "heads": heads,
            "rank": rank,
            "value_dim": 1 if value_dim is None else value_dim,
        }
        for name, size in sizes.items():
            if size < 1:
                raise InputError(f"{name} is {size}; it must be at least 1.")
        if not prior_scale > 0:
            raise InputError(f"prior_scale is {prior_scale}; it must be positive.")
        require_mask(mask)
        self.length, self.dim, self.heads, self.rank, self.value_dim = length, dim, heads, rank, value_dim
        self.prior_scale, self.mask = prior_scale, mask

    def forward(self, u: Tensor | None = None, *, sequences: int | None = None, total: int | None = None) -> Tensor:
        """Score or draw sequences.

        Args:
            u: observed sequences, (N, T, p); None draws them.
            sequences: how many to draw where u is None.
            total: size of the whole data set where u is a minibatch of it; the likelihood is scaled by total / N.

        Returns:
            The sequences, (*particles, N, T, p).
        """
        size = self.batch_size(u, sequences)
        attention = self.sample_attention()
        noise = dist.LogNormal(self.unit.new_zeros(self.dim), 0.5).to_event(1)
        noise_scale = self.parameter("noise_scale", noise)
        with pyro.plate("sequences", total or size, subsample_size=size):
            law = LatentAttention(attention, noise_scale, self.length)
            return pyro.sample("u", law, obs=u)

    def sample_attention(self) -> CausalAttention:
        """Draw the attention parameters from their prior, as sample sites of the running model."""
        query = self._weight("query", self.rank, self.dim)
        key = self._weight("key", self.rank, self.dim)
        value = output = None
        if self.value_dim is not None:
            value = self._weight("value", self.value_dim, self.dim)
            output = self._weight("output", self.dim, self.value_dim)
        return CausalAttention(query, key, value, output, mask=self.mask)

    def _weight(self, name: str, rows: int, columns: int) -> Tensor:
        spread = self.prior_scale / columns**0.5
        law = dist.Normal(self.unit.new_zeros(self.heads, rows, columns), spread).to_event(3)
        return self.parameter(name, law)
