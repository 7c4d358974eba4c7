r"""Simulation-based calibration: a method's posterior holds what produced the data as often as it says, or not.

Draw theta from the prior, data from the model, and L draws from the method's posterior; the rank of any quantity of
theta and the data among its L posterior values is then uniform on 0..L (Talts et al., 2018, arXiv 1804.06788; test
quantities that use the data: Modrak et al., 2023, arXiv 2211.02383). A method that is biased, too sure or not sure
enough bends the distribution of the ranks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import joblib
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probattn.barrier import stability_margin
from probattn.errors import InputError, require_at_least, require_choice
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.nuts import NutsConfig, fit_nuts
from probattn.inference.methods.svi import SviConfig, fit_svi
from probattn.inference.runtime.files import write_json
from probattn.inference.runtime.isolation import isolated
from probattn.inference.runtime.progress import log_step
from probattn.inference.runtime.seeds import derived_seed
from probattn.models.embedding import EmbeddingModel
from probattn.models.simulate import draw_data_sets
from probattn.solve.bound import contraction_bound

__all__ = [
    "METHODS",
    "Band",
    "Ranks",
    "Simulated",
    "Study",
    "calibrate",
    "quantities",
    "rank_band",
    "rank_truth",
    "simulate_study",
]

Array = NDArray[np.float64]
Sampler = Callable[[EmbeddingModel, Tensor, int, int], Tensor]
_SIMULATIONS = 20_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Study:
    """Data sets drawn from prior and model.

    The prior is tight on purpose: where the attention may fold the model defines no distribution, and nothing could be
    calibrated.

    Attributes:
        replicates: number of data sets R.
        sequences: number of sequences N in each.
        length: number of tokens T in a sequence.
        dim: number of coordinates p of a token.
        prior_scale: scale of the prior of the QK matrix A, see :class:`EmbeddingModel`.
        noise_spread: spread of the prior of the noise scales.
        ranked: number L of posterior draws among which the truth is ranked.
        seed: random seed.
    """

    replicates: int = 200
    sequences: int = 8
    length: int = 16
    dim: int = 2
    prior_scale: float = 0.08
    noise_spread: float = 0.2
    ranked: int = 99
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("replicates", 1), ("sequences", 1), ("length", 3), ("dim", 1), ("ranked", 3)):
            require_at_least(name, getattr(self, name), least)

    def model(self) -> EmbeddingModel:
        """The model of the study."""
        return EmbeddingModel(
            self.length,
            self.dim,
            parameters="qk_matrix",
            prior_scale=self.prior_scale,
            noise_spread=self.noise_spread,
        )


class Simulated(NamedTuple):
    """Parameters with data.

    Attributes:
        values: values of the sites, ``(R, *event)`` by name.
        u: data sets, ``(R, N, T, p)``.
        redrawn: number of parameters left out because their attention folded on a path. Where this is not 0 the study
            is of the model given that nothing folds, and only nearly exact.
        certified: share of the sequences whose regime is certified.
    """

    values: dict[str, Tensor]
    u: Tensor
    redrawn: int
    certified: float


def simulate_study(study: Study) -> Simulated:
    """Draw the data sets of a study.

    Args:
        study: sizes, prior and seed.

    Raises:
        InputError: more than half of the parameters fold.
    """
    model = study.model()
    asked = 2 * study.replicates
    prior = LogDensity(model, torch.zeros(1, study.length, study.dim, dtype=torch.float64)).prior_draws(
        asked, study.seed
    )
    with isolated(seed=study.seed + 1), torch.no_grad():
        u, usable = draw_data_sets(model, prior, study.sequences)
    kept = usable.nonzero().squeeze(-1)[: study.replicates]
    if len(kept) < study.replicates:
        raise InputError(
            f"prior_scale is {study.prior_scale}: only {int(usable.sum())} of {asked} parameters do not fold; a model "
            "that defines no distribution cannot be calibrated. Tighten it, or shorten the sequences."
        )
    values = {name: value[kept] for name, value in prior.items()}
    redrawn = int(kept[-1]) + 1 - study.replicates
    attention = model.attention_of({name: value.unsqueeze(1) for name, value in values.items()})
    certified = (contraction_bound(attention, u[kept]) < 1).all(-1).double().mean()
    return Simulated(values, u[kept], redrawn, float(certified))


def quantities(model: EmbeddingModel, values: Mapping[str, Tensor], u: Tensor) -> dict[str, Tensor]:
    """Ranked quantities: the products, the noise scales, log p(u | theta), and the smallest margin at the data.

    Args:
        model: model that made the data, whatever the method assumed.
        values: values of its sites, ``(S, R, *event)`` by name.
        u: data sets, ``(R, N, T, p)``.

    Returns:
        ``(S, R)`` by name.
    """
    lifted = {name: value.unsqueeze(2) for name, value in values.items()}  # (S, R, 1, *event) beside u's (R, N)
    attention = model.attention_of(lifted)
    products = attention.qk_matrix.squeeze(2).flatten(2)  # (S, R, H p p)
    found = {f"A[{k // model.dim % model.dim}, {k % model.dim}]": products[..., k] for k in range(products.shape[-1])}
    if "noise_scale" in values:
        found |= {f"noise_scale[{k}]": values["noise_scale"][..., k] for k in range(model.dim)}
    return {
        **found,
        "log_likelihood": model.likelihood(lifted).log_prob(u).sum(-1),
        "smallest_margin": stability_margin(attention, u).flatten(2).amin(-1),
    }


def rank_truth(
    model: EmbeddingModel, values: Mapping[str, Tensor], u: Tensor, draws: Tensor
) -> dict[str, tuple[Array, Array]]:
    """Rank of the true value of each quantity among its posterior draws, and the error of their mean.

    Args:
        model: model that made the data.
        values: true values of its sites, ``(R, *event)`` by name.
        u: data sets, ``(R, N, T, p)``.
        draws: posterior draws in unconstrained space, ``(R, L, D)``.

    Returns:
        Ranks from 0 to L and errors of the posterior mean, ``(R,)`` each, by quantity.
    """
    target = LogDensity(model, u)
    with torch.no_grad():
        truth = quantities(model, {name: value.unsqueeze(0) for name, value in values.items()}, u)
        groups = draws.transpose(0, 1).split(max(1, target.group_size // len(u)))  # (L, R, D)
        drawn = [quantities(model, target.constrain(group), u) for group in groups]
    found = {}
    generator = np.random.default_rng(len(u))
    for name, true in truth.items():
        sample = torch.cat([part[name] for part in drawn])  # (L, R)
        below, equal = ((sample < true).sum(0).cpu().numpy(), (sample == true).sum(0).cpu().numpy())
        # Among equals (a margin of one, where no token comes nearer than the first) the place is left to chance.
        ranks = (below + generator.integers(0, equal + 1)).astype(float)
        found[name] = (ranks, (sample.mean(0) - true.squeeze(0)).double().cpu().numpy())
    return found


def _thinned(draws: Draws, count: int) -> Tensor:
    """Some draws spread evenly over all of them, ``(count, D)``."""
    flat = draws.z.reshape(-1, draws.z.shape[-1])
    return flat[torch.linspace(0, len(flat) - 1, count).round().long()]


def _nuts(model: EmbeddingModel, u: Tensor, count: int, seed: int) -> Tensor:
    """One vectorised chain per data set, every fourth draw."""
    config = NutsConfig(chains=len(u), warmup=200, draws=4 * count, seed=seed)
    return fit_nuts(LogDensity(model, u), config).z[:, 3::4]


def _without_jacobian(sampler: Sampler) -> Sampler:
    def sample(model: EmbeddingModel, u: Tensor, count: int, seed: int) -> Tensor:
        return sampler(model.altered(jacobian=False), u, count, seed)

    return sample


def _one_by_one(fit: Callable[[LogDensity, int, int], Draws]) -> Sampler:
    def sample(model: EmbeddingModel, u: Tensor, count: int, seed: int) -> Tensor:
        return torch.stack([_thinned(fit(LogDensity(model, one), count, seed + k), count) for k, one in enumerate(u)])

    return sample


def _fit_laplace(target: LogDensity, count: int, seed: int, *, correct: bool) -> Draws:
    return fit_laplace(target, LaplaceConfig(draws=4 * count, seed=seed, correct=correct))


def _fit_pyro(target: LogDensity, count: int, seed: int) -> Draws:
    return fit_nuts(target, NutsConfig(chains=1, chain_method="sequential", warmup=200, draws=4 * count, seed=seed))


def _fit_svi(target: LogDensity, count: int, seed: int, **options: Any) -> Draws:
    return fit_svi(target, SviConfig(draws=4 * count, seed=seed, shards=1, **options))


_laplace = _one_by_one(partial(_fit_laplace, correct=True))

METHODS: Mapping[str, Sampler] = MappingProxyType(
    {
        "nuts": _nuts,
        "nuts_without_jacobian": _without_jacobian(_nuts),
        "nuts_pyro": _one_by_one(_fit_pyro),
        "laplace": _laplace,
        "laplace_without_jacobian": _without_jacobian(_laplace),
        "laplace_uncorrected": _one_by_one(partial(_fit_laplace, correct=False)),
        "svi_full_rank": _one_by_one(partial(_fit_svi, guide="full_rank")),
        "svi_mean_field": _one_by_one(partial(_fit_svi, guide="mean_field", correct=False)),
    }
)


def calibrate(
    study: Study,
    method: str,
    *,
    simulated: Simulated | None = None,
    jobs: int = 1,
    chunk: int = 50,
    store: Path | None = None,
) -> Ranks:
    """Rank the truth among the posterior draws of one method, for every data set of a study.

    The replicates are cut into chunks, which run through joblib: inside ``joblib.parallel_config(backend="dask")`` (or
    ray) a cluster takes them. The ranks depend on the study alone, not on how many workers there are.

    Args:
        study: sizes, prior and seed.
        method: name among :data:`METHODS`.
        simulated: data sets of the study where they have been drawn already.
        jobs: number of workers.
        chunk: number of replicates that one worker takes at a time; NUTS runs them in one tensor program.
        store: JSON file that keeps finished chunks; those in it are not computed again.

    Raises:
        InputError: an unknown method, a store of another study.
    """
    require_choice("method", method, tuple(METHODS))
    drawn = simulate_study(study) if simulated is None else simulated
    chunks = list(range(0, study.replicates, chunk))
    identity = {**asdict(study), "method": method, "chunk": chunk}
    done = _load(store, identity)
    missing = [begin for begin in chunks if str(begin) not in done]
    results = joblib.Parallel(n_jobs=jobs, return_as="generator", max_nbytes=None)(
        joblib.delayed(_chunk)(study, method, drawn, begin, chunk) for begin in missing
    )
    for begin, found in zip(missing, results, strict=True):
        done[str(begin)] = {name: [part.tolist() for part in both] for name, both in found.items()}
        if store is not None:
            write_json(store, {"schema": 1, "identity": identity, "chunks": done})
        count = sum(len(next(iter(part.values()))[0]) for part in done.values())
        words = method.replace("_", " ")
        log_step(_log, f"calibration of {words}: {count} of {study.replicates}", count, study.replicates)
    parts = [done[str(begin)] for begin in chunks]
    ranks, errors = (
        {name: np.concatenate([np.asarray(part[name][k]) for part in parts]) for name in parts[0]} for k in (0, 1)
    )
    return Ranks(method, study.ranked, ranks, errors)


def _chunk(study: Study, method: str, drawn: Simulated, begin: int, size: int) -> dict[str, tuple[Array, Array]]:
    """Ranks and errors of some replicates."""
    model, part = study.model(), slice(begin, begin + size)
    values, u = {name: value[part] for name, value in drawn.values.items()}, drawn.u[part]
    draws = METHODS[method](model, u, study.ranked, derived_seed(study.seed, begin))
    return rank_truth(model, values, u, draws)


def _load(store: Path | None, identity: Mapping[str, Any]) -> dict[str, dict[str, list[list[float]]]]:
    if store is None or not store.exists():
        return {}
    try:
        content = json.loads(store.read_text())
        chunks: dict[str, dict[str, list[list[float]]]] = content["chunks"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{store}: cannot be read ({error}); delete it and start anew.") from None
    if content["identity"] != identity:
        raise InputError(f"{store}: ranks of another study; give another folder, or delete it.")
    return chunks


@dataclass(frozen=True)
class Ranks:
    """Ranks of the truth.

    Attributes:
        method: name of the method.
        ranked: number L of posterior draws among which the truth is ranked.
        ranks: ranks from 0 to L, ``(R,)`` by quantity.
        errors: posterior mean minus truth, ``(R,)`` by quantity.
    """

    method: str
    ranked: int
    ranks: Mapping[str, Array]
    errors: Mapping[str, Array]

    def uniform(self) -> dict[str, Array]:
        """Randomised ranks (rank + v) / (L + 1) with v uniform, for a calibrated method exactly uniform on (0, 1).

        Returns:
            ``(R,)`` by quantity.
        """
        generator = np.random.default_rng(0)
        return {name: (r + generator.random(len(r))) / (self.ranked + 1) for name, r in self.ranks.items()}

    def excess(self, error: float = 0.01) -> dict[str, float]:
        """Largest distance of the ECDF of each quantity from its band; at most 0 where it stays within.

        Args:
            error: probability that a calibrated method leaves any band (Bonferroni over the quantities).
        """
        band = rank_band(len(next(iter(self.ranks.values()))), 1 - error / len(self.ranks))
        return {name: band.excess(values) for name, values in self.uniform().items()}

    def calibrated(self) -> bool:
        """Test that every ECDF stays within its band; a calibrated method fails in one percent of the studies."""
        return max(self.excess().values()) <= 0

    def coverage(self, level: float) -> dict[str, float]:
        """Share of the replicates whose central interval of a level holds the truth, by quantity.

        Args:
            level: probability of the interval.
        """
        tail = round((1 - level) / 2 * (self.ranked + 1))
        return {n: float(((r >= tail) & (r < self.ranked + 1 - tail)).mean()) for n, r in self.ranks.items()}


class Band(NamedTuple):
    """A simultaneous band for the ECDF of uniform numbers.

    Attributes:
        points: points at which the ECDF is compared, ``(K,)``.
        low: lower end of the band there, ``(K,)``.
        high: upper end of the band there, ``(K,)``.
    """

    points: Array
    low: Array
    high: Array

    def excess(self, values: Array) -> float:
        """Largest distance of the ECDF of some numbers from the band; at most 0 within.

        Args:
            values: numbers between 0 and 1, ``(count,)``.
        """
        from arviz_stats.ecdf_utils import compute_ecdf

        ecdf = compute_ecdf(values, self.points)
        return float(np.max(np.maximum(ecdf - self.high, self.low - ecdf)))


@cache
def rank_band(count: int, level: float) -> Band:
    """Band that the ECDF of uniform numbers stays within everywhere at once with a given probability.

    By simulation (Säilynoja, Bürkner and Vehtari, 2022, arXiv 2103.10522), as ArviZ draws it.

    Args:
        count: number of uniform numbers.
        level: probability.
    """
    from arviz_stats.ecdf_utils import get_pointwise_confidence_band, simulate_confidence_bands

    points = np.arange(1, count) / count
    generator = np.random.default_rng(0)
    pointwise = simulate_confidence_bands(count, 1, points, level, _SIMULATIONS, generator)
    low, high = get_pointwise_confidence_band(pointwise, count, points)
    return Band(points, low, high)
