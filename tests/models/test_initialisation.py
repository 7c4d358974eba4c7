"""Starts where nothing folds, and the warning of densities beyond a fold."""

import logging
import re
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_uniform, init_to_value
from pyro.infer.autoguide.initialization import InitMessenger

from probattn import CausalAttention, LatentAttention
from probattn import distributions as module
from probattn.errors import InputError
from probattn.models import folded_share, init_to_feasible
from support import tokens

U = 3 * tokens(0, 4, 6, 2)


def model(u):
    matrix = pyro.sample("matrix", dist.Normal(torch.zeros(2, 2, dtype=torch.float64), 1.0).to_event(2))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(2, dtype=torch.float64), 0.5).to_event(1))
    with pyro.plate("sequences", len(u)):
        pyro.sample("u", LatentAttention(CausalAttention.from_qk_matrix(matrix), scale, u.shape[-2]), obs=u)


def started(strategy):
    with InitMessenger(strategy):
        return poutine.trace(model).get_trace(U)


def folded(trace):
    return folded_share(trace.nodes["u"]["fn"].attention, U) > 0


def test_starts_do_not_fold_and_differ():
    strategy = init_to_feasible(model, U)
    traces = [started(strategy) for _ in range(12)]
    assert not any(folded(trace) for trace in traces)
    assert len({float(trace.nodes["matrix"]["value"][0, 0]) for trace in traces}) > 3
    # The control: Pyro's own start folds in most cases.
    assert sum(folded(started(init_to_uniform)) for _ in range(8)) > 4


def test_the_spread_shrinks_until_nothing_folds():
    assert not folded(started(init_to_feasible(model, U, spread=20.0)))


def test_the_seed_decides_and_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    one, same, other = (init_to_feasible(model, U, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    values = [float(strategy._starts[0]["matrix"][0, 0]) for strategy in (one, same, other)]
    assert values[0] == values[1] != values[2]


def test_samplers_and_guides_of_pyro_take_it():
    strategy = init_to_feasible(model, U)
    mcmc = MCMC(
        NUTS(model, init_strategy=strategy, max_tree_depth=2), num_samples=2, warmup_steps=1, disable_progbar=True
    )
    mcmc.run(U)
    assert mcmc.get_samples()["matrix"].shape == (2, 2, 2)
    guide = AutoNormal(model, init_loc_fn=strategy, init_scale=0.01)
    loss = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step(U)
    assert loss == loss
    pyro.clear_param_store()


def test_a_model_without_an_attention_is_refused():
    def plain(u):
        pyro.sample("u", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0), obs=u)

    with pytest.raises(InputError, match="observes no LatentAttention"):
        init_to_feasible(plain, torch.tensor(1.0))


@pytest.fixture
def watched(monkeypatch, caplog):
    monkeypatch.setattr(module, "_FOLDS", {"evaluations": 0, "warned": 0})
    caplog.set_level(logging.WARNING)
    return caplog


def density(a):
    return LatentAttention(CausalAttention.from_qk_matrix(torch.tensor([[a]])), 1.0, 3)


def test_a_density_beyond_a_fold_is_said_once(watched):
    u = torch.tensor([[-1.0], [1.0], [0.0]])
    for _ in range(10):
        density(0.5).log_prob(u)
    assert watched.messages == []
    for _ in range(10):  # a chain that lives there is noticed, whenever it came
        density(3.0).log_prob(u)
    assert len(watched.messages) == 1
    assert "det J < 0" in watched.messages[0]
    assert "init_to_feasible" in watched.messages[0]


def test_a_trace_that_lives_beyond_a_fold_is_said_late_in_a_session_too(watched):
    """The slope 3 folds at these tokens; a sampler that starts there stays there."""
    module._FOLDS["evaluations"] = 5000  # between two powers of two
    u = torch.tensor([[-1.0], [1.0], [0.0]])

    def line(u):
        a = pyro.sample("a", dist.Normal(torch.full((1, 1), 3.0), 0.01).to_event(2))
        pyro.sample("u", LatentAttention(CausalAttention.from_qk_matrix(a), 1.0, 3), obs=u)

    kernel = NUTS(line, init_strategy=init_to_value(values={"a": torch.full((1, 1), 3.0)}), max_tree_depth=4)
    MCMC(kernel, num_samples=40, warmup_steps=20, disable_progbar=True).run(u)
    assert sum("det J < 0" in words for words in watched.messages) == 1


def test_who_looks_for_folds_is_not_told(watched):
    with module.unwatched_folds():
        density(3.0).log_prob(torch.tensor([[-1.0], [1.0], [0.0]]))
    assert watched.messages == []


def test_vectorised_maps_are_left_alone(watched):
    u = torch.tensor([[-1.0], [1.0], [0.0]]).expand(4, 3, 1)
    attention = CausalAttention.from_qk_matrix(torch.tensor([[3.0]]))
    found = torch.vmap(LatentAttention(attention, 1.0, 3, validate_args=False).log_prob)(u)
    assert found.shape == (4,)


SAMPLERS = re.compile(
    r"\b(?:NUTS|HMC|Auto(?:Delta|Normal|MultivariateNormal|LowRank\w+|Diagonal\w+|Laplace\w+))\(\s*\w+[^)\n]*"
)


def careless(code):
    """Samplers and guides of Pyro on a model in a piece of code, without a start where nothing folds."""
    return [call for call in SAMPLERS.findall(code) if "potential_fn" not in call and "init_to_feasible" not in call]


def test_every_example_starts_where_nothing_folds():
    root = Path(__file__).parents[2]
    pages = [root / "README.md", *(root / "docs").rglob("*.md"), *(root / "notebooks").glob("*.ipynb")]
    found = {path.name: calls for path in pages if (calls := careless(path.read_text(encoding="utf-8")))}
    assert found == {}
    page = (root / "docs" / "how-to" / "from-plain-pyro.md").read_text(encoding="utf-8")
    assert len(SAMPLERS.findall(page)) >= 2
    assert careless(page.replace("init_to_feasible(model, u)", "init_to_uniform"))  # the control
