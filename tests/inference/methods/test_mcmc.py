"""Several chains by each of the chain methods, and the agreement of all methods on sequences with a known attention."""

import math

import joblib
import pytest
import torch
from posteriors import NOISE, A, bilinear_model, sequences, short_sequences

from probattn.errors import InputError
from probattn.inference.methods.laplace import fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.mcmc import McmcConfig, fit_nuts
from probattn.inference.methods.nuts import NutsConfig
from probattn.inference.methods.svi import SviConfig, fit_svi

U = short_sequences()
TARGET = LogDensity(bilinear_model(U), U)
SHORT = NutsConfig(warmup=30, draws=20)


def test_the_methods_agree_and_cover_the_truth():
    """8 sequences of 32 two-dimensional tokens with known A: NUTS, Laplace and SVI within Monte Carlo error."""
    from arviz_stats.base import array_stats

    u = sequences()
    target = LogDensity(bilinear_model(u, prior_scale=1.0), u)
    runs = {
        "nuts": fit_nuts(target, McmcConfig(chains=4, nuts=NutsConfig(warmup=150, draws=250))),
        "laplace": fit_laplace(target, draws=2000),
        "svi": fit_svi(target, SviConfig(draws=2000)),
    }
    truth = torch.cat([A.flatten(), NOISE.log()])
    summary = {}
    for name, draws in runs.items():
        if name != "nuts":
            assert draws.notes["corrected"] == 1
        columns = draws.z.numpy()
        worth = [float(array_stats.ess(columns[..., k], chain_axis=0, draw_axis=1)) for k in range(6)]
        worth = [min(size, float(draws.notes.get("importance_ess", math.inf))) for size in worth]
        flat = draws.z.reshape(-1, 6)
        summary[name] = (flat.mean(0), flat.std(0), torch.tensor(worth))
        low, high = flat.quantile(torch.tensor([0.005, 0.995], dtype=torch.float64), dim=0)
        assert bool(((low < truth) & (truth < high)).all()), name
    mean, deviation, size = summary["nuts"]
    for name in ("laplace", "svi"):
        other, spread, worth = summary[name]
        error = (deviation.square() / size + spread.square() / worth).sqrt()
        # Twelve comparisons of means at four standard errors: one in a thousand runs would fail by chance.
        assert bool(((other - mean).abs() < 4 * error).all()), name
        assert bool(((spread / deviation - 1).abs() < 4 * (0.5 / size + 0.5 / worth).sqrt() + 0.02).all()), name


def test_stock_chains_agree_with_vectorised_ones():
    config = NutsConfig(warmup=100, draws=150)
    own = fit_nuts(TARGET, McmcConfig(chains=4, nuts=config))
    stock = fit_nuts(TARGET, McmcConfig(chains=1, chain_method="sequential", nuts=config))
    for name, draws in (("vectorised", own), ("sequential", stock)):
        assert draws.notes["chain_method"] == name
        torch.testing.assert_close(
            draws.stats["lp"].flatten(), TARGET.log_density(draws.z.reshape(-1, 6)), rtol=1e-9, atol=1e-9
        )
    a, b = own.z.reshape(-1, 6), stock.z.reshape(-1, 6)
    # 150 draws of one chain are worth at least 40: five of their standard errors.
    assert bool(((a.mean(0) - b.mean(0)).abs() < 5 * a.std(0) / 40**0.5).all())
    assert set(stock.stats) == {"lp", "step_size", "acceptance_rate", "diverging"}
    assert bool((stock.stats["step_size"] > 0).all())


def test_processes_give_the_chains_of_the_sequential_run(tmp_path):
    """Two workers through joblib; whatever backend the user has chosen takes the chains."""
    runs = []
    for method in ("sequential", "process"):
        with joblib.parallel_config(backend="loky", inner_max_num_threads=torch.get_num_threads()):
            runs.append(fit_nuts(TARGET, McmcConfig(chains=2, chain_method=method, nuts=SHORT)))
    assert torch.equal(runs[0].z, runs[1].z)
    assert not torch.equal(runs[0].z[0], runs[0].z[1])


def test_finished_stock_chains_are_not_run_again(tmp_path, monkeypatch):
    config = McmcConfig(chains=2, chain_method="sequential", nuts=SHORT)
    path = tmp_path / "nuts.pt"
    whole = fit_nuts(TARGET, config, checkpoint=path, identity="x")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["nuts.pt.0", "nuts.pt.1"]
    (tmp_path / "nuts.pt.1").unlink()
    resumed = fit_nuts(TARGET, config, checkpoint=path, resume=True, identity="x")
    assert torch.equal(resumed.z, whole.z)
    with pytest.raises(InputError, match="of another run"):
        fit_nuts(TARGET, config, checkpoint=path, resume=True, identity="y")


def test_more_chains_than_the_memory_allows():
    with pytest.raises(InputError, match=r"chains is 64: about .* GiB at once, .* allowed; use at most \d+, or"):
        fit_nuts(TARGET, McmcConfig(chains=64, memory=10_000))
    alone = McmcConfig(chains=64, memory=100_000, chain_method="sequential")
    with pytest.raises(InputError, match="warmup is 3"):
        NutsConfig(warmup=3)
    assert alone.chains == 64


def test_options():
    with pytest.raises(InputError, match="chains is 0"):
        McmcConfig(chains=0)
    with pytest.raises(InputError, match="chain_method is 'parallel'; use one of 'vectorised', 'sequential', 'process'"):
        McmcConfig(chain_method="parallel")
