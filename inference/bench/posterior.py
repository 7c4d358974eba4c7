"""Effective draws per second of NUTS on a 2 x 2 QK matrix and a noise scale, 8 sequences of 32 tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probattn.attention import CausalAttention
from probattn.inference.bench.harness import Row, Timing
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.nuts import NutsConfig, fit_nuts
from probattn.models.embedding import EmbeddingModel
from probattn.models.simulate import simulate

__all__ = ["nuts"]

Array = NDArray[np.float64]
_A = ((0.08, 0.03), (-0.03, 0.05))
_LENGTH, _SEQUENCES = 32, 8
_CHAINS, _WARMUP, _DRAWS = 32, 150, 150


class _Sampled(NamedTuple):
    draws: Mapping[str, Array]  # (chains, draws, ...)
    seconds: float


def nuts(rounds: int) -> list[Row]:
    """Race the vectorised chains against Pyro's own NUTS on the model and against NumPyro's vectorised chains.

    The measure is the smallest bulk effective sample size of the parameters per second, warm-up included.

    Args:
        rounds: rounds of the race, of which two at most are run.

    Returns:
        One row per competitor; without NumPyro its row says so.
    """
    model, u = _problem()
    target = LogDensity(model, u)
    config = NutsConfig(chains=_CHAINS, warmup=_WARMUP, draws=_DRAWS)
    competitors: dict[str, Callable[[], _Sampled]] = {
        "vectorised": lambda: _ours(target, config),
        "stock Pyro": lambda: _ours(target, replace(config, chains=1, chain_method="sequential")),
    }
    missing = ""
    try:
        competitors["NumPyro"] = _numpyro(u.numpy())
    except ImportError:
        missing = "NumPyro is not installed; install probattn[bench]."
    rates: dict[str, list[float]] = {name: [] for name in competitors}
    taken: dict[str, list[float]] = {name: [] for name in competitors}
    means: dict[str, list[float]] = {}
    for _ in range(max(1, min(rounds, 2))):
        for name, run in competitors.items():
            sampled = run()
            rates[name].append(_smallest_ess(sampled.draws) / sampled.seconds)
            taken[name].append(sampled.seconds)
            means[name] = [round(float(m), 4) for m in sampled.draws["qk_matrix"].reshape(-1, 4).mean(0)]
    best = {name: max(found) for name, found in rates.items()}
    seconds = {name: Timing(min(found), float(np.median(found)), len(found)) for name, found in taken.items()}
    work = (
        f"NUTS, smallest bulk ESS per second, {_CHAINS} vectorised chains, 2 x 2 matrix and noise scale, 8 x 32 tokens"
    )
    rows = []
    for other, goal in (("stock Pyro", 4.0), ("NumPyro", 1.0)):
        known = other in best
        named = ("vectorised", other)
        rows.append(
            Row(
                work,
                "Pyro's NUTS on the model, one chain"
                if other == "stock Pyro"
                else "NumPyro's vectorised NUTS, compiled",
                best["vectorised"] / best[other] if known else None,
                faster=True,
                goal=goal,
                seconds={name: seconds[name] for name in named if name in seconds},
                notes={
                    **{f"ESS per second, {name}": round(best[name], 1) for name in named if name in best},
                    **{f"posterior mean of A, {name}": means[name] for name in named if name in means},
                    **({} if known else {"not measured": missing}),
                },
            )
        )
    return rows


def _problem() -> tuple[EmbeddingModel, Tensor]:
    attention = CausalAttention.from_qk_matrix(torch.tensor(_A, dtype=torch.float64))
    u = simulate(attention, 1.0, _LENGTH, _SEQUENCES, seed=0, selection="uniform").u
    return EmbeddingModel(_LENGTH, 2, parameters="qk_matrix"), u


def _ours(target: LogDensity, config: NutsConfig) -> _Sampled:
    start = time.perf_counter()
    found = fit_nuts(target, config)
    seconds = time.perf_counter() - start
    flat = found.z.flatten(0, 1)
    values = target.constrain(flat)
    shape = found.z.shape[:2]
    return _Sampled({name: value.unflatten(0, shape).numpy() for name, value in values.items()}, seconds)


def _smallest_ess(draws: Mapping[str, Array]) -> float:
    from arviz_stats.base import array_stats

    found = []
    for values in draws.values():
        flat = values.reshape(*values.shape[:2], -1)
        found += [float(array_stats.ess(flat[..., k], method="bulk")) for k in range(flat.shape[-1])]
    return min(found)


def _numpyro(u: Array) -> Callable[[], _Sampled]:
    """Return a run of the same model in NumPyro; the first call, which compiles, is made here and not timed."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.infer import MCMC, NUTS, init_to_uniform

    numpyro.enable_x64()
    data = jnp.asarray(u)
    length, dim = u.shape[-2:]
    past = jnp.tril(jnp.ones((length, length), dtype=bool), -1)

    def model() -> None:
        matrix = numpyro.sample("qk_matrix", dist.Normal(0.0, dim**-0.5).expand([1, dim, dim]).to_event(3))[0]
        scale = numpyro.sample("noise_scale", dist.LogNormal(0.0, 0.5).expand([dim]).to_event(1))
        logits = jnp.einsum("nip,qp,nsq->nis", data, matrix, data)
        weights = jnp.where(past, jax.nn.softmax(jnp.where(past, logits, -1e300), axis=-1), 0.0)
        mean = weights @ data
        second = jnp.einsum("nis,nsp,nsq->nipq", weights, data, data)
        cov = second - mean[..., :, None] * mean[..., None, :]
        logdet = jnp.linalg.slogdet(jnp.eye(dim) - cov @ matrix)[1]
        noise = dist.Normal(0.0, scale).log_prob(data - mean).sum()
        numpyro.factor("u", noise + logdet.sum())

    def run(seed: int = 0) -> _Sampled:
        start = time.perf_counter()
        sampler.run(jax.random.PRNGKey(seed))
        found = {name: np.asarray(value) for name, value in sampler.get_samples(group_by_chain=True).items()}
        return _Sampled(found, time.perf_counter() - start)

    options: dict[str, Any] = {"num_chains": _CHAINS, "chain_method": "vectorized", "progress_bar": False}
    # NumPyro's own choice, up to 2 from zero, starts beyond the folds, where |det J| holds some chains for good.
    kernel = NUTS(model, init_strategy=init_to_uniform(radius=0.1))
    sampler = MCMC(kernel, num_warmup=_WARMUP, num_samples=_DRAWS, **options)
    run(1)
    return run
