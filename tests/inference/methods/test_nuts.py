"""The sampler against distributions that are known, its chain methods, its bookkeeping and its memory."""

import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import joblib
import pyro
import pyro.distributions as dist
import pytest
import torch
from listening import listening
from posteriors import NOISE, A, Linear, bilinear_model, sequences, short_sequences
from pyro.nn import PyroModule

from probattn.errors import InputError
from probattn.inference.methods import nuts
from probattn.inference.methods.adaptation import window_covariance, window_ends
from probattn.inference.methods.draws import Draws
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.nuts import NutsConfig, bytes_per_chain, finish, fit_nuts, init, update
from probattn.inference.methods.starts import curvature_guess, feasible_start
from probattn.inference.methods.svi import SviConfig, fit_svi
from probattn.inference.runtime.checkpoint import load_checkpoint

COVARIANCE = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 25.0]], dtype=torch.float64)
CONFIG = NutsConfig(warmup=200, draws=500, seed=2)
U = short_sequences()
ATTENTION = LogDensity(bilinear_model(U), U)
TARGET = LogDensity(Linear(), Linear.data())
SHORT = NutsConfig(chains=2, warmup=20, draws=8)


def normal(z, chains):
    gradient = -torch.linalg.solve(COVARIANCE, z.mT).mT
    return 0.5 * (z * gradient).sum(-1), gradient


def sample(value_and_gradient, start, config, chains_per_metric=1):
    """Draws of a density that is given as a function; the first guess of the covariance is small."""
    target = SimpleNamespace(value_and_gradient=value_and_gradient)
    dim = start.shape[-1]
    guess = 1e-3 * torch.eye(dim, dtype=start.dtype, device=start.device).expand(len(start), dim, dim)
    state = init(target, config, start, covariance=guess, chains_per_metric=chains_per_metric)
    while state.step < config.warmup + config.draws:
        update(state, target, config)
    return finish(state, target, config)


def effective(column):
    from arviz_stats.base import array_stats

    return float(array_stats.ess(column.numpy(), chain_axis=0, draw_axis=1))


def within(column, true, *, errors=4.0):
    """Whether the mean over chains and draws is within some standard errors, by the effective sample size."""
    return abs(float(column.mean()) - true) <= errors * float(column.std()) / math.sqrt(effective(column))


@pytest.fixture(scope="module")
def drawn():
    return sample(normal, torch.zeros(4, 3, dtype=torch.float64), CONFIG, chains_per_metric=4)


def test_moments_of_a_correlated_normal(drawn):
    for k in range(3):
        assert within(drawn.z[..., k], 0.0)
        for j in range(3):
            assert within(drawn.z[..., k] * drawn.z[..., j], float(COVARIANCE[k, j]))


def test_the_check_of_moments_can_fail(drawn):
    assert not within(drawn.z[..., 0] + 0.2, 0.0)
    assert not within(drawn.z[..., 0] * drawn.z[..., 1], 0.7)


def test_recorded_statistics(drawn):
    assert isinstance(drawn, Draws)
    assert (drawn.method, drawn.info) == ("nuts", {"chain_method": "vectorised", "chains": 4})
    found = drawn.statistics
    assert set(found) == {"acceptance_rate", "diverging", "energy", "lp", "n_steps", "step_size", "tree_depth"}
    assert drawn.z.shape == (4, 500, 3)
    assert all(column.shape == (4, 500) for column in found.values())
    torch.testing.assert_close(found["lp"], normal(drawn.z.reshape(-1, 3), None)[0].view(4, 500))
    assert not bool(found["diverging"].any())
    assert 0.7 < float(found["acceptance_rate"].mean()) < 0.92  # aimed at 0.8
    assert bool((found["n_steps"] < 2 ** found["tree_depth"]).all())
    assert bool((found["step_size"] == found["step_size"][:, :1]).all())
    # Energies of a D-dimensional normal: E = -lp + kinetic, whose mean is D.
    assert within(found["energy"], 3.0)


def test_chains_may_have_targets_of_their_own():
    centres = torch.tensor([[-3.0], [0.0], [5.0]], dtype=torch.float64)

    def own(z, chains):
        return -0.5 * (z - centres[chains]).square().sum(-1), centres[chains] - z

    drawn = sample(own, centres.clone(), replace(CONFIG, warmup=100, draws=300))
    for k, centre in enumerate(centres.flatten().tolist()):
        assert within(drawn.z[k : k + 1, :, 0], centre)


def test_divergences_are_seen_at_a_cliff():
    def cliff(z, chains):
        return torch.where(z[:, 0] > 0, -0.5 * z.square().sum(-1), -torch.inf), -z

    drawn = sample(cliff, torch.ones(4, 2, dtype=torch.float64), replace(CONFIG, warmup=60, draws=150))
    assert int(drawn.statistics["diverging"].sum()) > 0
    assert bool((drawn.z[..., 0] > 0).all())
    # The half-normal has mean sqrt(2 / pi), whatever the divergences at its edge; 8 standard errors, as they bias it.
    assert within(drawn.z[..., 0], math.sqrt(2 / math.pi), errors=8)


def test_not_a_number_is_a_wall_and_not_a_crash():
    def hole(z, chains):
        bad = z[:, 0] < 0
        return torch.where(bad, torch.nan, -0.5 * z.square().sum(-1)), torch.where(bad[:, None], torch.nan, -z)

    drawn = sample(hole, torch.ones(2, 1, dtype=torch.float64), NutsConfig(warmup=30, draws=30))
    assert bool(torch.isfinite(drawn.z).all())
    assert bool((drawn.z > 0).all())


class TestWarmUp:
    def test_learns_in_its_windows(self):
        """The mass matrix changes at the ends of the windows only, by the positions in them; so does the step size."""
        config = NutsConfig(warmup=60, draws=5, seed=3)
        ends = window_ends(60)
        assert len(ends) == 3
        target = SimpleNamespace(value_and_gradient=normal)
        guess = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
        state = init(target, config, torch.zeros(4, 3, dtype=torch.float64), covariance=guess, chains_per_metric=2)
        assert torch.equal(state.step_size, torch.full((4,), 0.25, dtype=torch.float64))
        positions, matrices = [], [guess]
        for k in range(60):
            adaptation = state.adaptation
            update(state, target, config)
            positions.append(state.point.z)
            if k + 1 in ends[1:]:
                begin = ends[ends.index(k + 1) - 1]
                window = torch.stack(positions[begin : k + 1])
                matrices.append(window_covariance(window, 2, matrices[-1]))
                assert state.adaptation is not adaptation
                assert state.adaptation.count == 0
                torch.testing.assert_close(state.adaptation.centre, (2 * state.step_size).log())
                assert state.adaptation.target == config.target_accept
            else:
                assert state.adaptation is adaptation
            torch.testing.assert_close(state.metric.covariance, matrices[-1])
        assert len(matrices) == 3
        torch.testing.assert_close(state.step_size, adaptation.final())
        assert state.draws == []
        for _ in range(5):
            update(state, target, config)
        assert state.adaptation is adaptation
        torch.testing.assert_close(state.step_size, adaptation.final())
        assert len(state.draws) == len(state.statistics) == 5

    def test_trees_are_short_while_the_mass_matrix_is_learnt(self):
        """On a flat density no trajectory turns back, so that each ends by its depth."""
        asked = []

        def flat(z, chains):
            asked.append(len(chains))
            return torch.zeros(len(z), dtype=z.dtype), torch.zeros_like(z)

        config = NutsConfig(warmup=20, draws=4, max_depth=6)
        target = SimpleNamespace(value_and_gradient=flat)
        eye = torch.eye(1, dtype=torch.float64)[None]
        state = init(target, config, torch.zeros(1, 1, dtype=torch.float64), covariance=eye)
        counts = []
        for _ in range(24):
            asked.clear()
            update(state, target, config)
            counts.append(len(asked))
        assert counts == [2**5 - 1] * 18 + [2**6 - 1] * 6
        shallow = replace(config, max_depth=3)
        state = init(target, shallow, torch.zeros(1, 1, dtype=torch.float64), covariance=eye)
        asked.clear()
        update(state, target, shallow)
        assert len(asked) == 7


def test_the_same_seed_gives_the_same_draws_and_leaves_the_global_state():
    before = torch.get_rng_state()
    config = NutsConfig(warmup=20, draws=10, seed=5)
    start = torch.zeros(2, 3, dtype=torch.float64)
    first, second = sample(normal, start, config), sample(normal, start, config)
    assert torch.equal(first.z, second.z)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(start, torch.zeros(2, 3))
    other = sample(normal, start, replace(config, seed=6))
    assert not torch.equal(first.z, other.z)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [14, 26], ids=["in the warm-up", "after it"])
def test_resumed_is_the_unbroken_run(tmp_path, stop_at):
    config = replace(SHORT, draws=12, checkpoint_every=5)
    whole = fit_nuts(TARGET, config)
    path, seen = tmp_path / "nuts.pt", []

    def stop(record):
        seen.append(record.step)
        if record.step == stop_at:
            raise StoppedError

    with listening(stop), pytest.raises(StoppedError):
        fit_nuts(TARGET, config, checkpoint=path)
    assert seen == list(range(1, stop_at + 1))  # 32 transitions, too few to pass over any
    assert load_checkpoint(path)["state"]["step"] == stop_at // 5 * 5
    seen.clear()
    with listening(lambda record: seen.append((record.step, record.total, record.getMessage()))):
        resumed = fit_nuts(TARGET, replace(config, memory=9.0), checkpoint=path, resume=True)
    assert seen[0] == (stop_at // 5 * 5 + 1, 32, f"nuts transition {stop_at // 5 * 5 + 1} of 32")
    assert torch.equal(resumed.z, whole.z)
    assert all(torch.equal(resumed.statistics[name], whole.statistics[name]) for name in whole.statistics)
    with pytest.raises(InputError, match="of another fit: draws is 12 there and 13 here"):
        fit_nuts(TARGET, replace(config, draws=13), checkpoint=path, resume=True)
    with pytest.raises(InputError, match="of another fit: power is None there and 2 here"):
        fit_nuts(TARGET, config, checkpoint=path, resume=True, identity={"power": 2})


def test_long_runs_log_now_and_then():
    lines = []
    start = torch.zeros(1, 1, dtype=torch.float64)
    with listening(lambda record: lines.append(record.step)):
        sample(lambda z, chains: (-z.square().sum(-1), -2 * z), start, NutsConfig(warmup=40, draws=61))
    assert lines == [*range(5, 101, 5), 101]


def test_a_fit_begins_with_the_curvature_of_its_posterior():
    """By the same verbs: feasible starts, the curvature there, one mass matrix for all chains."""
    start = feasible_start(TARGET, 2, SHORT.seed)
    state = init(TARGET, SHORT, start, covariance=curvature_guess(TARGET, start), chains_per_metric=2)
    while state.step < 28:
        update(state, TARGET, SHORT)
    expected = finish(state, TARGET, SHORT)
    assert torch.equal(fit_nuts(TARGET, SHORT).z, expected.z)
    assert torch.equal(fit_nuts(TARGET, SHORT, start=start).z, expected.z)
    assert not torch.equal(fit_nuts(TARGET, SHORT, start=0.5 * start).z, expected.z)


def test_each_data_set_has_a_chain_of_its_own():
    several = torch.stack([U, 0.5 * U, U + 0.1])
    target = LogDensity(bilinear_model(U), several)
    config = replace(SHORT, chains=3, max_depth=3)
    start = feasible_start(target, 3, 0)
    state = init(target, config, start, covariance=curvature_guess(target, start))
    while state.step < 28:
        update(state, target, config)
    assert torch.equal(fit_nuts(target, config).z, finish(state, target, config).z)
    for wrong in ({"chains": 2}, {"chains": 3, "chain_method": "sequential"}):
        with pytest.raises(InputError, match=rf"chains is {wrong['chains']} \(.*\) for 3 data sets; each data set"):
            fit_nuts(target, replace(config, **wrong))


@pytest.mark.slow
def test_the_methods_agree_and_cover_the_truth():
    """8 sequences of 32 two-dimensional tokens with known A: NUTS, Laplace and SVI within Monte Carlo error."""
    from arviz_stats.base import array_stats

    u = sequences()
    target = LogDensity(bilinear_model(u, prior_scale=1.0), u)
    runs = {
        "nuts": fit_nuts(target, NutsConfig(chains=4, warmup=150, draws=250)),
        "laplace": fit_laplace(target, LaplaceConfig(draws=2000)),
        "svi": fit_svi(target, SviConfig(draws=2000)),
    }
    truth = torch.cat([A.flatten(), NOISE.log()])
    summary = {}
    for name, draws in runs.items():
        if name != "nuts":
            assert draws.info["corrected"] == 1
        columns = draws.z.numpy()
        worth = [float(array_stats.ess(columns[..., k], chain_axis=0, draw_axis=1)) for k in range(6)]
        worth = [min(size, float(draws.info.get("importance_ess", math.inf))) for size in worth]
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


def test_every_chain_method_draws_from_the_posterior():
    """Vectorised chains and one of Pyro's against the exact mean and covariance of a linear regression."""
    mean, covariance = Linear.posterior()
    for method, chains, draws in (("vectorised", 4, 100), ("sequential", 1, 150)):
        config = NutsConfig(chains=chains, chain_method=method, warmup=60, draws=draws)
        found = fit_nuts(TARGET, config)
        assert found.info == {"chain_method": method, "chains": chains}
        assert found.z.shape == (chains, draws, 2)
        flat = found.z.reshape(-1, 2)
        torch.testing.assert_close(found.statistics["lp"].flatten(), TARGET.log_density(flat), rtol=1e-9, atol=1e-9)
        deviations = covariance.diagonal().sqrt()
        # Draws of NUTS from a normal are worth at least 40 in each case: five of their standard errors.
        assert bool(((flat.mean(0) - mean).abs() < 5 * deviations / 40**0.5).all())
        assert bool(((flat.std(0) / deviations - 1).abs() < 5 / 80**0.5).all())
    assert set(found.statistics) == {"lp", "step_size", "acceptance_rate", "diverging"}
    assert bool((found.statistics["step_size"] > 0).all())
    assert bool(((found.statistics["acceptance_rate"] > 0.5) & (found.statistics["acceptance_rate"] <= 1)).all())
    assert found.statistics["diverging"].dtype == torch.bool
    assert not bool(found.statistics["diverging"].any())


def test_options_reach_the_chains_of_pyro(monkeypatch):
    seen = {}

    def run(target, start, **options):
        seen.update(options, start=start)
        return torch.zeros(3, 9, 2), {}

    monkeypatch.setattr(nuts, "run_pyro_chains", run)
    config = NutsConfig(
        chains=3, chain_method="process", warmup=31, draws=9, target_accept=0.9, max_depth=7, seed=4, memory=5.0
    )
    fit_nuts(TARGET, config)
    expected = {"warmup": 31, "draws": 9, "target_accept": 0.9, "max_depth": 7, "seed": 4, "processes": 3}
    assert expected.items() <= seen.items()
    assert torch.equal(seen["start"], feasible_start(TARGET, 3, 4))
    assert "memory" not in seen["identity"]
    assert seen["identity"]["method"] == "nuts"
    fit_nuts(TARGET, replace(config, chain_method="sequential"))
    assert seen["processes"] == 1


class Walled(PyroModule):
    """A normal density that ends at 0."""

    def forward(self, y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
        pyro.factor("wall", torch.where(theta[..., 0] > 0, 0.0, -torch.inf))


def test_divergences_of_pyro_are_noted():
    with pyro.settings.context(module_local_params=True):
        target = LogDensity(Walled(), torch.zeros(1, 1).double())
    config = NutsConfig(chains=1, chain_method="sequential", warmup=20, draws=30, max_depth=4)
    flags = fit_nuts(target, config, start=torch.ones(1, 1).double()).statistics["diverging"]
    assert 0 < int(flags.sum()) < 30


def test_processes_give_the_chains_of_the_sequential_run():
    """Two workers through joblib; whatever backend the user has chosen takes the chains."""
    runs = []
    for method in ("sequential", "process"):
        with joblib.parallel_config(backend="loky", inner_max_num_threads=torch.get_num_threads()):
            runs.append(fit_nuts(TARGET, NutsConfig(chains=2, chain_method=method, warmup=20, draws=5)))
    assert torch.equal(runs[0].z, runs[1].z)
    assert not torch.equal(runs[0].z[0], runs[0].z[1])


def test_finished_chains_of_pyro_are_not_run_again(tmp_path, monkeypatch):
    config = NutsConfig(chains=2, chain_method="sequential", warmup=20, draws=5)
    path = tmp_path / "nuts.pt"
    whole = fit_nuts(TARGET, config, checkpoint=path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["nuts.pt.0", "nuts.pt.1"]
    (tmp_path / "nuts.pt.1").unlink()
    resumed = fit_nuts(TARGET, config, checkpoint=path, resume=True)
    assert torch.equal(resumed.z, whole.z)
    (tmp_path / "nuts.pt.0").rename(tmp_path / "nuts.pt.1")
    with pytest.raises(InputError, match="of another fit: chain is 0 there and 1 here"):
        fit_nuts(TARGET, config, checkpoint=path, resume=True)
    monkeypatch.setattr("probattn.inference.methods.pyro_chains.NUTS", None)
    with pytest.raises(InputError, match="of another fit: seed is 0 there and 1 here"):
        fit_nuts(TARGET, replace(config, seed=1), checkpoint=path, resume=True)


def test_a_damaged_chain_of_pyro_comes_from_the_file_before_or_is_run_again(tmp_path, monkeypatch, caplog):
    config = NutsConfig(chains=1, chain_method="sequential", warmup=20, draws=4)
    path, chain, before = (tmp_path / name for name in ("nuts.pt", "nuts.pt.0", "nuts.pt.previous.0"))
    whole = fit_nuts(TARGET, config, checkpoint=path)
    content = bytearray(chain.read_bytes())
    before.write_bytes(content)
    content[len(content) // 2] ^= 1
    chain.write_bytes(content)
    with monkeypatch.context() as patched:
        patched.setattr("probattn.inference.methods.pyro_chains.NUTS", None)  # nothing is run
        assert torch.equal(fit_nuts(TARGET, config, checkpoint=path, resume=True).z, whole.z)
    assert "going on from the one before, nuts.pt.previous.0" in caplog.messages[-1]
    before.write_bytes(content)
    assert torch.equal(fit_nuts(TARGET, config, checkpoint=path, resume=True).z, whole.z)
    assert caplog.messages[-1].endswith("is damaged; chain 0 is run again")
    assert torch.equal(fit_nuts(TARGET, config, checkpoint=path, resume=True).z, whole.z)


class ReachedError(Exception):
    pass


class TestMemory:
    @pytest.fixture(autouse=True)
    def _stop_after_the_guard(self, monkeypatch):
        def reached(*_):
            raise ReachedError

        monkeypatch.setattr(nuts, "feasible_start", reached)

    def test_a_thousand_tokens_are_not_too_many(self):
        """32 sequences of 1024 tokens by the options as they are."""
        u = torch.zeros(1, 1024, 2, dtype=torch.float64).expand(32, 1024, 2)
        with pytest.raises(ReachedError):
            fit_nuts(LogDensity(bilinear_model(u), u), NutsConfig())

    def test_what_is_too_large_is_refused(self):
        u = torch.zeros(1, 256, 4, dtype=torch.float64).expand(2**17, 256, 4)
        target = LogDensity(bilinear_model(u), u)
        with pytest.raises(InputError, match=r"one chain takes about \d+\.\d GiB for 20 parameters, 8 allowed; infer"):
            fit_nuts(target, NutsConfig())

    def test_the_limit_is_the_sum_over_the_chains_at_once(self):
        each = bytes_per_chain(TARGET, NutsConfig())
        enough, short = (4 * each + slack for slack in (1024, -1024))
        with pytest.raises(ReachedError):
            fit_nuts(TARGET, NutsConfig(chains=4, memory=enough / 2**30))
        for method in ("vectorised", "process"):
            with pytest.raises(InputError, match=r"chains is 4: about .* use at most 3, or --chain-method sequential"):
                fit_nuts(TARGET, NutsConfig(chains=4, chain_method=method, memory=short / 2**30))
        with pytest.raises(ReachedError):  # one chain after the other takes the memory of one
            fit_nuts(TARGET, NutsConfig(chains=4, chain_method="sequential", memory=short / 2**30))
        with pytest.raises(InputError, match=r"one chain takes about .*, or raise --memory"):
            fit_nuts(TARGET, NutsConfig(chains=1, memory=0.5 * each / 2**30))

    def test_draws_and_matrices_count(self):
        base = bytes_per_chain(ATTENTION, NutsConfig(draws=1000))
        more = bytes_per_chain(ATTENTION, NutsConfig(draws=2000))
        assert more - base == 8 * 1000 * 2 * (6 + 8)
        longer = bytes_per_chain(ATTENTION, NutsConfig(draws=1000, warmup=1500))
        assert longer - base == 8 * 1000 * 6
        assert base == ATTENTION.bytes_per_point + 8 * (6 * 36 + 2000 * 14 + 500 * 6)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_the_memory_is_that_which_a_process_takes():
    """The estimate against the largest resident size of a process that makes transitions."""
    program = """
import sys, torch
from pathlib import Path
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.nuts import NutsConfig, bytes_per_chain, init, update
from probattn.models import EmbeddingModel
torch.set_num_threads(1)

def peak():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

def chains_of(length, count):
    u = torch.randn(24, length, 6, generator=torch.Generator().manual_seed(0)).double()
    target = LogDensity(EmbeddingModel(length, 6, parameters="qk_matrix", prior_scale=0.1), u)
    eye = torch.eye(target.dim).double().expand(count, target.dim, target.dim)
    config = NutsConfig(warmup=20, draws=4, max_depth=1)
    state = init(target, config, torch.zeros(count, target.dim).double(), covariance=eye)
    update(state, target, config)
    return bytes_per_chain(target, config)

chains_of(8, 1)
before = peak()
expected = 3 * chains_of(int(sys.argv[1]), 3)
print((peak() - before) / expected)
"""
    for length in (512, 1024):
        command = [sys.executable, "-c", program, str(length)]
        ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert 0.3 < ratio < 1.3, length


def test_bad_starts_and_options():
    def nowhere(z, chains):
        return torch.where(z[:, 0] > 1, -torch.inf, 0.0).double(), z

    start = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    with pytest.raises(InputError, match=r"chain 1 starts where the log-density is -inf; start it at a feasible"):
        sample(nowhere, start, CONFIG)
    with pytest.raises(InputError, match=r"chain 0 starts where the log-density is 0\.0"):  # with a gradient of nan
        sample(lambda z, chains: (0 * z[:, 0], z * torch.nan), start, CONFIG)
    with pytest.raises(InputError, match="chains_per_metric is 3, which does not divide the 4 chains"):
        sample(normal, torch.zeros(4, 3, dtype=torch.float64), CONFIG, chains_per_metric=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 19}, "warmup is 19"),
        ({"draws": 3}, "draws is 3"),
        ({"target_accept": 1.0}, "target_accept is 1.0"),
        ({"target_accept": 0.0}, "target_accept is 0.0"),
        ({"max_depth": 0}, "max_depth is 0"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"chains": 0}, "chains is 0"),
        ({"memory": 0.0}, "memory is 0"),
        ({"chain_method": "parallel"}, "chain_method is 'parallel'; use one of"),
    ],
)
def test_options(options, message):
    with pytest.raises(InputError, match=message):
        NutsConfig(**options)
    NutsConfig(warmup=20, draws=4, max_depth=1, chains=1, checkpoint_every=1)  # the smallest that there are


def test_single_precision():
    drawn = sample(lambda z, chains: (-0.5 * z.square().sum(-1), -z), torch.zeros(2, 2), replace(CONFIG, draws=100))
    assert drawn.z.dtype == torch.float32
    assert within(drawn.z[..., 0].double(), 0.0)


@pytest.mark.cuda
def test_on_a_gpu():
    start = torch.zeros(4, 2, dtype=torch.float64, device="cuda")
    drawn = sample(lambda z, chains: (-0.5 * z.square().sum(-1), -z), start, NutsConfig(warmup=50, draws=200))
    assert drawn.z.is_cuda
    assert within(drawn.z[..., 0].cpu(), 0.0)
