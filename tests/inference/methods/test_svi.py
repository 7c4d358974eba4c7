"""Variational fits: right where the posterior is known, ended by their rule, resumed to the bit."""

import threading
from dataclasses import replace

import pytest
import torch
from posteriors import Linear, bilinear_model, moments, short_sequences

from probattn.errors import InputError
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.svi import SviConfig, fit_svi
from probattn.models import ScalarModel

TARGET = LogDensity(Linear(), Linear.data())
MEAN, COVARIANCE = Linear.posterior()
CONFIG = SviConfig(draws=2000, correct=False, window=50, shards=1)


@pytest.mark.parametrize("options", [{"guide": "full_rank"}, {"guide": "low_rank"}, {"renyi": 0.5}], ids=str)
def test_a_normal_posterior_is_found_with_its_correlation(options):
    draws = fit_svi(TARGET, replace(CONFIG, **options))
    assert draws.notes["stopped"] == "converged"
    found = moments(draws)
    deviations = COVARIANCE.diagonal().sqrt()
    # The guide's own error, from stochastic gradients, is a few hundredths of a deviation; so is the Monte Carlo error.
    assert bool(((found[0] - MEAN).abs() < 0.15 * deviations).all())
    torch.testing.assert_close(found[1], COVARIANCE, rtol=0.3, atol=0.0)
    assert draws.notes["khat_guide"] < 0.7


def test_the_mean_field_is_too_narrow_as_it_must_be():
    draws = fit_svi(TARGET, replace(CONFIG, guide="mean_field"))
    variances = moments(draws)[1].diagonal()
    # The optimum has the inverse of the precision's diagonal, smaller than the variances by 1 - correlation^2.
    expected = 1 / torch.linalg.inv(COVARIANCE).diagonal()
    torch.testing.assert_close(variances, expected, rtol=0.25, atol=0.0)
    assert bool((variances < 0.6 * COVARIANCE.diagonal()).all())


def test_correction_gives_the_mean_field_its_correlation_back():
    draws = fit_svi(TARGET, replace(CONFIG, guide="mean_field", correct=True))
    assert draws.notes["corrected"] == 1
    torch.testing.assert_close(moments(draws)[1], COVARIANCE, rtol=0.25, atol=0.02)


def test_a_flow_fits_the_posterior_of_an_attention():
    u = short_sequences()
    draws = fit_svi(LogDensity(bilinear_model(u), u), SviConfig(guide="flow", steps=400, draws=200, shards=1))
    assert draws.notes["guide"] == "flow"
    assert draws.z.dtype == torch.float64
    assert draws.z.shape == (1, 200, 6)
    assert bool(torch.isfinite(draws.stats["lp"]).all())


def test_the_step_limit_is_said_to_be_one():
    assert fit_svi(TARGET, replace(CONFIG, steps=60)).notes["stopped"] == "steps"


def test_minibatches_aim_at_the_same_posterior():
    u = short_sequences()
    target = LogDensity(ScalarModel(8, prior_scale=0.3), u[..., :1])
    whole = fit_svi(target, replace(CONFIG, guide="mean_field"))
    parts = fit_svi(target, replace(CONFIG, guide="mean_field", batch=1))
    (mean, covariance), (other, _) = moments(whole), moments(parts)
    # A forgotten plate scale would leave a third of the data: the means would differ by more than a deviation.
    assert bool(((mean - other).abs() < 0.4 * covariance.diagonal().sqrt()).all())


class StoppedError(Exception):
    pass


def test_resumed_is_the_unbroken_fit(tmp_path):
    config = replace(CONFIG, guide="full_rank", steps=240)
    whole = fit_svi(TARGET, config)
    path = tmp_path / "svi.pt"

    def stop(step, loss):
        if step == 150:
            raise StoppedError

    with pytest.raises(StoppedError):
        fit_svi(TARGET, config, checkpoint=path, report=stop)
    seen = []
    resumed = fit_svi(TARGET, config, checkpoint=path, resume=True, report=lambda step, loss: seen.append(step))
    assert seen[0] == 200
    assert torch.equal(resumed.z, whole.z)
    with pytest.raises(InputError, match="of another run"):
        fit_svi(TARGET, replace(config, steps=241), checkpoint=path, resume=True)


def test_shards_change_the_noise_and_not_the_posterior():
    found = [moments(fit_svi(TARGET, replace(CONFIG, guide="full_rank", shards=shards)))[0] for shards in (1, 3)]
    assert bool(((found[0] - found[1]).abs() < 0.2 * COVARIANCE.diagonal().sqrt()).all())


def test_an_objective_that_is_not_finite_stops_with_the_step():
    u = short_sequences()
    target = LogDensity(bilinear_model(u), u)
    start = torch.zeros(6, dtype=torch.float64)
    start[-2:] = -400.0  # a noise scale of exp(-400): the residuals' squares overflow
    with pytest.raises(ArithmeticError, match=r"step 0: the objective is"):
        fit_svi(target, CONFIG, start=start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "normal"}, "guide is 'normal'; use one of 'mean_field'"),
        ({"particles": 0}, "particles is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"draws": 2}, "draws is 2"),
        ({"renyi": 1.0}, "alpha must be finite and not 1"),
        ({"renyi": 0.5, "particles": 1}, "at least two particles"),
    ],
)
def test_options(options, message):
    with pytest.raises(InputError, match=message):
        SviConfig(**options)


def test_a_flow_in_one_dimension_is_refused():
    u = short_sequences()
    model = bilinear_model(u[..., :1], noise_scale=1.0)
    with pytest.raises(InputError, match="a flow needs at least two parameters"):
        fit_svi(LogDensity(model, u[..., :1]), replace(CONFIG, guide="flow"))


def test_two_fits_in_threads_are_the_two_fits():
    config = replace(CONFIG, guide="full_rank", steps=60)
    alone = [fit_svi(TARGET, replace(config, seed=seed)).z for seed in (0, 1)]
    results = {}

    def work(seed):
        results[seed] = fit_svi(TARGET, replace(config, seed=seed)).z

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], alone[seed]) for seed in (0, 1))
    assert not torch.equal(alone[0], alone[1])
