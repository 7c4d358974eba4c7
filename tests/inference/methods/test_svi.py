"""Variational fits: right where the posterior is known, ended by their rule, resumed to the bit."""

import math
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from listening import listening
from posteriors import Linear, bilinear_model, moments, short_sequences

from probattn.errors import InputError
from probattn.inference.methods import svi as module
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.minibatch import sharded_gradient
from probattn.inference.methods.starts import feasible_start
from probattn.inference.methods.svi import SviConfig, finish, fit_svi, init, update
from probattn.inference.runtime.checkpoint import load_checkpoint
from probattn.models import ScalarModel

TARGET = LogDensity(Linear(), Linear.data())
MEAN, COVARIANCE = Linear.posterior()
CONFIG = SviConfig(draws=2000, correct=False, window=50, shards=1)


@pytest.mark.parametrize("options", [{"guide": "full_rank"}, {"guide": "low_rank"}, {"renyi": 0.5}], ids=str)
def test_a_normal_posterior_is_found_with_its_correlation(options):
    drawn = fit_svi(TARGET, replace(CONFIG, stages=3, **options))
    assert drawn.info["stopped"] == "converged"
    found = moments(drawn)
    deviations = COVARIANCE.diagonal().sqrt()
    # The guide's own error, from stochastic gradients, is a few hundredths of a deviation; so is the Monte Carlo error.
    assert bool(((found[0] - MEAN).abs() < 0.15 * deviations).all())
    torch.testing.assert_close(found[1], COVARIANCE, rtol=0.3, atol=0.0)
    assert drawn.info["khat_guide"] < 0.7
    assert drawn.info["bound"] == ("renyi 0.5" if "renyi" in options else "elbo")


def test_the_mean_field_is_too_narrow_as_it_must_be():
    drawn = fit_svi(TARGET, replace(CONFIG, guide="mean_field", stages=3))
    variances = moments(drawn)[1].diagonal()
    # The optimum has the inverse of the precision's diagonal, smaller than the variances by 1 - correlation^2.
    expected = 1 / torch.linalg.inv(COVARIANCE).diagonal()
    torch.testing.assert_close(variances, expected, rtol=0.25, atol=0.0)
    assert bool((variances < 0.6 * COVARIANCE.diagonal()).all())


def test_correction_gives_the_mean_field_its_correlation_back():
    drawn = fit_svi(TARGET, replace(CONFIG, guide="mean_field", correct=True, stages=3))
    assert drawn.info["corrected"] == 1
    torch.testing.assert_close(moments(drawn)[1], COVARIANCE, rtol=0.25, atol=0.02)


@pytest.mark.parametrize(("guide", "shape"), [("mean_field", (2,)), ("low_rank", (2, 1)), ("full_rank", (2, 2))])
def test_a_normal_guide_begins_at_the_start(guide, shape):
    start = torch.tensor([0.7, -0.4], dtype=torch.float64)
    state = init(TARGET, replace(CONFIG, guide=guide), start)
    posterior = state.guide.get_posterior()
    torch.testing.assert_close(posterior.mean, start)
    torch.testing.assert_close(posterior.variance, torch.full((2,), 0.05**2).double(), rtol=1.01, atol=0)
    assert shape in {tuple(parameter.shape) for parameter in state.guide.parameters()}
    assert [group["lr"] for group in state.optimizer.param_groups] == [0.05]


def test_a_flow_fits_the_posterior_of_an_attention():
    u = short_sequences()
    drawn = fit_svi(LogDensity(bilinear_model(u), u), SviConfig(guide="flow", steps=20, draws=50, shards=1))
    assert drawn.info["guide"] == "flow"
    assert drawn.z.dtype == torch.float64
    assert drawn.z.shape == (1, 50, 6)
    assert bool(torch.isfinite(drawn.statistics["lp"]).all())
    # The tails of a flow are not at hand: it proposes alone.
    assert drawn.info.get("khat", drawn.info["khat_guide"]) == drawn.info["khat_guide"]


def test_minibatches_aim_at_the_same_posterior():
    u = short_sequences()
    target = LogDensity(ScalarModel(8, prior_scale=0.3), u[..., :1])
    config = replace(CONFIG, guide="mean_field", stages=2, particles=4)
    (mean, covariance), (other, _) = (moments(fit_svi(target, replace(config, batch=size))) for size in (0, 1))
    # A forgotten plate scale would leave a third of the data: the means would differ by more than a deviation.
    assert bool(((mean - other).abs() < 0.5 * covariance.diagonal().sqrt()).all())


def test_shards_change_the_noise_and_not_the_posterior():
    config = replace(CONFIG, stages=2, steps=400)
    found = [moments(fit_svi(TARGET, replace(config, shards=shards)))[0] for shards in (1, 3)]
    assert bool(((found[0] - found[1]).abs() < 0.25 * COVARIANCE.diagonal().sqrt()).all())
    assert not torch.equal(*found)


def parameters_of(state):
    return torch.cat([parameter.detach().flatten() for parameter in state.guide.parameters()])


class TestAveraging:
    CONFIG = replace(CONFIG, guide="mean_field", window=10, draws=4)

    def run(self, steps):
        state = init(TARGET, self.CONFIG, torch.zeros(2, dtype=torch.float64))
        path = []
        for _ in range(steps):
            update(state, TARGET, self.CONFIG)
            path.append(parameters_of(state))
        return state, torch.stack(path)

    @pytest.mark.parametrize(("steps", "last"), [(10, 10), (30, 10), (34, 4)])
    def test_the_guide_is_the_mean_over_the_last_window(self, steps, last):
        state, path = self.run(steps)
        drawn = finish(state, TARGET, self.CONFIG)
        torch.testing.assert_close(parameters_of(state), path[-last:].mean(0))
        # Nowhere near the last or all parameters, which would do as well where nothing moves.
        assert float((path[-last:].mean(0) - path[-1]).abs().max()) > 1e-3
        again = finish(state, TARGET, self.CONFIG)
        assert torch.equal(again.z, drawn.z)

    def test_the_average_is_what_is_drawn_from(self):
        state, path = self.run(20)
        drawn = finish(state, TARGET, replace(self.CONFIG, draws=4000)).z[0]
        location, scale = state.guide.get_posterior().mean, state.guide.get_posterior().stddev
        torch.testing.assert_close(location, path[-10:, :2].mean(0))
        assert bool(((drawn.mean(0) - location).abs() < 5 * scale / 4000**0.5).all())


class TestStopping:
    """The rule, with objectives that are given."""

    def fit(self, monkeypatch, windows, **options):
        given = iter([value for window in windows for value in window])

        def prescribed(backward, parameters, batch, shards, seed):
            sharded_gradient(backward, parameters, batch, shards, seed)
            for parameter in parameters:
                parameter.grad.zero_()
            return next(given)

        monkeypatch.setattr(module, "sharded_gradient", prescribed)
        config = replace(CONFIG, window=len(windows[0]), steps=sum(map(len, windows)), draws=4, **options)
        state = init(TARGET, config, torch.zeros(2, dtype=torch.float64))
        rates = []
        while state.step < config.steps and state.stage < config.stages:
            update(state, TARGET, config)
            rates.append(state.optimizer.param_groups[0]["lr"])
        return finish(state, TARGET, config), rates

    @staticmethod
    def window(mean):
        """Four objectives with standard deviation 1, and so a standard error of 1/2."""
        deviation = math.sqrt(3) / 2
        return [mean - deviation, mean + deviation] * 2

    def test_a_stage_ends_without_an_improvement_by_two_standard_errors(self, monkeypatch):
        # Of the difference of two windows the standard error is sqrt(1/2): two of them are 1.414.
        drawn, rates = self.fit(monkeypatch, [self.window(10.0), self.window(8.58), self.window(7.17)], stages=1)
        assert drawn.info["steps"] == 12
        assert drawn.info["stopped"] == "converged"
        drawn, _ = self.fit(monkeypatch, [self.window(10.0), self.window(8.60)], stages=1)
        assert drawn.info["stopped"] == "converged"
        drawn, _ = self.fit(monkeypatch, [self.window(10.0), self.window(8.58)], stages=1)
        assert drawn.info["stopped"] == "steps"
        assert rates == [0.05] * 12

    def test_the_best_so_far_is_kept(self, monkeypatch):
        means = [10.0, 8.0, 9.0, 7.0, 5.0, 5.0]
        drawn, rates = self.fit(monkeypatch, [self.window(mean) for mean in means], stages=3)
        assert drawn.history["objective"] == pytest.approx(means)
        assert drawn.history["step"] == [4, 8, 12, 16, 20, 24]
        # 9 and 7 are no better than 8 by 1.41, nor 5 than 5: three stages end, each of the first two with a third of
        # the rate left. 5 is better than 8, which it would not be than 6.
        np.testing.assert_allclose(rates, [0.05] * 12 + [0.05 / 3] * 4 + [0.05 / 9] * 8)
        assert drawn.info["stopped"] == "converged"

    def test_the_step_limit_is_said_to_be_one(self, monkeypatch):
        drawn, _ = self.fit(monkeypatch, [self.window(10.0)])
        assert drawn.info["stopped"] == "steps"
        assert drawn.info["steps"] == 4


class StoppedError(Exception):
    pass


def test_resumed_is_the_unbroken_fit(tmp_path):
    config = replace(CONFIG, steps=65, window=20, draws=50)
    whole = fit_svi(TARGET, config)
    path = tmp_path / "svi.pt"

    def stop(record):
        if record.step == 60:
            raise StoppedError

    with listening(stop), pytest.raises(StoppedError):
        fit_svi(TARGET, config, checkpoint=path)
    assert load_checkpoint(path)["state"]["step"] == 40
    seen = []
    with listening(seen.append):
        resumed = fit_svi(TARGET, config, checkpoint=path, resume=True)
    assert [(record.step, record.total) for record in seen] == [(60, 65)]
    assert seen[0].metrics == {"objective": resumed.history["objective"][-1]}
    assert seen[0].getMessage() == f"svi step 60: objective {resumed.history['objective'][-1]:.4f}"
    assert torch.equal(resumed.z, whole.z)
    assert resumed.history == whole.history
    with pytest.raises(InputError, match="of another fit: steps is 65 there and 66 here"):
        fit_svi(TARGET, replace(config, steps=66), checkpoint=path, resume=True)
    with pytest.raises(InputError, match="of another fit: power is None there and 2 here"):
        fit_svi(TARGET, config, checkpoint=path, resume=True, identity={"power": 2})


def test_the_start_is_a_feasible_one():
    config = replace(CONFIG, steps=3, draws=4, seed=3)
    start = feasible_start(TARGET, 1, 3)[0]
    assert torch.equal(fit_svi(TARGET, config).z, fit_svi(TARGET, config, start=start).z)
    assert not torch.equal(fit_svi(TARGET, config).z, fit_svi(TARGET, config, start=start + 1).z)


def test_an_objective_that_is_not_finite_stops_with_the_step():
    u = short_sequences()
    target = LogDensity(bilinear_model(u), u)
    start = torch.zeros(6, dtype=torch.float64)
    start[-2:] = -400.0  # a noise scale of exp(-400): the residuals' squares overflow
    with pytest.raises(ArithmeticError, match=r"step 0: the objective is"):
        fit_svi(target, CONFIG, start=start)


@pytest.mark.parametrize("bad", ["objective", "gradient"])
def test_either_may_be_the_one_that_is_not_finite(monkeypatch, bad):
    def broken(backward, parameters, batch, shards, seed):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        if bad == "gradient":
            parameters[-1].grad.view(-1)[-1] = torch.inf
        return math.inf if bad == "objective" else 1.0

    monkeypatch.setattr(module, "sharded_gradient", broken)
    with pytest.raises(ArithmeticError, match=r"step 0: the objective is (inf|1\.0) or its gradient not finite"):
        fit_svi(TARGET, CONFIG)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guide": "normal"}, "guide is 'normal'; use one of"),
        ({"particles": 0}, "particles is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0"),
        ({"draws": 2}, "draws is 2"),
        ({"window": 1}, "window is 1"),
        ({"renyi": 1.0}, "alpha must not be 1"),
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
    config = replace(CONFIG, steps=20, draws=4)
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


@pytest.mark.parametrize("guide", ["mean_field", "low_rank", "full_rank", "flow"])
def test_the_memory_that_is_required_is_that_of_the_parameters_of_the_guide(guide, monkeypatch):
    seen = []
    monkeypatch.setattr(module, "require_memory", lambda target, needed, *_: seen.append(needed))
    u = 0.3 * torch.randn(4, 6, 5, dtype=torch.float64)
    target = LogDensity(bilinear_model(u), u)
    made = init(target, replace(CONFIG, guide=guide), feasible_start(target, 1, 0)[0]).guide
    numbers = sum(parameter.numel() for parameter in made.parameters())
    assert target.dim > 25
    assert seen == [7 * 8 * numbers]  # with gradients, averages and Adam's moments, in double precision
