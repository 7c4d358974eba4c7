"""A fit leaves the process as it was: Pyro's store and settings, random numbers, validation; alone or in threads."""

import threading

import pyro
import pytest
import torch
from posteriors import bilinear_model, short_sequences

from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import MapConfig, fit_map
from probattn.inference.methods.nuts import NutsConfig, fit_nuts
from probattn.inference.methods.svi import SviConfig, fit_svi
from probattn.inference.results.posterior import assemble

U = short_sequences()


def by_nuts(seed, method="vectorised", chains=2):
    config = NutsConfig(chains=chains, chain_method=method, warmup=20, draws=4, max_depth=3, seed=seed)
    return fit_nuts(LogDensity(bilinear_model(U), U), config).z


def by_map(seed):
    return fit_map(LogDensity(bilinear_model(U), U), MapConfig(steps=10, seed=seed)).z


def by_laplace(seed):
    target = LogDensity(bilinear_model(U), U)
    draws = fit_laplace(target, LaplaceConfig(draws=20, seed=seed))
    return torch.as_tensor(assemble(target, draws, seed=seed, predictive=4).groups["posterior_predictive"]["u"])


METHODS = {
    "nuts": by_nuts,
    "stock nuts": lambda seed: by_nuts(seed, "sequential", chains=1),
    "svi": lambda seed: fit_svi(LogDensity(bilinear_model(U), U), SviConfig(steps=10, draws=8, seed=seed)).z,
    "laplace": by_laplace,
    "map": by_map,
}


def state():
    return {
        "store": sorted(pyro.get_param_store().keys()),
        "settings": pyro.settings.get(),
        "validation": torch.distributions.Distribution._validate_args,
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "random": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("name", METHODS)
def test_the_process_is_as_before(name):
    pyro.param("the user's own", torch.tensor(3.0))
    before = state()
    METHODS[name](0)
    assert state() == before
    assert pyro.param("the user's own").item() == 3.0
    pyro.clear_param_store()


@pytest.mark.parametrize("name", METHODS)
def test_one_after_the_other_and_in_threads(name):
    fit = METHODS[name]
    alone = [fit(seed) for seed in (0, 1)]
    assert torch.equal(fit(0), alone[0])
    assert not torch.equal(*alone)
    together = {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: fit(seed)})) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[seed], alone[seed]) for seed in (0, 1))
