import ast
from contextlib import contextmanager
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

import probattn
from probattn.inference.runtime.isolation import isolated
from probattn.models import simulate
from probattn.models.gpt import CharacterGPT, GPTConfig
from probattn.models.scalar import scalar_attention
from probattn.numerics.random import isolated_seed
from probattn.testing import check_distribution


@pytest.fixture
def cuda(monkeypatch):
    """The calls that reach a CUDA generator, recorded instead of made; the device in question holds one number."""
    calls = []
    state = {"generator": 7}

    @contextmanager
    def on(device):
        calls.append(("device", str(device)))
        yield

    def seed(name):
        def call(value):
            calls.append((name, value))
            state["generator"] = value

        return call

    def restore(value, device):
        calls.append(("set_rng_state", str(device)))
        state["generator"] = value

    monkeypatch.setattr(torch.cuda, "device", on)
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seed(name))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restore)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: state["generator"])
    return calls, state


class TestIsolatedSeed:
    def test_draws_are_those_of_the_seed_and_the_state_comes_back(self):
        torch.manual_seed(5)
        torch.rand(3)
        before = torch.get_rng_state()
        with isolated_seed(11):
            found = torch.rand(4)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(found, torch.rand(4, generator=torch.Generator().manual_seed(11)))

    def test_the_state_comes_back_after_an_error_as_well(self):
        before = torch.get_rng_state()
        with pytest.raises(ZeroDivisionError), isolated_seed(11):
            _ = torch.rand(4).sum() / (1 // 0)
        assert torch.equal(torch.get_rng_state(), before)

    def test_without_a_seed_the_draws_continue(self):
        torch.manual_seed(5)
        with isolated_seed(None):
            inside = torch.rand(3)
        assert torch.equal(inside, torch.rand(3))

    def test_no_generator_of_cuda_is_touched(self, cuda):
        for device in (None, torch.device("cpu")):
            with isolated_seed(11, device):
                torch.rand(1)
        with isolated_seed(None):
            torch.rand(1)
        assert cuda[0] == []
        torch.manual_seed(11)  # what the library must not call
        assert cuda[0] == [("manual_seed_all", 11)]

    def test_the_generator_of_a_device_of_cuda_is_seeded_and_put_back(self, cuda):
        calls, state = cuda
        with isolated_seed(11, torch.device("cuda", 1)):
            assert state["generator"] == 11
            assert calls == [("device", "cuda:1"), ("manual_seed", 11)]
        assert state["generator"] == 7
        assert calls[2:] == [("set_rng_state", "cuda:1")]
        with isolated_seed(None, torch.device("cuda", 1)):
            assert state["generator"] == 7
        assert ("manual_seed", None) not in calls


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda: simulate(scalar_attention(0.05), 1.0, length=4, sequences=2, seed=3).u, id="simulate"),
        pytest.param(lambda: CharacterGPT(GPTConfig(5, context=4, dim=8, layers=1, heads=2), 3).table, id="gpt"),
        pytest.param(lambda: check_distribution(dist.Normal(torch.zeros(2, 3), 2.0).to_event(2)), id="conformance"),
        pytest.param(lambda: isolated_draw(None), id="isolated"),
        pytest.param(lambda: isolated_draw(torch.device("cpu")), id="isolated on the processor"),
    ],
)
def test_the_library_leaves_every_global_generator_alone(cuda, draw):
    before = torch.get_rng_state()
    first, second = draw(), draw()
    assert torch.equal(torch.get_rng_state(), before)
    assert cuda[0] == []
    assert first is second or torch.equal(first, second)


def isolated_draw(device):
    with isolated(device, seed=3):
        return torch.rand(3)


# Commands, which own their process.
COMMANDS = {"inference/training/run.py", "inference/support.py"}


def global_seeds(source):
    return [
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("torch.manual_seed", "torch.random.fork_rng", "torch.seed", "pyro.set_rng_seed")
    ]


def test_no_other_module_seeds_the_process():
    package = Path(probattn.__file__).parent
    root = package.parent
    found = {
        str(path.relative_to(root)): calls
        for folder in (package, root / "models", root / "inference")
        for path in folder.rglob("*.py")
        if path.parent.name != "bench"  # a benchmark is a command as well
        and (calls := global_seeds(path.read_text()))
    }
    assert found.pop("probattn/numerics/random.py") == ["torch.random.fork_rng"]
    assert set(found) <= COMMANDS
    assert global_seeds("torch.manual_seed(0)\nwith torch.random.fork_rng(): pass") != []
