"""From draws to a :class:`Fit` of a layer: strengths of heads, determinants along the posterior, streams to compare."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probattn.errors import NoSolutionError
from probattn.hf.layers.update import logit_change, relative_size
from probattn.hf.layers.volume import log_volume
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.results.fit_file import Fit
from probattn.inference.runtime.isolation import isolated
from probattn.models.layer import LayerModel
from probattn.models.layer_simulate import continue_streams

__all__ = ["assemble_layer", "stream_statistics"]

Array = NDArray[Any]
_LOG = logging.getLogger(__name__)
_SCORED = 100  # draws per chain whose likelihood is kept sequence by sequence: each costs a pass over all blocks
_DETERMINANTS = 20  # draws at which the signs of the determinants are looked at
_PRIOR = 500
_SIGNS = ("gain", "inverse_temperature", "share", "update_in", "update_out")  # what the determinants depend on
_DIMS = {
    "gain": ["head"],
    "inverse_temperature": ["head"],
    "strength": ["head"],
    "noise_scale": ["scale"],
    "noise_factor": ["coordinate", "factor"],
    "update_in": ["updated_head", "rank", "feature"],
    "update_out": ["updated_head", "query", "rank"],
    "logit_change": ["updated_head"],
    "update_norm": ["updated_head"],
    "update_spectral_norm": ["updated_head"],
    "norm": ["sequence"],
    "difference": ["sequence"],
}


def assemble_layer(
    target: LogDensity,
    draws: Draws,
    *,
    seed: int = 0,
    predictive: int = 8,
    attributes: Mapping[str, Any] | None = None,
) -> Fit:
    """All groups of a fit of a :class:`~probattn.models.layer.LayerModel`.

    Args:
        target: log-density of the posterior, with data ``(N, T, p)``.
        draws: draws from it, or from an approximation to it.
        seed: random seed of prior and predictive draws.
        predictive: number of posterior predictive data sets, each of one sequence per sequence of the data, which go on
            from its given tokens; 0 for none.
        attributes: versions, hardware and the like, by name.

    Returns:
        :class:`Fit` with the groups posterior, sample_stats, log_likelihood per sequence and log_prior at some of the
        draws, prior, observed_data and posterior_predictive (mean norm and mean successive difference of each
        sequence), and constant_data. The posterior has the sites, ``strength``, the share times the gains, and of a
        change of low rank, whose factors are known up to a change of basis, ``logit_change``, ``update_norm`` and
        ``update_spectral_norm`` as of :mod:`probattn.hf.layers.update`. Attributes of the signs: ``draws_looked_at``
        and ``positive_draws``, those with det J > 0 at every token looked at.
    """
    model, u = cast(LayerModel, target.model), target.data[0]
    chains, count, dim = draws.z.shape
    flat = draws.z.reshape(-1, dim)
    sites = _with_derived(model, target.constrain(flat), u)
    kept = torch.linspace(0, count - 1, min(count, _SCORED)).round().long()
    _LOG.info("scoring %d of %d draws, sequence by sequence", len(kept) * chains, count * chains)
    terms = target.evaluate(draws.z[:, kept].reshape(-1, dim))
    looked, positive = _signs(model, sites, u)
    prior = _with_derived(model, target.prior_draws(_PRIOR, seed), u)

    def by_chain(values: Mapping[str, Tensor]) -> dict[str, Array]:
        return {k: v.reshape(chains, -1, *v.shape[1:]).detach().cpu().numpy() for k, v in values.items()}

    groups: dict[str, dict[str, Array]] = {
        "posterior": by_chain(sites),
        "sample_stats": {name: values.cpu().numpy() for name, values in draws.statistics.items()},
        "log_likelihood": by_chain({"u": terms["u"]}),
        "log_prior": by_chain({name: terms[name] for name in target.sites}),
        "prior": {name: value.unsqueeze(0).cpu().numpy() for name, value in prior.items()},
        "observed_data": {name: value.cpu().numpy() for name, value in stream_statistics(u, model.given).items()},
        "constant_data": {"length": np.array(u.shape[1]), "sequences": np.array(len(u))},
    }
    if predictive:
        _LOG.info("drawing %d data sets, token by token, to compare with the streams", predictive)
    predicted = _predict(model, sites, u, predictive, seed)
    if predicted:
        groups["posterior_predictive"] = {name: value.unsqueeze(0).cpu().numpy() for name, value in predicted.items()}
    statistics = groups["observed_data"]
    axes: dict[str, list[str]] = {name: names for name, names in _DIMS.items() if name in sites or name in statistics}
    axes["log_likelihood.u"] = ["sequence"]
    axes |= {f"log_prior.{name}": [] for name in target.sites}
    coords = {
        "head": np.arange(model.heads),
        "sequence": np.arange(len(u)),
        "scale": np.arange(sites["noise_scale"].shape[-1]),
    }
    if "noise_factor" in sites:
        coords |= {"coordinate": np.arange(model.dim), "factor": np.arange(model.noise_rank)}
    if model.update is not None:
        coords |= {
            "updated_head": np.array(model.update.heads),
            "rank": np.arange(model.update.rank),
            "feature": np.arange(model.dim),
            "query": np.arange(model.update.size),
        }
    signs = {"draws_looked_at": looked, "positive_draws": positive}
    return Fit(draws.method, groups, axes, coords, {**dict(attributes or {}), **draws.info, **signs})


def stream_statistics(u: Tensor, given: int) -> dict[str, Tensor]:
    """Mean norm of the tokens of each sequence, and of their successive differences, ``(*batch, N)`` each.

    Args:
        u: streams, ``(*batch, N, T, p)``.
        given: number of first tokens to leave out.
    """
    counted = u[..., given:, :]
    norm, difference = counted.norm(dim=-1), counted.diff(dim=-2).norm(dim=-1)
    return {"norm": norm.mean(-1), "difference": difference.mean(-1)}


def _with_derived(model: LayerModel, sites: Mapping[str, Tensor], u: Tensor) -> dict[str, Tensor]:
    """Sites and what follows from them; of a change of low rank, what its factors have in common with all others."""
    share = sites.get("share")
    found = {**sites, "strength": sites["gain"] if share is None else share.unsqueeze(-1) * sites["gain"]}
    update = model.update_of(sites)
    if update is not None:
        size = relative_size(model.layer, update)
        found["logit_change"] = logit_change(model.layer, update, u, model.given)
        found |= {"update_norm": size.frobenius, "update_spectral_norm": size.spectral}
    return found


def _signs(model: LayerModel, sites: Mapping[str, Tensor], u: Tensor) -> tuple[int, int]:
    """Number of draws looked at, and of those with det J > 0 at all their tokens."""
    total = len(sites["gain"])
    chosen = torch.linspace(0, total - 1, min(total, _DETERMINANTS)).round().long().unique()
    with torch.no_grad():
        values = {name: sites[name][chosen].unsqueeze(1) for name in _SIGNS if name in sites}
        layer, update = model.scaled_layer(values), model.update_of(values)
        sign = log_volume(layer, u, _rows(model, u), update=update).smallest_sign
    return len(chosen), int((sign > 0).all(-1).sum())


def _rows(model: LayerModel, u: Tensor) -> Tensor:
    return torch.arange(model.given, model.length, device=u.device) if model.rows is None else model.rows


def _predict(model: LayerModel, sites: Mapping[str, Tensor], u: Tensor, count: int, seed: int) -> dict[str, Tensor]:
    """Statistics of data sets drawn with some of the parameters, ``(count, N)`` by name; empty if none can be drawn."""
    rows = np.random.default_rng(seed).permutation(len(sites["gain"]))[:count]
    found = []
    with isolated(u.device, seed=seed), torch.no_grad():
        for row in rows.tolist():
            values = {name: value[row] for name, value in sites.items()}
            try:
                drawn = continue_streams(model, values, u, model.noise_of(values).expand((len(u),)).sample())
            except NoSolutionError as error:
                _LOG.info("a predictive data set was left out: %s", error)
                continue
            found.append(stream_statistics(drawn, model.given))
    return {name: torch.stack([one[name] for one in found]) for name in found[0]} if found else {}
