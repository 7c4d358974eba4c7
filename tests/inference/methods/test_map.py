"""MAP: the right mode by the steps that the options say, stopped by its rule, resumed to the bit."""

import io
import math
import signal
import threading
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from listening import listening
from pyro.nn import PyroModule

from probattn.errors import InputError
from probattn.inference.methods import map as module
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import MapConfig, fit_map, init, update
from probattn.inference.methods.minibatch import minibatch
from probattn.inference.methods.starts import feasible_start
from probattn.inference.runtime.checkpoint import load_checkpoint, previous_checkpoint
from probattn.inference.runtime.checksum import seal
from probattn.models import EmbeddingModel, LanguageModel
from probattn.models.language import LanguageConfig

CONFIG = MapConfig(steps=20, batch=4, evaluate_every=5, checkpoint_every=5, learning_rate=0.05)


class Mean(PyroModule):
    """y ~ N(mu, 1), mu ~ N(0, 1): the mode is sum(y) / (N + 1)."""

    def forward(self, y, total=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", total or len(y), subsample_size=len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0).expand([1]).to_event(1), obs=y)


class Scale(PyroModule):
    """sigma ~ Gamma(2, 1), nothing observed of it: the mode of the density of sigma is 1, that of log sigma is 2."""

    def forward(self, y, total=None):
        one = torch.ones((), dtype=torch.float64)
        pyro.sample("sigma", dist.Gamma(2 * one, one))
        with pyro.plate("data", total or len(y), subsample_size=len(y)):
            pyro.sample("y", dist.Normal(0 * one, 1.0).expand([1]).to_event(1), obs=y)


def built(kind):
    with pyro.settings.context(module_local_params=True):
        return kind()


Y = torch.arange(12, dtype=torch.float64).unsqueeze(-1)
MEAN = LogDensity(built(Mean), Y)
ZERO = torch.zeros(1, dtype=torch.float64)


def by_hand(config, start, steps):
    """The mean and its objectives by plain floats: Adam (Kingma and Ba) on a clipped gradient, a cosine in the rate."""
    mu, first, second, path, objectives, clipped = start, 0.0, 0.0, [], [], 0
    for step in range(steps):
        y = minibatch((Y,), config.batch, step, config.seed)[0].flatten().tolist()
        scale = 12 / len(y)
        log_joint = -0.5 * mu**2 - 0.5 * math.log(2 * math.pi)
        log_joint += scale * sum(-0.5 * (v - mu) ** 2 - 0.5 * math.log(2 * math.pi) for v in y)
        gradient = (mu + scale * sum(mu - v for v in y)) / 12
        clipped += abs(gradient) > config.clip
        gradient *= min(1.0, config.clip / abs(gradient))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        rate = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        mu -= rate * corrected[0] / (math.sqrt(corrected[1]) + 1e-8)
        path.append(mu)
        objectives.append(-log_joint / 12)
    return path, objectives, clipped


@pytest.mark.parametrize(("batch", "shards"), [(12, 1), (5, 1), (5, 3)])
def test_steps_are_those_of_adam_on_clipped_gradients(batch, shards):
    config = MapConfig(steps=25, batch=batch, shards=shards, learning_rate=0.3, clip=1.5, evaluate_every=4, patience=0)
    path, objectives, clipped = by_hand(config, 0.5, 25)
    assert 5 < clipped < 20  # some of the gradients are cut and some are not, or the order of things would not show
    state = init(MEAN, config, torch.tensor([0.5]).double())
    for expected in path:
        update(state, MEAN, config)
        # torch clips to norm / (norm + 1e-6).
        assert float(state.values()["mu"]) == pytest.approx(expected, abs=1e-5)
    assert state.history["step"] == [4, 8, 12, 16, 20, 24, 25]
    means = [np.mean(objectives[begin : begin + 4]) for begin in range(0, 25, 4)]
    np.testing.assert_allclose(state.history["objective"], means, atol=1e-5)


def test_the_mode_of_a_conjugate_model():
    config = MapConfig(steps=400, batch=12, learning_rate=0.3, clip=100.0, patience=0)
    drawn = fit_map(MEAN, config, start=ZERO)
    assert isinstance(drawn, Draws)
    assert (drawn.method, drawn.z.shape) == ("map", (1, 1, 1))
    assert float(drawn.z) == pytest.approx(66 / 13, abs=1e-4)
    assert drawn.info == {"steps": 400, "stopped": "steps"}
    assert torch.equal(ZERO, torch.zeros(1))


def test_the_mode_is_that_of_the_constrained_space():
    config = MapConfig(steps=300, batch=12, learning_rate=0.1, patience=0)
    target = LogDensity(built(Scale), Y)
    drawn = fit_map(target, config, start=ZERO + 0.5)
    assert float(target.constrain(drawn.z[0, 0])["sigma"]) == pytest.approx(1.0, abs=1e-3)


def test_minibatches_aim_at_the_same_mode():
    config = MapConfig(steps=1000, batch=4, learning_rate=0.3, clip=100.0, patience=0)
    drawn = fit_map(MEAN, config, start=ZERO)
    # Without the plate's scale the prior would count three times: 66 / 15 = 4.4.
    assert float(drawn.z) == pytest.approx(66 / 13, abs=0.1)


class TestStopping:
    def fit(self, monkeypatch, objectives, **options):
        """A fit whose objectives are given; one evaluation a step."""
        given = iter(objectives)

        def prescribed(backward, parameters, batch, shards, seed):
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            return next(given)

        monkeypatch.setattr(module, "sharded_gradient", prescribed)
        config = MapConfig(steps=len(objectives), batch=12, evaluate_every=1, **options)
        return fit_map(MEAN, config, start=ZERO)

    def test_after_evaluations_without_improvement(self, monkeypatch):
        drawn = self.fit(monkeypatch, [5.0, 4.0, 4.0, 3.5, 3.6, 3.5, 3.5, 1.0, 1.0], patience=3, tolerance=1e-3)
        assert drawn.info == {"steps": 7, "stopped": "converged"}
        assert drawn.history["objective"] == [5.0, 4.0, 4.0, 3.5, 3.6, 3.5, 3.5]

    def test_an_improvement_is_relative(self, monkeypatch):
        small = [-100.0, -100.9, -101.9, -103.1, -104.3]
        assert self.fit(monkeypatch, small, patience=1, tolerance=0.01).info == {"steps": 2, "stopped": "converged"}
        assert self.fit(monkeypatch, small, patience=1, tolerance=0.005).info == {"steps": 5, "stopped": "steps"}

    def test_the_best_counts_even_where_it_was_no_improvement(self, monkeypatch):
        creeping = [1.0, 0.9995, 0.999, 0.9985]
        assert self.fit(monkeypatch, creeping, patience=3, tolerance=1e-3).info["stopped"] == "steps"
        drawn = self.fit(monkeypatch, [*creeping, 0.0], patience=3, tolerance=1e-3)
        assert drawn.info == {"steps": 4, "stopped": "converged"}

    def test_never_without_patience(self, monkeypatch):
        assert self.fit(monkeypatch, [1.0] * 30, patience=0).info == {"steps": 30, "stopped": "steps"}


def test_metrics_are_recorded_beside_the_objective():
    drawn = fit_map(
        MEAN, replace(CONFIG, steps=7), start=ZERO + 2, evaluate=lambda values: {"twice": 2 * float(values["mu"])}
    )
    assert drawn.history["step"] == [5, 7]
    assert drawn.history["twice"][-1] == pytest.approx(2 * float(drawn.z))
    assert set(drawn.history) == {"step", "objective", "twice"}


def test_progress_is_logged_with_its_numbers():
    records = []
    with listening(records.append):
        drawn = fit_map(MEAN, replace(CONFIG, steps=7), start=ZERO, evaluate=lambda values: {"one": 1.0})
    assert [(record.step, record.total) for record in records] == [(5, 7), (7, 7)]
    assert [record.metrics["objective"] for record in records] == drawn.history["objective"]
    assert records[0].metrics["one"] == 1.0
    assert records[0].getMessage() == f"map step 5: objective {drawn.history['objective'][0]:.6f}"
    assert records[0].name == "probattn.inference.methods.map"


TARGET = LogDensity(
    EmbeddingModel(5, 2, prior_scale=0.3),
    0.5 * torch.randn(16, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
)


def test_the_objective_is_minus_the_log_joint_per_token():
    start = 0.2 * torch.randn(TARGET.dim, dtype=torch.float64)
    drawn = fit_map(TARGET, MapConfig(steps=1, batch=16), start=start)
    terms = TARGET.log_terms({name: value[None] for name, value in TARGET.constrain(start).items()})
    log_joint = sum(float(term.sum()) for term in terms.values())  # without the volume of unconstrained space
    assert drawn.history["objective"] == [pytest.approx(-log_joint / 80)]


def test_the_start_is_a_feasible_one():
    start = feasible_start(TARGET, 1, 3)[0]
    config = replace(CONFIG, seed=3)
    assert torch.equal(fit_map(TARGET, config).z, fit_map(TARGET, config, start=start).z)


class StoppedError(Exception):
    pass


def stop_at(step, error=StoppedError):
    def receive(record):
        if record.step == step:
            raise error

    return listening(receive)


def embedding_fit(folder, config=CONFIG, **options):
    return fit_map(TARGET, config, checkpoint=folder / "checkpoint.pt", **options)


def test_resumed_is_the_unbroken_fit(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    unbroken = embedding_fit(tmp_path / "a")
    with stop_at(10), pytest.raises(StoppedError):
        embedding_fit(tmp_path / "b")
    assert load_checkpoint(tmp_path / "b" / "checkpoint.pt")["state"]["step"] == 5
    resumed = embedding_fit(tmp_path / "b", resume=True)
    assert resumed.history == unbroken.history
    assert resumed.info == unbroken.info
    assert torch.equal(resumed.z, unbroken.z)
    other = embedding_fit(tmp_path / "a", replace(CONFIG, seed=1))
    assert not torch.equal(other.z, unbroken.z)  # the comparison can fail


def test_patience_is_resumed_too(tmp_path):
    """A run that stops early does so at the same step when it was broken off between two evaluations."""
    config = replace(CONFIG, steps=100, patience=2, tolerance=0.05, checkpoint_every=1)
    unbroken = fit_map(TARGET, config)
    assert unbroken.info["stopped"] == "converged"
    last = unbroken.info["steps"]
    with stop_at(last - 5), pytest.raises(StoppedError):
        embedding_fit(tmp_path, config)
    resumed = embedding_fit(tmp_path, config, resume=True)
    assert (resumed.info, resumed.history) == (unbroken.info, unbroken.history)
    finished = embedding_fit(tmp_path, config, resume=True)
    assert torch.equal(finished.z, unbroken.z)


def test_interrupt_saves_between_two_steps(tmp_path):
    steps, before = [], signal.getsignal(signal.SIGINT)  # a run in the background inherits "ignore"

    def press(record):
        steps.append(record.step)
        signal.raise_signal(signal.SIGINT)

    with listening(press), pytest.raises(KeyboardInterrupt):
        embedding_fit(tmp_path, replace(CONFIG, checkpoint_every=1000))
    assert steps == [5]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["state"]["step"] == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_fits_in_threads_do_not_need_signals(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(embedding_fit(tmp_path)))
    thread.start()
    thread.join()
    assert results[0].info["steps"] == 20


def test_global_state_is_left_alone(tmp_path):
    pyro.get_param_store()["mine"] = torch.ones(1)
    before = torch.get_rng_state()
    embedding_fit(tmp_path)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.settings.get("module_local_params") is False
    assert torch.equal(torch.get_rng_state(), before)
    pyro.clear_param_store()


class TestCheckpoints:
    def test_of_another_fit(self, tmp_path):
        embedding_fit(tmp_path, identity={"dim": 2})
        with pytest.raises(InputError, match="of another fit: dim is 2 there and 3 here"):
            embedding_fit(tmp_path, identity={"dim": 3}, resume=True)
        with pytest.raises(InputError, match="of another fit: seed is 0 there and 1 here"):
            embedding_fit(tmp_path, replace(CONFIG, seed=1), identity={"dim": 2}, resume=True)

    def test_of_another_model_or_other_data(self, tmp_path):
        embedding_fit(tmp_path)
        model = LanguageModel(LanguageConfig(3, context=4, dim=4, layers=1, decoder_heads=2))
        tokens = torch.zeros(8, 4, dtype=torch.long)
        target = LogDensity(model, tokens, tokens)
        start = target.unconstrain(model.initial_values(0))
        with pytest.raises(InputError, match=r"of another fit: model is .EmbeddingModel"):
            fit_map(target, CONFIG, start=start, checkpoint=tmp_path / "checkpoint.pt", resume=True)
        moved = LogDensity(TARGET.model, TARGET.data[0] + 1e-12)
        with pytest.raises(InputError, match=r"of another fit: data is"):
            fit_map(moved, CONFIG, checkpoint=tmp_path / "checkpoint.pt", resume=True)

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", "cut", "pickle"])
    def test_damaged(self, tmp_path, content):
        path = tmp_path / "checkpoint.pt"
        if content == "cut":
            embedding_fit(tmp_path)
            content = path.read_bytes()[:-200]
            previous_checkpoint(path).unlink()  # by which the fit would go on
        if content == "pickle":
            written = io.BytesIO()
            torch.save({"schema": 3, "state": threading.Event}, written)
            content = seal(written.getvalue())
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            embedding_fit(tmp_path, resume=True)


def test_a_language_model_at_its_initial_values():
    """What the model of a text is fitted by: inner parameters, two tensors of data, tokens counted on the last."""
    model = LanguageModel(LanguageConfig(3, context=4, dim=4, layers=1, decoder_heads=2))
    tokens = torch.tensor([[0, 1, 2, 0]] * 4)
    target = LogDensity(model, tokens, tokens)
    start = target.unconstrain(model.initial_values(0))
    drawn = fit_map(target, MapConfig(steps=5, batch=4, evaluate_every=1), start=start)
    assert drawn.history["objective"][-1] < drawn.history["objective"][0]
    assert set(target.constrain(drawn.z[0, 0])) == set(model.initial_values(0))


def test_a_folded_start_under_the_spectral_penalty_is_not_hidden():
    model = LanguageModel(LanguageConfig(3, context=4, dim=4, layers=1, decoder_heads=2, stage_rank=4, kind="spectral"))
    values = model.initial_values(0)
    values["query"] = values["key"] = 30.0 * torch.eye(4, dtype=torch.float64).unsqueeze(0)
    tokens = torch.tensor([[0, 1, 2, 0]] * 4)
    values["embedding"] = torch.tensor([[0.1, 0, 0, 0], [-0.1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    values["position"] = torch.zeros(4, 4, dtype=torch.float64)
    target = LogDensity(model, tokens, tokens)
    # Trace_ELBO adds and subtracts its surrogate, which turns the infinite objective into NaN; either stops the fit.
    with pytest.raises(ArithmeticError, match=r"step 0: the objective is (inf|nan); lower the learning rate"):
        fit_map(target, MapConfig(steps=2), start=target.unconstrain(values))


class Kinked(PyroModule):
    """A log-joint whose gradient is not a number at 1."""

    def forward(self, y, total=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.factor("kink", -(mu - 1.0).abs().sqrt())


def test_a_gradient_that_is_not_a_number_stops_before_the_step(tmp_path):
    target = LogDensity(built(Kinked), Y)
    with pytest.raises(ArithmeticError, match=r"step 0: the objective is .* but its gradient has norm nan"):
        fit_map(target, MapConfig(steps=1), start=ZERO + 1, checkpoint=tmp_path / "checkpoint.pt")
    assert not (tmp_path / "checkpoint.pt").exists()


@pytest.mark.parametrize(
    ("change", "message"), [({"steps": 0}, "steps is 0"), ({"clip": 0.0}, "clip is 0"), ({"batch": -1}, "batch")]
)
def test_bad_configurations(change, message):
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **change)
