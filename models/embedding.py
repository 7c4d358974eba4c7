"""Model of observed sequences of vectors, with priors on the attention parameters and on the noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
from pyro import poutine
from torch import Tensor

from probattn.attention import CausalAttention, Mask, require_mask
from probattn.distributions import LatentAttention, ResidualNoise
from probattn.errors import InputError, require_at_least, require_choice, require_positive
from probattn.models.module import SequenceModel

__all__ = ["EmbeddingModel", "Parameters"]

Parameters = Literal["factors", "qk_matrix"]


class EmbeddingModel(SequenceModel):
    r"""Sequences of vectors from a causal attention whose parameters are unknown.

    .. math::
        W_Q, W_K \sim N(0, s^2 / p), \quad [W_V \sim N(0, s^2 / p),\; W_O \sim N(0, s^2 / d_v)], \quad
        \log \sigma_j \sim N(0, t^2), \quad u^{(n)} \sim \mathrm{LatentAttention}(W, \sigma)

    With ``parameters="qk_matrix"`` the prior is on the identified matrix itself, :math:`A_h \sim N(0, s^2 / p)` entry
    by entry, and :math:`W_V = W_O = I`.

    With a memory radius and a ``contraction`` the factors are scaled so that :math:`|M_i| < \kappa < 1` for every past
    (:meth:`~probattn.attention.CausalAttention.scaled_to`): the density is normalised at every value of the sites.

    Only the products :math:`A_h = c\, W_K^\top W_Q` and :math:`W_O W_V` and the multiset of heads are identified; read
    those, not the factors.

    Args:
        length: number T of tokens in a sequence.
        dim: number p of features of a token.
        heads: number H of heads.
        rank: size r of queries and keys; p where None.
        value_dim: size dv of the values; None fixes W_V = W_O = I.
        prior_scale: scale s of the prior of the attention parameters.
        mask: tokens that each token sees, "strict" or "inclusive".
        parameters: "factors" for W_Q and W_K, or "qk_matrix" for A with full rank.
        noise_spread: standard deviation t of the prior of log sigma.
        noise_scale: standard deviation sigma of the noise where it is known; None infers it.
        power: power lambda to which the density of the sequences is raised, for a tempered posterior.
        jacobian: include the log-determinants in the likelihood. Without them it is not a density of u; the option
            exists to show the error of a fit that omits them.
        memory_radius: radius rho of the ball that keys and values see tokens on; None leaves tokens as they are.
        contraction: limit kappa in (0, 1) of the contraction, needs a radius; None sets no limit.
        contraction_prior: shapes (a, b) of a prior Beta(a, b) of the contraction itself, instead of a limit; the
            factors then give its direction alone, which on the line, with one head, is a sign.

    Sites: ``query``, ``key``, [``value``, ``output``] or ``qk_matrix`` (``free_qk_matrix`` where a contraction scales
    it); [``noise_scale``]; [``contraction``]; and ``u`` in the plate ``sequences``. All expressions accept leading
    batch axes, so that particles and predictive draws run in parallel.

    Raises:
        InputError: a size is below 1, a scale is not positive, a rank or value size comes with ``qk_matrix``, or a
            contraction is outside (0, 1), has no radius, or is given twice.

    Example:
        >>> _ = pyro.set_rng_seed(0)
        >>> EmbeddingModel(5, 2, prior_scale=0.3)(sequences=3).shape
        torch.Size([3, 5, 2])
        >>> EmbeddingModel(5, 2, prior_scale=9.0, memory_radius=1.0, contraction=0.9)(sequences=3).shape  # never folds
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
        parameters: Parameters = "factors",
        noise_spread: float = 0.5,
        noise_scale: float | None = None,
        power: float = 1.0,
        jacobian: bool = True,
        memory_radius: float | None = None,
        contraction: float | None = None,
        contraction_prior: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        self._options = {
            "length": length,
            "dim": dim,
            "heads": heads,
            "rank": rank,
            "value_dim": value_dim,
            "prior_scale": prior_scale,
            "mask": mask,
            "parameters": parameters,
            "noise_spread": noise_spread,
            "noise_scale": noise_scale,
            "power": power,
            "jacobian": jacobian,
            "memory_radius": memory_radius,
            "contraction": contraction,
            "contraction_prior": contraction_prior,
        }
        require_choice("parameters", parameters, get_args(Parameters))
        if parameters == "qk_matrix" and (rank is not None or value_dim is not None):
            raise InputError(
                f"parameters is 'qk_matrix' with rank {rank} and value_dim {value_dim}; A has full rank and "
                "W_V = W_O = I there: omit both, or use parameters='factors'."
            )
        rank = dim if rank is None else rank
        sizes = {
            "length": length,
            "dim": dim,
            "heads": heads,
            "rank": rank,
            "value_dim": 1 if value_dim is None else value_dim,
        }
        for name, size in sizes.items():
            require_at_least(name, size)
        positive = {
            "prior_scale": prior_scale,
            "noise_spread": noise_spread,
            "noise_scale": noise_scale,
            "power": power,
            "memory_radius": memory_radius,
            **dict(zip(("contraction_prior a", "contraction_prior b"), contraction_prior or (), strict=False)),
        }
        for name, scale in positive.items():
            if scale is not None:
                require_positive(name, scale)
        require_mask(mask)
        _require_contraction(memory_radius, contraction, contraction_prior)
        self.length, self.dim, self.heads, self.rank, self.value_dim = length, dim, heads, rank, value_dim
        self.prior_scale, self.mask = prior_scale, mask
        self.parameters_as, self.noise_spread, self.jacobian = parameters, noise_spread, jacobian
        self.noise_scale, self.power = noise_scale, power
        self.memory_radius, self.contraction, self.contraction_prior = memory_radius, contraction, contraction_prior

    def altered(self, **changes: Any) -> EmbeddingModel:
        """Copy the model with some of its options changed.

        Args:
            **changes: new values of arguments of the constructor, by name.

        Example:
            >>> EmbeddingModel(5, 2).altered(heads=2).heads
            2
        """
        return EmbeddingModel(**{**self._options, **changes}).to(self.unit.device, self.unit.dtype)

    def forward(self, u: Tensor | None = None, *, sequences: int | None = None, total: int | None = None) -> Tensor:
        """Score or draw sequences.

        Args:
            u: observed sequences, ``(N, T, p)``, or ``(particles, N, T, p)`` with separate data per particle; None
                draws them.
            sequences: number of sequences to draw where u is None.
            total: size of the complete data set where u is a minibatch of it; the likelihood is scaled by total / N.

        Returns:
            The sequences, ``(*particles, N, T, p)``.

        Raises:
            InputError: u has another number of axes, or the number of sequences is not positive.
        """
        size = self.batch_size(u, sequences)
        values = {name: self.parameter(name, prior) for name, prior in self.parameter_priors().items()}
        with pyro.plate("sequences", total or size, subsample_size=size), poutine.scale(scale=self.power):
            return pyro.sample("u", self.likelihood(values), obs=u)

    @property
    def _qk_site(self) -> str:
        """Site of A before it is scaled; A itself where nothing scales it."""
        return "qk_matrix" if self.contraction is None and self.contraction_prior is None else "free_qk_matrix"

    def parameter_priors(self) -> dict[str, dist.TorchDistribution]:
        """Prior of every parameter, by site."""
        shapes: dict[str, tuple[int, int]] = {self._qk_site: (self.dim, self.dim)}
        if self.parameters_as == "factors":
            shapes = {"query": (self.rank, self.dim), "key": (self.rank, self.dim)}
        if self.value_dim is not None:
            shapes |= {"value": (self.value_dim, self.dim), "output": (self.dim, self.value_dim)}
        priors = {}
        for name, (rows, columns) in shapes.items():
            zeros = self.unit.new_zeros(self.heads, rows, columns)
            priors[name] = dist.Normal(zeros, self.prior_scale / columns**0.5).to_event(3)
        if self.noise_scale is None:
            priors["noise_scale"] = dist.LogNormal(self.unit.new_zeros(self.dim), self.noise_spread).to_event(1)
        if self.contraction_prior is not None:
            first, second = (shape + 0.0 * self.unit for shape in self.contraction_prior)
            priors["contraction"] = dist.Beta(first, second)
        return priors

    def likelihood(self, values: Mapping[str, Tensor]) -> LatentAttention:
        """Distribution of one sequence given values of the sites.

        Args:
            values: values of the sites, ``(*batch, *event)`` each.
        """
        family = LatentAttention if self.jacobian else ResidualNoise
        noise_scale = values["noise_scale"] if self.noise_scale is None else self.noise_scale
        return family(self.attention_of(values), noise_scale, self.length)

    def attention_of(self, values: Mapping[str, Tensor]) -> CausalAttention:
        """Attention with given values of the sites, ``(*batch, H, ., .)`` each."""
        if self.parameters_as == "qk_matrix":
            free = CausalAttention.from_qk_matrix(
                values[self._qk_site], heads=self.heads, mask=self.mask, memory_radius=self.memory_radius
            )
        else:
            maps = [values.get(name) for name in ("value", "output")]
            free = CausalAttention(
                values["query"], values["key"], *maps, mask=self.mask, memory_radius=self.memory_radius
            )
        if self.contraction is not None:
            return free.scaled_to(self.contraction, shrink=True)
        return free if self.contraction_prior is None else free.scaled_to(values["contraction"])


def _require_contraction(radius: float | None, limit: float | None, prior: tuple[float, float] | None) -> None:
    if limit is None and prior is None:
        return
    if radius is None:
        raise InputError("a contraction needs a memory_radius; give one, of the size of the tokens.")
    if limit is not None and prior is not None:
        raise InputError(f"contraction is {limit} and contraction_prior is {prior}; give one of them.")
    if limit is not None and not 0 < limit < 1:
        raise InputError(f"contraction is {limit}; it must lie strictly between 0 and 1.")
    if prior is not None and len(prior) != 2:
        raise InputError(f"contraction_prior is {prior}; it must be the two shapes of a Beta distribution.")
