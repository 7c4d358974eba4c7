"""Character language model: embeddings with the attention prior, a causal decoder, the next character."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from probattn.attention import CausalAttention, Mask
from probattn.barrier import BarrierKind, log_barrier
from probattn.distributions import LatentAttention, noise_distribution
from probattn.embedding_prior import Prior
from probattn.errors import InputError
from probattn.models.module import SequenceModel
from probattn.models.options import Range, check_options
from probattn.numerics.random import isolated_seed

__all__ = ["LanguageConfig", "LanguageModel"]


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes and prior of the language model.

    Attributes:
        vocabulary: number V of characters.
        context: number T of characters in a window.
        dim: size p of the embeddings and of the decoder.
        layers: number of decoder layers.
        decoder_heads: number of heads in the decoder's own attention, a divisor of dim.
        stage_heads: number H of heads in the attention stage of the prior.
        stage_rank: size r of queries and keys in that stage.
        stage_radius: radius of the ball on which keys and values of the stage see embeddings; without it embeddings are
            seen as they are.
        stage_contraction: limit, below 1, of the contraction of the stage that holds for every past; needs
            stage_radius. The penalty then has a floor that training cannot pass.
        weight: power lambda to which the density of the embeddings is raised; 0 omits the stage.
        kind: penalty that replaces ``-log|det J|``.
        prior: full, with the Gaussian term and the penalty, or margin, with the penalty alone, which is the limit of
            infinite noise variance.
        noise_scale: standard deviation of the noise in the full prior.
        prior_scale: standard deviation of the normal prior of every parameter.
        mask: tokens that each token of the stage sees: those before it, or itself as well.
    """

    vocabulary: Annotated[int, Range(least=1)]
    context: Annotated[int, Range(least=1)] = 64
    dim: Annotated[int, Range(least=1)] = 32
    layers: Annotated[int, Range(least=1)] = 2
    decoder_heads: Annotated[int, Range(least=1)] = 4
    stage_heads: Annotated[int, Range(least=1)] = 1
    stage_rank: Annotated[int, Range(least=1)] = 8
    stage_radius: Annotated[float | None, Range(above=0)] = None
    stage_contraction: Annotated[float | None, Range(above=0, below=1)] = None
    weight: Annotated[float, Range(least=0)] = 0.05
    kind: BarrierKind = "logdet"
    prior: Prior = "full"
    noise_scale: Annotated[float, Range(above=0)] = 1.0
    prior_scale: Annotated[float, Range(above=0)] = 1.0
    mask: Mask = "strict"

    def __post_init__(self) -> None:
        check_options(self)
        if self.dim % self.decoder_heads:
            raise InputError(
                f"dim is {self.dim}, which decoder_heads = {self.decoder_heads} does not divide; choose a multiple."
            )
        if self.stage_contraction is not None and self.stage_radius is None:
            raise InputError(f"stage_contraction is {self.stage_contraction}, which needs stage_radius; give one.")

    def as_dict(self) -> dict[str, object]:
        """Return the fields by name."""
        return asdict(self)


class _Decoder(nn.Module):
    """Transformer layers of torch under a causal mask, followed by the logits."""

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            config.dim, config.decoder_heads, 4 * config.dim, dropout=0.0, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(config.dim)
        self.layers = nn.TransformerEncoder(layer, config.layers, norm=norm, enable_nested_tensor=False)
        self.readout = nn.Linear(config.dim, config.vocabulary)

    def forward(self, u: Tensor) -> Tensor:
        future = torch.ones(u.shape[-2], u.shape[-2], dtype=torch.bool, device=u.device).triu(1)
        logits: Tensor = self.readout(self.layers(u, mask=future, is_causal=True))
        return logits


class LanguageModel(SequenceModel):
    r"""A character language model whose embeddings have the attention density, raised to the power lambda, as prior.

    .. math::
        u = E[y] + P, \qquad \log p = \sum_i \log p(y_{i+1} | u_{\le i})
        - \lambda \sum_i [\tfrac12 |e_i|_S^2 + \tfrac{p}{2} \log 2\pi\sigma^2 + b_i] + \log p(\theta)

    where ``prior="margin"`` omits the Gaussian terms. The embeddings of discrete characters have no density on
    :math:`\mathbb R^p`; here the prior is a regulariser of the table E, not the distribution of observed vectors.

    Args:
        config: sizes and prior.

    Sites: ``embedding`` ``(V, p)``, ``position`` ``(T, p)``, ``query`` and ``key`` ``(H, r, p)``, both absent where
    lambda = 0, ``decoder.*`` under torch's names, the observed ``u`` (full prior with the literal barrier) or the
    factor ``attention_prior``, and ``characters`` in the plate ``windows``.
    """

    def __init__(self, config: LanguageConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            # A skeleton without numbers: the decoder's parameters are sample sites. It stays out of the module tree so
            # that no second set of parameters appears in it.
            self.__dict__["_decoder"] = _Decoder(config)

    def initial_values(self, seed: int) -> dict[str, Tensor]:
        """Draw initial values for every site, as torch does, without touching the global random state.

        Args:
            seed: random seed for the values.

        Returns:
            Values by site.
        """
        config, options = self.config, {"dtype": self.unit.dtype, "device": self.unit.device}
        with isolated_seed(seed):
            values = {f"decoder.{name}": value.detach() for name, value in _Decoder(config).named_parameters()}
            values["embedding"] = torch.randn(config.vocabulary, config.dim) * 0.5
            values["position"] = torch.randn(config.context, config.dim) * 0.1
            if config.weight > 0:
                for name in ("query", "key"):
                    values[name] = torch.randn(config.stage_heads, config.stage_rank, config.dim) / config.dim**0.5
        return {name: value.to(**options) for name, value in values.items()}  # type: ignore[call-overload]

    def forward(self, inputs: Tensor, targets: Tensor | None = None, total: int | None = None) -> Tensor:
        """Score or draw the next characters.

        Args:
            inputs: characters, ``(N, T)`` with T at most the context.
            targets: their successors, ``(N, T)``; None draws them.
            total: number of windows in the complete data set; the terms of a minibatch are scaled by total / N.

        Returns:
            Logits, ``(*particles, N, T, V)``.

        Raises:
            InputError: the windows have a wrong shape or are longer than the context.
        """
        config = self.config
        if inputs.dim() != 2 or not 1 <= inputs.shape[1] <= config.context:
            raise InputError(
                f"inputs have shape {tuple(inputs.shape)}; they must be (N, T) with T <= {config.context}."
            )
        if targets is not None and targets.shape != inputs.shape:
            raise InputError(
                f"targets have shape {tuple(targets.shape)}; they must have that of inputs, {tuple(inputs.shape)}."
            )
        values = {name: self.parameter(name, prior) for name, prior in self.parameter_priors().items()}
        with pyro.plate("windows", total or len(inputs), subsample_size=len(inputs)):
            u = self.embed(values, inputs)
            if config.weight > 0:
                self._attention_prior(self.stage(values), u)
            logits = self.decode(values, u)
            pyro.sample("characters", dist.Categorical(logits=logits).to_event(1), obs=targets)
        return logits

    def parameter_priors(self) -> dict[str, dist.TorchDistribution]:
        """Prior of every parameter: normal around 0, or around 1 for the gains of the layer norms."""
        config = self.config
        shapes: dict[str, tuple[int, ...]] = {
            "embedding": (config.vocabulary, config.dim),
            "position": (config.context, config.dim),
        }
        if config.weight > 0:
            shapes["query"] = shapes["key"] = (config.stage_heads, config.stage_rank, config.dim)
        shapes |= {f"decoder.{name}": tuple(value.shape) for name, value in self._decoder.named_parameters()}
        priors = {}
        for name, shape in shapes.items():
            gain = ".norm" in name and name.endswith("weight")
            centre = torch.full(shape, float(gain), dtype=self.unit.dtype, device=self.unit.device)
            priors[name] = dist.Normal(centre, config.prior_scale).to_event(len(shape))
        return priors

    def embed(self, values: dict[str, Tensor], inputs: Tensor) -> Tensor:
        """Embed characters: u = E[y] + P, ``(*particles, N, T, p)``."""
        table, position = values["embedding"], values["position"]
        if table.dim() > 2:  # particles carry an axis of size one for the plate: (particles, 1, V, p)
            table = table.squeeze(-3)
        return table[..., inputs, :] + position[..., : inputs.shape[-1], :]

    def stage(self, values: dict[str, Tensor]) -> CausalAttention:
        """Attention of the prior, with W_V = W_O = I."""
        config = self.config
        free = CausalAttention(values["query"], values["key"], mask=config.mask, memory_radius=config.stage_radius)
        limit = config.stage_contraction
        return free if limit is None else free.scaled_to(limit, shrink=True)

    def decode(self, values: dict[str, Tensor], u: Tensor) -> Tensor:
        """Logits of the next character, ``(*particles, N, T, V)``, with ``torch.vmap`` over particles."""
        parameters = {name: values[f"decoder.{name}"] for name, _ in self._decoder.named_parameters()}
        particles = u.shape[:-3]
        if not particles:
            return functional_call(self._decoder, parameters, (u,))  # type: ignore[no-any-return]
        flat = {}
        for name, reference in self._decoder.named_parameters():
            flat[name] = parameters[name].reshape(-1, *reference.shape)  # (particles, *shape)
        stacked = u.reshape(-1, *u.shape[-3:])  # (particles, N, T, p)
        # The fused attention kernels have no batching rule.
        with sdpa_kernel(SDPBackend.MATH):
            logits = torch.vmap(lambda own, x: functional_call(self._decoder, own, (x,)))(flat, stacked)
        return logits.reshape(*particles, *logits.shape[1:])  # type: ignore[no-any-return]

    def _attention_prior(self, attention: CausalAttention, u: Tensor) -> None:
        config = self.config
        length = u.shape[-2]
        if config.prior == "full" and config.kind == "logdet":
            # The density itself, raised to lambda.
            with poutine.scale(scale=config.weight):
                pyro.sample("u", LatentAttention(attention, config.noise_scale, length), obs=u)
            return
        penalty = log_barrier(attention, u, config.kind).sum(-1)  # (*particles, N)
        if config.prior == "full":
            noise = noise_distribution(config.noise_scale, length, config.dim, like=u)
            penalty = penalty - noise.log_prob(attention.residual(u))
        pyro.factor("attention_prior", -config.weight * penalty)
