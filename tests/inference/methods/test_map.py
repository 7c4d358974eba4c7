import math
import signal
import threading
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule

from probattn.errors import InputError
from probattn.inference.methods.map import MapConfig, fit_map
from probattn.inference.runtime.checkpoint import load_checkpoint
from probattn.inference.runtime.files import write_atomically, write_json
from probattn.models import EmbeddingModel, LanguageModel
from probattn.models.language import LanguageConfig

CONFIG = MapConfig(steps=20, batch=4, evaluate_every=5, checkpoint_every=5, learning_rate=0.05)


class Mean(PyroModule):
    """y ~ N(mu, 1), mu ~ N(0, 1): the mode is sum(y) / (N + 1)."""

    def forward(self, y, total=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        with pyro.plate("data", total or len(y), subsample_size=len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0).expand([1]).to_event(1), obs=y)


@pytest.fixture
def mean():
    with pyro.settings.context(module_local_params=True):
        return Mean()


Y = torch.arange(12, dtype=torch.float64).unsqueeze(-1)
START = {"mu": torch.tensor(0.0, dtype=torch.float64)}


def test_the_mode_of_a_conjugate_model(mean):
    config = MapConfig(steps=400, batch=12, learning_rate=0.3, clip=100.0, patience=0)
    result = fit_map(mean, (Y,), config, initial_values=START)
    assert float(result.values["mu"]) == pytest.approx(66 / 13, abs=1e-4)
    assert result.stopped == "steps"


def test_minibatches_aim_at_the_same_mode(mean):
    config = MapConfig(steps=3000, batch=4, learning_rate=0.1, clip=100.0, patience=0)
    result = fit_map(mean, (Y,), config, initial_values=START)
    # Without the plate's scale the prior would count three times: 66 / 15 = 4.4.
    assert float(result.values["mu"]) == pytest.approx(66 / 13, abs=0.1)


def test_early_stop_says_so(mean):
    config = MapConfig(steps=100_000, batch=12, learning_rate=0.3, clip=100.0, patience=3, evaluate_every=10)
    result = fit_map(mean, (Y,), config, initial_values=START)
    assert result.stopped == "converged"
    assert result.steps < 1000


def test_recorded_objective_is_minus_the_log_joint_per_token(mean):
    start = {"mu": torch.tensor(2.0, dtype=torch.float64)}
    config = MapConfig(steps=1, batch=12)
    result = fit_map(
        mean, (Y,), config, initial_values=start, evaluate=lambda values: {"twice": 2 * float(values["mu"])}
    )
    log_joint = (
        torch.distributions.Normal(0.0, 1.0).log_prob(start["mu"])
        + torch.distributions.Normal(2.0, 1.0).log_prob(Y).sum()
    )
    assert result.history["objective"][0] == pytest.approx(-float(log_joint) / 12)
    assert result.history["twice"][0] == pytest.approx(2 * float(result.values["mu"]))


def embedding_fit(folder, config, **options):
    model = EmbeddingModel(5, 2, prior_scale=0.3)
    torch.manual_seed(0)
    u = 0.5 * torch.randn(16, 5, 2, dtype=torch.float64)
    start = {
        "query": torch.full((1, 2, 2), 0.1).double(),
        "key": torch.eye(2).double().unsqueeze(0),
        "noise_scale": torch.ones(2).double(),
    }
    return fit_map(model, (u,), config, initial_values=start, checkpoint=folder / "checkpoint.pt", **options)


def test_resuming_ends_with_the_same_bits(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    unbroken = embedding_fit(tmp_path / "a", CONFIG)

    def interrupt(step, _):
        if step == 10:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        embedding_fit(tmp_path / "b", CONFIG, report=interrupt)
    assert load_checkpoint(tmp_path / "b" / "checkpoint.pt")["state"]["step"] == 5
    resumed = embedding_fit(tmp_path / "b", CONFIG, resume=True)
    assert resumed.history == unbroken.history
    for name, value in unbroken.values.items():
        assert torch.equal(resumed.values[name], value)
    other = embedding_fit(tmp_path / "a", replace(CONFIG, seed=1))
    assert not torch.equal(other.values["query"], unbroken.values["query"])  # the comparison can fail


def test_interrupt_saves_between_two_steps(tmp_path):
    steps, before = [], signal.getsignal(signal.SIGINT)  # a run in the background inherits "ignore"

    def press(step, _):
        steps.append(step)
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        embedding_fit(tmp_path, replace(CONFIG, checkpoint_every=1000), report=press)
    assert steps == [5]
    assert load_checkpoint(tmp_path / "checkpoint.pt")["state"]["step"] == 5
    assert signal.getsignal(signal.SIGINT) is before


def test_fits_in_threads_do_not_need_signals(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(embedding_fit(tmp_path, CONFIG)))
    thread.start()
    thread.join()
    assert results[0].steps == 20


def test_global_state_is_left_alone(tmp_path):
    pyro.get_param_store()["mine"] = torch.ones(1)
    embedding_fit(tmp_path, CONFIG)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert pyro.settings.get("module_local_params") is False
    pyro.clear_param_store()


class TestCheckpoints:
    def test_of_another_fit(self, tmp_path):
        embedding_fit(tmp_path, CONFIG, identity={"dim": 2})
        with pytest.raises(InputError, match="of another fit: dim is 2 there and 3 here"):
            embedding_fit(tmp_path, CONFIG, identity={"dim": 3}, resume=True)
        with pytest.raises(InputError, match="of another fit: seed is 0 there and 1 here"):
            embedding_fit(tmp_path, replace(CONFIG, seed=1), identity={"dim": 2}, resume=True)

    def test_of_another_model(self, tmp_path):
        embedding_fit(tmp_path, CONFIG)
        model = LanguageModel(LanguageConfig(3, context=4, dim=4, layers=1, decoder_heads=2))
        tokens = torch.zeros(8, 4, dtype=torch.long)
        with pytest.raises(InputError, match=r"of another fit: model is .EmbeddingModel"):
            fit_map(
                model,
                (tokens, tokens),
                CONFIG,
                initial_values=model.initial_values(0),
                checkpoint=tmp_path / "checkpoint.pt",
                resume=True,
            )

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", "cut", "pickle"])
    def test_damaged(self, tmp_path, content):
        path = tmp_path / "checkpoint.pt"
        if content == "cut":
            embedding_fit(tmp_path, CONFIG)
            content = path.read_bytes()[:-200]
        if content == "pickle":
            torch.save({"schema": 1, "state": threading.Event}, path)
            content = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(InputError, match="cannot be read"):
            embedding_fit(tmp_path, CONFIG, resume=True)

    def test_of_another_version(self, tmp_path):
        torch.save({"schema": 2}, tmp_path / "checkpoint.pt")
        with pytest.raises(InputError, match="not a checkpoint of this version"):
            load_checkpoint(tmp_path / "checkpoint.pt")


def test_a_folded_start_under_the_spectral_penalty_is_not_hidden():
    model = LanguageModel(LanguageConfig(3, context=4, dim=4, layers=1, decoder_heads=2, stage_rank=4, kind="spectral"))
    values = model.initial_values(0)
    values["query"] = values["key"] = 30.0 * torch.eye(4, dtype=torch.float64).unsqueeze(0)
    tokens = torch.tensor([[0, 1, 2, 0]] * 4)
    values["embedding"] = torch.tensor([[0.1, 0, 0, 0], [-0.1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    values["position"] = torch.zeros(4, 4, dtype=torch.float64)
    # Trace_ELBO adds and subtracts its surrogate, which turns the infinite objective into NaN; either stops the fit.
    with pytest.raises(ArithmeticError, match=r"step 0: the objective is (inf|nan); lower the learning rate"):
        fit_map(model, (tokens, tokens), MapConfig(steps=2), initial_values=values)


class Kinked(PyroModule):
    """A log-joint whose gradient is not a number at its start."""

    def forward(self, y, total=None):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.factor("kink", -(mu - 1.0).abs().sqrt())


def test_a_gradient_that_is_not_a_number_stops_before_the_step(tmp_path):
    with pyro.settings.context(module_local_params=True):
        model = Kinked()
    start = {"mu": torch.tensor(1.0, dtype=torch.float64)}
    with pytest.raises(ArithmeticError, match=r"step 0: the objective is .* but its gradient has norm nan"):
        fit_map(model, (Y,), MapConfig(steps=1), initial_values=start, checkpoint=tmp_path / "checkpoint.pt")
    assert not (tmp_path / "checkpoint.pt").exists()


def test_the_random_state_is_left_as_it_was(mean):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fit_map(mean, (Y,), MapConfig(steps=2), initial_values=START)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("change", "message"), [({"steps": 0}, "steps is 0"), ({"clip": 0.0}, "clip is 0.0"), ({"batch": -1}, "batch")]
)
def test_bad_configurations(change, message):
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **change)


def test_no_data(mean):
    with pytest.raises(InputError, match="no sequences to fit"):
        fit_map(mean, (Y[:0],), CONFIG, initial_values=START)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("before")

    def fail(partial):
        partial.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.txt"]
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"x": math.nan})
    assert path.read_text() == "before"
