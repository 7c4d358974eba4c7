"""Model of residual streams behind the attention of a language model, with its weights as they were trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from probattn.distributions import LatentAttention
from probattn.errors import InputError, require_at_least, require_choice, require_positive
from probattn.hf.layers import AttentionLayer
from probattn.hf.layers.sublayer import Sublayer
from probattn.hf.layers.update import QueryUpdate, updated, updated_residual
from probattn.hf.layers.volume import VolumeMemory, log_volume
from probattn.models.layer_noise import Noise, StreamNoise
from probattn.models.layer_update import UpdatePrior
from probattn.models.module import SequenceModel
from probattn.transforms import AttentionTransform

__all__ = ["LayerModel", "StreamProcess"]


class StreamProcess(LatentAttention):
    r"""Streams u with u_i = mu_i(u) + e_i, where e is the noise of a stream and the first tokens may be given.

    .. math::
        \log p(u_{k+1..T} \mid u_{1..k}) = \log p_e(e_{k+1..T}) + \frac{T - k}{|R|} \sum_{i \in R} \log|\det J_i|

    with a set R of positions behind the k that are given; all of them unless ``rows`` says otherwise, and a random set
    makes the sum unbiased.

    Args:
        layer: the layer, with factors on its heads.
        noise: of all T tokens; its law does not change with their number.
        given: number k of first tokens that are conditions, not data.
        rows: the positions R, ``(P,)``, increasing, none below k; None: all.
        jacobian: keep the log-determinants; without them this is no density of u.
        update: changes of low rank of the layer's queries, with batch axes or none; None: there are none.
        memory: log-determinants that are known.
    """

    def __init__(
        self,
        layer: AttentionLayer,
        noise: StreamNoise,
        *,
        given: int = 0,
        rows: Tensor | None = None,
        jacobian: bool = True,
        update: QueryUpdate | None = None,
        memory: VolumeMemory | None = None,
    ) -> None:
        self.layer, self.given, self.rows, self.jacobian = layer, given, rows, jacobian
        self.update, self.memory = update, memory
        single = update is not None and update.batch_shape.numel() == 1
        changed = updated(layer, update) if update is not None and single else layer
        batch = torch.broadcast_shapes(
            layer.batch_shape, noise.batch_shape, () if update is None else update.batch_shape
        )
        dist.TransformedDistribution.__init__(
            self, noise.expand(batch), [AttentionTransform(changed)], validate_args=False
        )

    def expand(self, batch_shape: Any, _instance: Any = None) -> StreamProcess:
        """The same law with its batch axes expanded."""
        new = self._get_checked_instance(StreamProcess, _instance)
        for name in ("layer", "given", "rows", "jacobian", "update", "memory"):
            setattr(new, name, getattr(self, name))
        return super().expand(batch_shape, _instance=new)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # torch's own default
        """Draws, ``(*sample, *batch, T, p)``.

        Raises:
            InputError: several updates, which belong to several layers.
        """
        _require_one(self.update)
        drawn: Tensor = super().rsample(sample_shape)
        return drawn

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  # torch's own default
        """Draws as of :meth:`rsample`, without derivatives."""
        _require_one(self.update)
        drawn: Tensor = super().sample(sample_shape)
        return drawn

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the tokens behind the given ones, ``(*batch,)``."""
        layer: AttentionLayer = self.layer
        noise: StreamNoise = self.base_dist
        residual = layer.residual(value) if self.update is None else updated_residual(layer, self.update, value)
        e = residual[..., self.given :, :]
        counted = StreamNoise(
            noise.scale, e.shape[-2], e.shape[-1], factor=noise.factor, offset=noise.offset, validate_args=False
        )
        total = counted.log_prob(e)
        if not self.jacobian:
            return total
        rows = torch.arange(self.given, self.length, device=value.device) if self.rows is None else self.rows
        volume = log_volume(layer, value, rows, update=self.update, memory=self.memory).value
        return total + (self.length - self.given) / len(rows) * volume


class LayerModel(SequenceModel):
    r"""Residual streams of a language model as draws behind one of its layers.

    .. math::
        \log g_h \sim N(0, s_g^2), \quad \log \tau_h \sim N(0, s_\tau^2), \quad \log s \sim N(0, s_s^2), \quad
        u = s\, \mu(u; g, \tau) + e,

    with the weights of the layer as trained, a gain g_h and an inverse temperature tau_h for each head, the share s of
    the update in the stream, and the noise e of :class:`~probattn.models.layer_noise.StreamNoise`:
    :math:`\sigma_j = r_j \varsigma_j` with :math:`\log \varsigma_j \sim N(0, t^2)`, one for all coordinates j or one
    for each, and :math:`L_{jk} = r_j F_{jk}`, :math:`F_{jk} \sim N(0, s_L^2)`. Where the layer has neither a norm
    behind its attention nor a bias, the data know the products s g_h alone.

    Log-normal gains are positive and cannot tell a head that does nothing from one that should be turned round; with
    ``signed`` they are normal around 1, and their sign is a result.

    Args:
        layer: layer of a language model, from :func:`probattn.hf.attention_layer`; it counts as a constant.
        length: number T of tokens in a sequence.
        given: number of first tokens that are conditions, not data. In language models the first token carries
            features that no other one has, and should be given.
        noise: "scalar", "diagonal" or "low_rank" (plus diagonal).
        noise_rank: rank of the low-rank part.
        noise_spread: standard deviation t of the prior of the logarithms of the scales.
        factor_spread: standard deviation s_L of the prior of the low-rank part.
        reference: scales r of the coordinates, ``(p,)``; None: one. Noise is measured in these.
        offset: standard deviations of the offset that a sequence shares, ``(p,)``; None: there is none.
        gain_spread: standard deviation s_g.
        temperature_spread: standard deviation s_tau; None fixes the inverse temperatures at 1.
        share_spread: standard deviation s_s; None fixes the share at 1.
        signed: gains normal around 1 instead of log-normal.
        positions: number of positions at which the log-determinant is taken, without bias in their sum; None: all.
        position_seed: random seed of the choice of positions.
        fresh: choose the positions anew at each evaluation, from torch's global random state, as stochastic gradients
            want it; otherwise the posterior is that given the choice.
        jacobian: include the log-determinants. Without them the likelihood is not a density of u; the option exists to
            show the error of a fit that omits them.
        update: heads, rank and units of a change of low rank of the queries, from
            :func:`~probattn.models.layer_update.update_prior`; None: queries are as trained.

    Sites: ``gain``, [``inverse_temperature``], [``share``], ``noise_scale``, [``noise_factor``], [``update_in``,
    ``update_out``], and ``u`` in the plate ``sequences``. All expressions accept leading batch axes.

    Raises:
        InputError: sizes, scales or numbers of tokens that do not fit.

    Cost: a log-density with gradient takes one pass of the attention and one factorisation with inverse per position,
    whatever the number of parameters.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from probattn.hf import attention_layer
        >>> config = LlamaConfig(
        ...     vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
        ... )
        >>> layer = attention_layer(LlamaForCausalLM(config), 0, dtype=torch.float64)
        >>> _ = pyro.set_rng_seed(0)
        >>> LayerModel(layer, 5)(sequences=3).shape
        torch.Size([3, 5, 8])
    """

    reference: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        layer: AttentionLayer,
        length: int,
        *,
        given: int = 0,
        noise: Noise = "scalar",
        noise_rank: int = 2,
        noise_spread: float = 1.0,
        factor_spread: float = 0.3,
        reference: Tensor | None = None,
        offset: Tensor | None = None,
        gain_spread: float = 0.5,
        temperature_spread: float | None = 0.25,
        share_spread: float | None = 0.25,
        signed: bool = False,
        positions: int | None = None,
        position_seed: int = 0,
        fresh: bool = False,
        jacobian: bool = True,
        update: UpdatePrior | None = None,
    ) -> None:
        super().__init__()
        self._options = {
            "length": length,
            "given": given,
            "noise": noise,
            "noise_rank": noise_rank,
            "noise_spread": noise_spread,
            "factor_spread": factor_spread,
            "reference": reference,
            "offset": offset,
            "gain_spread": gain_spread,
            "temperature_spread": temperature_spread,
            "share_spread": share_spread,
            "signed": signed,
            "positions": positions,
            "position_seed": position_seed,
            "fresh": fresh,
            "jacobian": jacobian,
            "update": update,
        }
        require_choice("noise", noise, get_args(Noise))
        for name, size in (("length", length), ("noise_rank", noise_rank)):
            require_at_least(name, size)
        if not 0 <= given < length:
            raise InputError(f"given is {given}; it must lie between 0 and the length {length} less one.")
        if positions is not None and not 1 <= positions <= length - given:
            raise InputError(
                f"positions is {positions}; it must lie between 1 and the {length - given} tokens that are not given."
            )
        spreads = {
            "noise_spread": noise_spread,
            "factor_spread": factor_spread,
            "gain_spread": gain_spread,
            "temperature_spread": temperature_spread,
            "share_spread": share_spread,
        }
        for name, spread in spreads.items():
            if spread is not None:
                require_positive(name, spread)
        self._layer = _frozen(layer)
        self._memory = VolumeMemory()
        self.dim, self.heads, self.layer_number, self.layer_kind = layer.dim, layer.heads, layer.number, layer.name
        self.length, self.given, self.noise, self.noise_rank = length, given, noise, noise_rank
        self.noise_spread, self.factor_spread = noise_spread, factor_spread
        self.gain_spread, self.temperature_spread, self.share_spread = gain_spread, temperature_spread, share_spread
        self.signed, self.jacobian, self.fresh = signed, jacobian, fresh
        self._update = update
        if update is not None:  # plain values, by which a checkpoint is told from another's
            self.update_rank, self.update_spread = update.rank, update.spread
            self.update_heads = ",".join(map(str, update.heads))
        self.positions, self.position_seed = positions, position_seed
        self.power, self.mask = 1.0, layer.mask
        for name, scales in (("reference", reference), ("offset", offset)):
            if scales is not None and (scales.shape != (self.dim,) or not bool((scales > 0).all())):
                raise InputError(f"{name} has shape {tuple(scales.shape)}; it must hold {self.dim} positive numbers.")
            self.register_buffer(name, None if scales is None else scales.detach().clone())
        self.to(layer.dtype)

    @property
    def layer(self) -> AttentionLayer:
        """The layer as it was trained."""
        return self._layer

    def altered(self, **changes: Any) -> LayerModel:
        """Copy the model with some of its options changed.

        Args:
            **changes: new values of arguments of the constructor, by name.
        """
        return LayerModel(self._layer, **{**self._options, **changes})

    def forward(self, u: Tensor | None = None, *, sequences: int | None = None, total: int | None = None) -> Tensor:
        """Score or draw sequences.

        Args:
            u: observed streams, ``(N, T, p)``, or ``(particles, N, T, p)`` with separate data per particle; None draws
                them, which needs ``given=0``.
            sequences: number of sequences to draw where u is None.
            total: size of the complete data set where u is a minibatch of it; the likelihood is scaled by total / N.

        Returns:
            The sequences, ``(*particles, N, T, p)``.

        Raises:
            InputError: u of another shape, or draws while tokens are given.
        """
        size = self.batch_size(u, sequences)
        if u is None and self.given:
            raise InputError(
                f"given is {self.given}: tokens that are given cannot be drawn; observe u, or use given=0."
            )
        if u is not None and u.shape[-2:] != (self.length, self.dim):
            raise InputError(f"u has shape {tuple(u.shape)}; its last axes must be ({self.length}, {self.dim}).")
        values = {name: self.parameter(name, prior) for name, prior in self.parameter_priors().items()}
        with pyro.plate("sequences", total or size, subsample_size=size):
            return pyro.sample("u", self.likelihood(values), obs=u)

    def parameter_priors(self) -> dict[str, dist.TorchDistribution]:
        """Prior of every parameter, by site."""
        zero, heads = self.unit.new_zeros(()), self.unit.new_zeros(self.heads)
        gain: Any = dist.Normal(1 + heads, self.gain_spread) if self.signed else dist.LogNormal(heads, self.gain_spread)
        priors: dict[str, dist.TorchDistribution] = {"gain": gain.to_event(1)}
        if self.temperature_spread is not None:
            priors["inverse_temperature"] = dist.LogNormal(heads, self.temperature_spread).to_event(1)
        if self.share_spread is not None:
            priors["share"] = dist.LogNormal(zero, self.share_spread)
        scales = self.unit.new_zeros(1 if self.noise == "scalar" else self.dim)
        priors["noise_scale"] = dist.LogNormal(scales, self.noise_spread).to_event(1)
        if self.noise == "low_rank":
            entries = self.unit.new_zeros(self.dim, self.noise_rank)
            priors["noise_factor"] = dist.Normal(entries, self.factor_spread).to_event(2)
        return priors if self._update is None else {**priors, **self._update.priors()}

    def likelihood(self, values: Mapping[str, Tensor]) -> StreamProcess:
        """Law of one sequence given values of the sites, ``(*batch, *event)`` each."""
        return StreamProcess(
            self.scaled_layer(values),
            self.noise_of(values),
            given=self.given,
            rows=self.rows,
            jacobian=self.jacobian,
            update=self.update_of(values),
            memory=None if self.fresh else self._memory,
        )

    def attention_of(self, values: Mapping[str, Tensor]) -> AttentionLayer:
        """The layer with given values of the sites.

        Raises:
            InputError: values of several changes of the queries, which belong to several layers.
        """
        update = self.update_of(values)
        return self.scaled_layer(values) if update is None else updated(self.scaled_layer(values), update)

    def scaled_layer(self, values: Mapping[str, Tensor]) -> AttentionLayer:
        """The layer with given factors on its heads, its queries as trained."""
        return self._layer.scaled(values["gain"], values.get("inverse_temperature", 1.0), values.get("share", 1.0))

    def update_of(self, values: Mapping[str, Tensor]) -> QueryUpdate | None:
        """The change of the queries with given values of the sites; None where the model has none."""
        return None if self._update is None else self._update.update_of(values)

    @property
    def update(self) -> UpdatePrior | None:
        """Heads, rank and units of the change of the queries; None: there is none."""
        return self._update

    def noise_of(self, values: Mapping[str, Tensor]) -> StreamNoise:
        """The noise with given values of the sites, in the units of the stream."""
        scale, factor = values["noise_scale"], values.get("noise_factor")
        if self.reference is not None:
            scale = scale * self.reference
            factor = None if factor is None else factor * self.reference.unsqueeze(-1)
        return StreamNoise(scale, self.length, self.dim, factor=factor, offset=self.offset, validate_args=False)

    @property
    def rows(self) -> Tensor | None:
        """Positions at which the log-determinant is taken; None: all that are not given.

        A systematic sample: each position has the same chance to be in it, so that the scaled sum is unbiased.
        """
        if self.positions is None:
            return None
        if self.fresh:
            start = float(torch.rand(()))
        else:
            start = float(torch.rand((), generator=torch.Generator().manual_seed(self.position_seed)))
        counted = self.length - self.given
        steps = (torch.arange(self.positions, dtype=torch.float64) + start) * (counted / self.positions)
        return self.given + steps.floor().clamp(max=counted - 1).long()


def _require_one(update: QueryUpdate | None) -> None:
    if update is not None and update.batch_shape.numel() > 1:
        raise InputError(
            f"streams of {update.batch_shape.numel()} updates cannot be drawn together, as each has a layer of its "
            "own; draw them one after the other."
        )


def _frozen(layer: AttentionLayer) -> AttentionLayer:
    """The layer with the parameters that it has now, in its precision, apart from the model that it came from."""
    return replace(layer.detach(), read=partial(_same, layer.detach().sublayer._replace(scaling=None)), scaling=None)


def _same(sublayer: Sublayer) -> Sublayer:
    return sublayer
