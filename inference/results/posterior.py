"""From draws to a :class:`Fit`: identified quantities, what they imply for the data, and what ArviZ needs to judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probattn.barrier import stability_margin
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.results.fit_file import Fit
from probattn.inference.results.heads import match_heads
from probattn.inference.runtime.isolation import isolated
from probattn.models.embedding import EmbeddingModel
from probattn.models.scalar import ScalarModel
from probattn.models.simulate import draw_data_sets
from probattn.solve.bound import contraction_bound

__all__ = ["DESCRIBED", "REGIMES", "assemble"]

Array = NDArray[Any]
REGIMES = ("certified", "regular", "folded")
_RAW = {
    "a",
    "qk_matrix",
    "free_qk_matrix",
    "query",
    "key",
    "value",
    "output",
    "contraction",
}  # sites that give the attention
_PER_TOKEN = ("log_abs_det", "margin", "regime")
_SHOWN = 8  # sequences whose margins are kept token by token
# Attributes of variables, by the CF conventions; programs that know them print "folded" for 2.
DESCRIBED: Mapping[str, Mapping[str, Any]] = {
    "qk_matrix": {"long_name": "QK matrix c W_K^T W_Q"},
    "ov_matrix": {"long_name": "OV matrix W_O W_V"},
    "noise_scale": {"long_name": "standard deviation of the noise"},
    "smallest_margin": {"long_name": "smallest singular value of J at the sequences kept, the smallest of all tokens"},
    "smallest_abs_det": {"long_name": "smallest |det J| at the sequences kept"},
    "log_abs_det": {"long_name": "log |det J|"},
    "margin": {"long_name": "smallest singular value of J"},
    "regime": {
        "long_name": "regime of the draw at the tokens of the sequence",
        "flag_values": np.arange(len(REGIMES), dtype=np.int8),
        "flag_meanings": " ".join(REGIMES),
    },
}
_PREDICTIVE_BYTES = 32 * 2**20

_DIMS: Mapping[str, Sequence[str]] = {
    "qk_matrix": ["head", "key_feature", "query_feature"],
    "free_qk_matrix": ["head", "key_feature", "query_feature"],
    "ov_matrix": ["head", "feature", "source_feature"],
    "query": ["head", "query_dim", "feature"],
    "key": ["head", "query_dim", "feature"],
    "value": ["head", "value_dim", "feature"],
    "output": ["head", "feature", "value_dim"],
    "noise_scale": ["feature"],
    "log_abs_det": ["shown_sequence", "token"],
    "margin": ["shown_sequence", "token"],
    "regime": ["shown_sequence"],
    "u": ["sequence", "token", "feature"],
}


def assemble(
    target: LogDensity,
    draws: Draws,
    *,
    seed: int = 0,
    predictive: int = 50,
    attributes: Mapping[str, Any] | None = None,
) -> Fit:
    """All groups of a fit of a :class:`ScalarModel` or an :class:`EmbeddingModel`, heads matched across draws.

    Args:
        target: log-density of the posterior, with data ``(N, T, p)``.
        draws: draws from it, or from an approximation to it.
        seed: random seed of prior and predictive draws.
        predictive: largest number of posterior predictive data sets. There are a fifth as many of the prior, which is
            slow where it nearly folds.
        attributes: versions, hardware and the like, by name.

    Returns:
        :class:`Fit` with the groups posterior (sites, the products ``qk_matrix`` and ``ov_matrix``, and per draw the
        smallest margin and ``|det J|`` at the first sequences), tokens (at the tokens of these sequences ``log|det J|``
        and the margin, and the regime of the draw at each sequence), sample_stats, log_likelihood per sequence,
        log_prior per site, prior, prior_predictive, posterior_predictive, observed_data and constant_data.
    """
    model, u = cast(ScalarModel | EmbeddingModel, target.model), target.data[0]
    chains, count, dim = draws.z.shape
    flat = draws.z.reshape(-1, dim)  # (chain * draw, D)
    sites = _with_products(model, target.constrain(flat))
    matched = _match(sites, chains, count)
    terms = target.evaluate(flat)
    shown_data = u[:_SHOWN]
    group = max(1, target.group_size * len(u) // len(shown_data))
    derived = _derived(model, sites, shown_data, group)
    info: dict[str, Any] = {**draws.info, "heads_reordered": matched}

    prior = _with_products(model, target.prior_draws(500, seed))
    size = int(min(predictive, max(4, _PREDICTIVE_BYTES // (u.numel() * u.element_size()))))
    rows = torch.from_numpy(np.random.default_rng(seed).permutation(len(flat))[:size])
    chosen = {name: sites[name][rows] for name in target.sites}
    predicted = {}
    ahead = {name: prior[name][: max(1, size // 5)] for name in target.sites}
    for k, (name, values) in enumerate({"prior_predictive": ahead, "posterior_predictive": chosen}.items()):
        predicted[name], info[f"{name}_unusable"] = _predict(model, values, len(u), seed + k)

    def by_chain(values: Mapping[str, Tensor]) -> dict[str, Array]:
        return {k: v.reshape(chains, count, *v.shape[1:]).detach().cpu().numpy() for k, v in values.items()}

    def one_chain(values: Mapping[str, Tensor]) -> dict[str, Array]:
        return {name: value.unsqueeze(0).detach().cpu().numpy() for name, value in values.items()}

    groups = {
        "posterior": by_chain({**sites, **{name: derived[name] for name in derived if name not in _PER_TOKEN}}),
        "tokens": by_chain({name: derived[name] for name in _PER_TOKEN}),
        "sample_stats": {**by_chain({"lp": terms["lp"]}), **{k: v.cpu().numpy() for k, v in draws.statistics.items()}},
        "log_likelihood": by_chain({"u": terms["u"]}),
        "log_prior": by_chain({name: terms[name] for name in target.sites}),
        "prior": one_chain(prior),
        **{name: one_chain({"u": u}) for name, u in predicted.items() if u is not None},
        "observed_data": {"u": u.cpu().numpy()},
        "constant_data": {"length": np.array(u.shape[1]), "sequences": np.array(len(u))},
    }
    shown = {**sites, **derived, "u": u.unsqueeze(0)}
    axes: dict[str, Sequence[str]] = {
        name: names for name, names in _DIMS.items() if name in shown and shown[name].dim() == len(names) + 1
    }
    lengths = {k: n for name, names in axes.items() for k, n in zip(names, shown[name].shape[1:], strict=True)}
    coords = {name: np.arange(length) for name, length in lengths.items()}
    axes["log_likelihood.u"] = ["sequence"]
    axes |= {f"log_prior.{name}": [] for name in target.sites}
    return Fit(draws.method, groups, axes, coords, {**dict(attributes or {}), **info}, DESCRIBED)


def _with_products(model: ScalarModel | EmbeddingModel, sites: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The sites and the products of them that are identified."""
    attention = model.attention_of(sites)
    products = {"qk_matrix": attention.qk_matrix}
    if "value" in sites:
        products["ov_matrix"] = attention.ov_matrix
    if attention.memory_radius is not None:
        products["contraction"] = attention.contraction
    return {**products, **sites}


def _match(sites: dict[str, Tensor], chains: int, count: int) -> float:
    """Bring the heads of all draws into one order, in place.

    Returns:
        The share of draws whose order was changed.
    """
    heads = sites["qk_matrix"].shape[1]
    if heads == 1:
        return 0.0
    products = torch.cat([sites[name].flatten(2) for name in ("qk_matrix", "ov_matrix") if name in sites], dim=-1)
    order = torch.from_numpy(match_heads(products.reshape(chains, count, heads, -1).detach().cpu().numpy()))
    order = order.reshape(-1, heads).to(products.device)
    rows = torch.arange(len(order), device=order.device).unsqueeze(1)
    for name in set(sites) & {"qk_matrix", "free_qk_matrix", "ov_matrix", "query", "key", "value", "output"}:
        sites[name] = sites[name][rows, order]
    return float((order != torch.arange(heads, device=order.device)).any(-1).double().mean())


def _derived(
    model: ScalarModel | EmbeddingModel, sites: Mapping[str, Tensor], u: Tensor, group: int
) -> dict[str, Tensor]:
    """Log-determinants, margins and regime at the tokens of some sequences, ``(S, ...)`` each, a group at a time."""
    raw = {name: sites[name] for name in sites if name in _RAW}
    total = len(next(iter(raw.values())))
    parts: dict[str, list[Tensor]] = {name: [] for name in ("log_abs_det", "margin", "regime", "smallest_abs_det")}
    with torch.no_grad():
        for begin in range(0, total, group):
            values = {name: value[begin : begin + group].unsqueeze(1) for name, value in raw.items()}
            attention = model.attention_of(values)  # batch (S, 1) beside u's (N,)
            sign, logabs = attention.logabsdet(u)
            folded = (sign < 0) | (stability_margin(attention, u, kind="spectral") <= 0)
            certified = (contraction_bound(attention, u) < 1).all(-1)
            code = torch.where(folded.any(-1), 2, torch.where(certified, 0, 1))
            parts["log_abs_det"].append(logabs)
            parts["margin"].append(stability_margin(attention, u))
            parts["regime"].append(code.to(torch.int8))
            parts["smallest_abs_det"].append(logabs.flatten(1).amin(-1).exp())
    derived = {name: torch.cat(values) for name, values in parts.items()}
    return {**derived, "smallest_margin": derived["margin"].flatten(1).amin(-1)}


def _predict(
    model: ScalarModel | EmbeddingModel, values: Mapping[str, Tensor], sequences: int, seed: int
) -> tuple[Tensor | None, float]:
    """Usable data sets drawn with the parameters, ``(S', N, T, p)``, and the share of those that are not usable."""
    with isolated(model.unit.device, seed=seed), torch.no_grad():
        u, usable = draw_data_sets(model, values, sequences)
    return (u[usable] if bool(usable.any()) else None), 1 - float(usable.double().mean())
