"""The vectorised sampler against laws that are known, and its bookkeeping."""

import math

import pytest
import torch

from probattn.errors import InputError
from probattn.inference.methods.nuts import NutsConfig, run_nuts

COVARIANCE = torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.0], [0.0, 0.0, 25.0]], dtype=torch.float64)
CONFIG = NutsConfig(warmup=200, draws=500, seed=2)


def normal(z, chains):
    gradient = -torch.linalg.solve(COVARIANCE, z.mT).mT
    return 0.5 * (z * gradient).sum(-1), gradient


def effective(column):
    from arviz_stats.base import array_stats

    return float(array_stats.ess(column.T.numpy(), chain_axis=0, draw_axis=1))


def within(column, true, *, errors=4.0):
    """Whether the mean over draws and chains is within some standard errors, by the effective sample size."""
    return abs(float(column.mean()) - true) <= errors * float(column.std()) / math.sqrt(effective(column))


@pytest.fixture(scope="module")
def run():
    return run_nuts(normal, torch.zeros(4, 3, dtype=torch.float64), CONFIG, pool=4)


def test_moments_of_a_correlated_normal(run):
    for k in range(3):
        assert within(run.z[..., k], 0.0)
        for j in range(3):
            assert within(run.z[..., k] * run.z[..., j], float(COVARIANCE[k, j]))


def test_the_check_of_moments_can_fail(run):
    assert not within(run.z[..., 0] + 0.2, 0.0)
    assert not within(run.z[..., 0] * run.z[..., 1], 0.7)


def test_a_law_that_is_not_normal():
    """log of a gamma variable with shape 2: mean digamma(2), variance trigamma(2), skewed to the left."""

    def log_gamma(z, chains):
        return (2 * z - z.exp()).squeeze(-1), 2 - z.exp()

    z = run_nuts(log_gamma, torch.zeros(8, 1, dtype=torch.float64), CONFIG, pool=8).z[..., 0]
    assert within(z, float(torch.special.digamma(torch.tensor(2.0))))
    centred = (z - z.mean()).square()
    assert within(centred, float(torch.special.polygamma(1, torch.tensor(2.0))))
    assert not within(z, 0.0)


def test_chains_may_have_targets_of_their_own():
    centres = torch.tensor([[-3.0], [0.0], [5.0]], dtype=torch.float64)
    seen = set()

    def own(z, chains):
        seen.add(tuple(chains.tolist()))
        return -0.5 * (z - centres[chains]).square().sum(-1), centres[chains] - z

    run = run_nuts(own, centres.clone(), CONFIG)
    for k, centre in enumerate(centres.flatten().tolist()):
        assert within(run.z[:, k : k + 1, 0], centre)
    assert len(seen) > 1  # chains whose trajectory has ended are not computed


def test_what_is_recorded(run):
    stats = run.stats
    assert set(stats) == {"acceptance_rate", "diverging", "energy", "lp", "n_steps", "step_size", "tree_depth"}
    assert all(column.shape == (500, 4) for column in stats.values())
    torch.testing.assert_close(stats["lp"], normal(run.z.reshape(-1, 3), None)[0].view(500, 4))
    assert not bool(stats["diverging"].any())
    assert 0.6 < float(stats["acceptance_rate"].mean()) < 0.95  # aimed at 0.8
    assert bool((stats["n_steps"] <= 2 ** stats["tree_depth"]).all())
    # Energies: of a D-dimensional normal, E = -lp + kinetic, whose mean is D.
    assert within(stats["energy"], 3.0)


def test_divergences_are_seen_at_a_cliff():
    def cliff(z, chains):
        value = torch.where(z[:, 0] > 0, -0.5 * z.square().sum(-1), -torch.inf)
        return value, -z

    run = run_nuts(cliff, torch.ones(4, 2, dtype=torch.float64), CONFIG)
    assert int(run.stats["diverging"].sum()) > 0
    assert bool((run.z[..., 0] > 0).all())
    # The half-normal has mean sqrt(2 / pi), whatever the divergences at its edge; 8 standard errors, as they bias it.
    assert within(run.z[..., 0], math.sqrt(2 / math.pi), errors=8)


def test_not_a_number_is_a_wall_and_not_a_crash():
    def hole(z, chains):
        bad = z[:, 0] < 0
        return torch.where(bad, torch.nan, -0.5 * z.square().sum(-1)), torch.where(bad[:, None], torch.nan, -z)

    run = run_nuts(hole, torch.ones(2, 1, dtype=torch.float64), NutsConfig(warmup=50, draws=50))
    assert bool(torch.isfinite(run.z).all())
    assert bool((run.z > 0).all())


def test_the_same_seed_gives_the_same_draws_and_leaves_the_global_state():
    before = torch.get_rng_state()
    config = NutsConfig(warmup=20, draws=10, seed=5)
    start = torch.zeros(2, 3, dtype=torch.float64)
    first, second = run_nuts(normal, start, config), run_nuts(normal, start, config)
    assert torch.equal(first.z, second.z)
    assert torch.equal(torch.get_rng_state(), before)
    other = run_nuts(normal, start, NutsConfig(warmup=20, draws=10, seed=6))
    assert not torch.equal(first.z, other.z)


class StoppedError(Exception):
    pass


def test_resumed_is_the_unbroken_run(tmp_path):
    config = NutsConfig(warmup=30, draws=60, checkpoint_every=20)
    start = torch.zeros(3, 3, dtype=torch.float64)
    whole = run_nuts(normal, start, config)

    def stop(done, of):
        if done == 75:
            raise StoppedError

    path = tmp_path / "nuts.pt"
    with pytest.raises(StoppedError):
        run_nuts(normal, start, config, checkpoint=path, report=stop)
    calls = []
    resumed = run_nuts(normal, start, config, checkpoint=path, resume=True, report=lambda done, of: calls.append(done))
    assert calls[0] == 71  # it went on from draw 40
    assert torch.equal(resumed.z, whole.z)
    assert all(torch.equal(resumed.stats[name], whole.stats[name]) for name in whole.stats)
    with pytest.raises(InputError, match="of another run"):
        run_nuts(normal, start, NutsConfig(warmup=30, draws=61), checkpoint=path, resume=True)


def test_bad_starts_and_options():
    def nowhere(z, chains):
        return torch.full(z.shape[:1], -torch.inf, dtype=z.dtype), z

    with pytest.raises(InputError, match=r"chain 0 starts where the log-density is -inf"):
        run_nuts(nowhere, torch.zeros(2, 1, dtype=torch.float64), CONFIG)
    with pytest.raises(InputError, match="pool is 3, which does not divide the 4 chains"):
        run_nuts(normal, torch.zeros(4, 3, dtype=torch.float64), CONFIG, pool=3)
    for options, message in (
        ({"warmup": 5}, "warmup is 5"),
        ({"draws": 1}, "draws is 1"),
        ({"target_accept": 1.0}, "target_accept is 1.0"),
        ({"max_depth": 0}, "max_depth is 0"),
    ):
        with pytest.raises(InputError, match=message):
            NutsConfig(**options)


def test_single_precision():
    run = run_nuts(
        lambda z, chains: (-0.5 * z.square().sum(-1), -z), torch.zeros(2, 2), NutsConfig(warmup=50, draws=200)
    )
    assert run.z.dtype == torch.float32
    assert within(run.z[..., 0].double(), 0.0)


@pytest.mark.cuda
def test_on_a_gpu():
    run = run_nuts(
        lambda z, chains: (-0.5 * z.square().sum(-1), -z),
        torch.zeros(4, 2, dtype=torch.float64, device="cuda"),
        NutsConfig(warmup=50, draws=200),
    )
    assert run.z.is_cuda
    assert within(run.z[..., 0].cpu(), 0.0)
