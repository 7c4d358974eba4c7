"""The Laplace approximation: exact where the posterior is normal, and honest where it cannot be made."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from listening import listening
from posteriors import Linear, bilinear_model, moments, sequences, short_sequences
from pyro.nn import PyroModule

from probattn.errors import InputError
from probattn.inference.methods.laplace import LaplaceConfig, find_mode, fit_laplace, init, update
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.starts import feasible_start
from probattn.inference.runtime.checkpoint import load_checkpoint
from probattn.models import EmbeddingModel

CONFIG = LaplaceConfig()
TARGET = LogDensity(Linear(), Linear.data())
ATTENTION = LogDensity(bilinear_model(sequences()), sequences())


def mode_of(target, start, config=CONFIG):
    state = init(target, config, start)
    while not state.ended and state.step < config.steps:
        update(state, target, config)
    return find_mode(state, target)[0]


def test_exact_for_a_normal_posterior():
    mean, covariance = Linear.posterior()
    start = torch.full((2,), 3.0, dtype=torch.float64)
    torch.testing.assert_close(mode_of(TARGET, start), mean)
    assert torch.equal(start, torch.full((2,), 3.0))
    drawn = fit_laplace(TARGET, LaplaceConfig(draws=4000, correct=False))
    found = moments(drawn)
    # Five standard errors of means and variances of 4000 independent draws.
    assert bool(((found[0] - mean).abs() <= 5 * (covariance.diagonal() / 4000).sqrt()).all())
    torch.testing.assert_close(found[1], covariance, rtol=0.12, atol=0.0)
    assert drawn.method == "laplace"
    assert drawn.info["flat_directions"] == 0
    # The approximation is the posterior: its weights are equal.
    ratio = drawn.statistics["lp"] - drawn.statistics["log_q"]
    assert float(ratio.max() - ratio.min()) < 1e-6
    assert not torch.equal(drawn.z, fit_laplace(TARGET, LaplaceConfig(draws=4000, correct=False, seed=1)).z)


def test_the_mode_is_one():
    mode = mode_of(ATTENTION, torch.zeros(6, dtype=torch.float64))
    value, gradient = ATTENTION.value_and_gradient(mode.unsqueeze(0))
    assert float(gradient.abs().max()) < 1e-8
    around = mode + 0.02 * torch.randn(50, 6, dtype=torch.float64)
    assert bool((ATTENTION.log_density(around) < value).all())


def test_newtons_steps_go_on_where_the_search_ends():
    """The search alone stops where values agree to rounding, some 1e-5 from where the gradient is zero."""
    state = init(ATTENTION, CONFIG, torch.zeros(6, dtype=torch.float64))
    while not state.ended:
        update(state, ATTENTION, CONFIG)
    searched = ATTENTION.value_and_gradient(state.z.detach()[None])[1]
    polished = ATTENTION.value_and_gradient(find_mode(state, ATTENTION)[0][None])[1]
    assert float(polished.abs().max()) < 0.1 * float(searched.abs().max())


def test_few_iterations_do_not_reach_a_mode():
    start = torch.tensor([0.8, -0.5, 0.4, 0.3, 1.0, -1.0], dtype=torch.float64)
    state = init(ATTENTION, replace(CONFIG, steps=12), start)
    update(state, ATTENTION, replace(CONFIG, steps=12))
    assert (state.step, state.ended) == (10, False)
    update(state, ATTENTION, replace(CONFIG, steps=12))
    assert state.step == 12
    with pytest.raises(InputError, match=r"no mode found from this start: the gradient is still .* after 1 steps"):
        fit_laplace(ATTENTION, replace(CONFIG, steps=1), start=start)


def flat_target():
    """A prior too wide to see: W_Q -> G W_Q, W_K -> G^-T W_K changes nothing, for any invertible 2 x 2 matrix G."""
    return LogDensity(EmbeddingModel(8, 2, rank=2, prior_scale=1e5, noise_scale=1.0), short_sequences())


def test_directions_without_curvature_are_counted_and_get_no_spread():
    target = flat_target()
    start = 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = fit_laplace(target, LaplaceConfig(draws=500), start=start)
    assert drawn.info == {"flat_directions": 4}
    assert set(drawn.statistics) == {"lp"}
    torch.testing.assert_close(drawn.statistics["lp"][0], target.log_density(drawn.z[0]))
    mode = mode_of(target, start)
    values, vectors = torch.linalg.eigh(-target.hessian(mode[None])[0])
    along = (drawn.z[0] - mode) @ vectors
    assert float(along[:, :4].abs().max()) < 1e-6
    # Standard deviations of 500 draws: five of their standard errors.
    torch.testing.assert_close(along[:, 4:].std(0), values[4:].rsqrt(), rtol=5 / 1000**0.5, atol=0)
    assert float(along[:, 4:].mean(0).abs().mul(values[4:].sqrt()).max()) < 5 / 500**0.5
    assert torch.equal(fit_laplace(target, LaplaceConfig(draws=500), start=start).z, drawn.z)
    other = fit_laplace(target, LaplaceConfig(draws=500, seed=1), start=start)
    assert not torch.equal(other.z, drawn.z)


class Saddle(PyroModule):
    """A density that grows away from 0 in one direction, by half the curvature with which it falls in the other."""

    growth = 1.0

    def forward(self, y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(theta[..., :1], 1.0).to_event(1), obs=y)
        pyro.factor("away", self.growth * theta[..., 1].square())


class Growing(PyroModule):
    """A density without a mode."""

    def forward(self, y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=torch.float64), 1e3).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0 * theta[..., :1], 1.0).to_event(1), obs=y)
        pyro.factor("up", theta[..., 1].exp())


class Cut(PyroModule):
    """A normal density that is cut off before its mode."""

    def forward(self, y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0 * theta, 1.0).to_event(1), obs=y)
        pyro.factor("edge", torch.where(theta[..., 0] > 1, -torch.inf, 3 * theta[..., 0]))


def built(kind, **attributes):
    with pyro.settings.context(module_local_params=True):
        model = kind()
    for name, value in attributes.items():
        setattr(model, name, value)
    return LogDensity(model, torch.ones(3, 1, dtype=torch.float64))


def test_no_mode_is_an_error_with_a_remedy():
    zero = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(InputError, match=r"a saddle \(curvature -1 beside 4\); start elsewhere"):
        fit_laplace(built(Saddle), CONFIG, start=zero)
    # Half of 1 - 2 growth is its curvature: the slightest growth is one, and none at all is a flat direction.
    with pytest.raises(InputError, match="saddle"):
        fit_laplace(built(Saddle, growth=0.5 + 1e-6), CONFIG, start=zero)
    assert fit_laplace(built(Saddle, growth=0.5), CONFIG, start=zero).info["flat_directions"] == 1
    assert fit_laplace(built(Saddle, growth=0.5 - 1e-6), CONFIG, start=zero).info["flat_directions"] == 0
    with pytest.raises(InputError, match="no mode found from this start"):
        mode_of(built(Growing), torch.full((2,), 20.0, dtype=torch.float64))
    with pytest.raises(InputError, match="no mode found from this start"):
        mode_of(built(Cut), torch.zeros(1, dtype=torch.float64))


def test_single_precision():
    """Differences of gradients have errors of 1e-4 there, which are neither flat directions nor saddles."""
    u = sequences().float()
    target = LogDensity(bilinear_model(u).float(), u)
    drawn = fit_laplace(target, LaplaceConfig(draws=200))
    assert drawn.z.dtype == torch.float32
    assert drawn.info["flat_directions"] == 0
    exact = fit_laplace(ATTENTION, LaplaceConfig(draws=200))
    deviations = exact.z[0].std(0)
    assert bool(((drawn.z[0].mean(0) - exact.z[0].mean(0)).abs() < 0.5 * deviations).all())


class StoppedError(Exception):
    pass


def test_resumed_is_the_unbroken_fit(tmp_path):
    config = LaplaceConfig(draws=20)
    start = torch.tensor([0.8, -0.5, 0.4, 0.3, 1.0, -1.0], dtype=torch.float64)
    whole = fit_laplace(ATTENTION, config, start=start)
    path = tmp_path / "laplace.pt"

    def stop(record):
        if record.step == 20:
            raise StoppedError

    with listening(stop), pytest.raises(StoppedError):
        fit_laplace(ATTENTION, config, start=start, checkpoint=path)
    assert load_checkpoint(path)["state"]["step"] == 10
    seen = []
    with listening(lambda record: seen.append(record)):
        resumed = fit_laplace(ATTENTION, config, start=start, checkpoint=path, resume=True)
    assert (seen[0].step, seen[0].total) == (20, 200)
    assert seen[0].getMessage().startswith("laplace step 20: largest gradient ")
    assert seen[-1].metrics["largest_gradient"] < 1e-4
    assert torch.equal(resumed.z, whole.z)
    seen.clear()
    with listening(lambda record: seen.append(record)):
        again = fit_laplace(ATTENTION, config, start=start, checkpoint=path, resume=True)
    assert seen == []  # it had ended
    assert torch.equal(again.z, whole.z)
    with pytest.raises(InputError, match="of another fit: seed is 0 there and 1 here"):
        fit_laplace(ATTENTION, replace(config, seed=1), checkpoint=path, resume=True)
    with pytest.raises(InputError, match="of another fit: power is None there and 2 here"):
        fit_laplace(ATTENTION, config, checkpoint=path, resume=True, identity={"power": 2})


def test_the_start_is_a_feasible_one():
    start = feasible_start(ATTENTION, 1, 3)[0]
    config = LaplaceConfig(draws=20, seed=3)
    assert torch.equal(fit_laplace(ATTENTION, config).z, fit_laplace(ATTENTION, config, start=start).z)


def test_options():
    for options, message in (({"draws": 3}, "draws is 3"), ({"steps": 0}, "steps is 0")):
        with pytest.raises(InputError, match=message):
            LaplaceConfig(**options)
