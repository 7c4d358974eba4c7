"""Approximations are corrected where they can be, or found out."""

import math

import pytest
import torch
from posteriors import Linear, bilinear_model, moments, short_sequences
from torch.distributions import MultivariateNormal

from probattn.errors import InputError
from probattn.inference.methods import importance
from probattn.inference.methods.importance import RELIABLE, draw_corrected
from probattn.inference.methods.log_density import LogDensity

TARGET = LogDensity(Linear(), Linear.data())
MEAN, COVARIANCE = Linear.posterior()


def approximate(scale, *, shift=0.0, correct=True, draws=2000, **options):
    guide = MultivariateNormal(MEAN + shift, scale * COVARIANCE)
    drawn = draw_corrected(
        TARGET, "test", guide, draws=draws, seed=0, correct=correct, info={"kept": 1, "corrected": 7}, **options
    )
    return drawn, guide


def test_the_posterior_itself_has_a_small_khat():
    drawn, _ = approximate(1.0)
    assert drawn.method == "test"
    assert drawn.info["kept"] == 1
    assert drawn.info["corrected"] == 1
    assert drawn.info["khat_guide"] < 0.3
    assert drawn.z.shape == (1, 2000, 2)


@pytest.mark.parametrize("scale", [0.4, 2.0], ids=["too narrow", "too wide"])
def test_a_wrong_width_is_corrected(scale):
    drawn, _ = approximate(scale)
    found = moments(drawn)
    assert drawn.info["corrected"] == 1
    # Five standard errors of means and variances from as many draws as the weights say they are worth.
    size = float(drawn.info["importance_ess"])
    assert len({tuple(row.tolist()) for row in drawn.z[0]}) < 2000  # heavy proposals are drawn more than once
    assert 500 < size < 2000
    deviations = COVARIANCE.diagonal().sqrt()
    assert bool(((found[0] - MEAN).abs() <= 5 * deviations / size**0.5).all())
    assert bool(((found[1].diagonal() / COVARIANCE.diagonal() - 1).abs() <= 5 * (2 / size) ** 0.5).all())
    plain = moments(approximate(scale, correct=False)[0])[1].diagonal() / COVARIANCE.diagonal()
    assert bool(((plain - 1).abs() > 5 * (2 / 2000) ** 0.5).all())  # uncorrected it is as wrong as it was made


def test_uncorrected_draws_are_those_of_the_guide():
    drawn, guide = approximate(1.5, correct=False, draws=100)
    assert drawn.z.shape == (1, 100, 2)
    assert set(drawn.info) == {"kept", "khat_guide", "corrected"}
    assert drawn.info["corrected"] == 0
    torch.testing.assert_close(drawn.statistics["lp"][0], TARGET.log_density(drawn.z[0]))
    torch.testing.assert_close(drawn.statistics["log_q"][0], guide.log_prob(drawn.z[0]))
    assert float((drawn.z[0] - MEAN).abs().max()) > 0.1
    torch.rand(7)  # whatever the global state is
    again = approximate(1.5, correct=False, draws=100)[0]
    assert torch.equal(drawn.z, again.z)


def test_corrected_draws_carry_the_density_of_the_mixture():
    """Half the proposals are of q, half of a Student t around their mean with their covariance."""
    drawn, guide = approximate(1.0, draws=400)
    flat = drawn.z[0]
    torch.testing.assert_close(drawn.statistics["lp"][0], TARGET.log_density(flat))
    ratio = drawn.statistics["log_q"][0] - guide.log_prob(flat)
    # The t is made of 1600 draws of q, so that their moments are nearly those of q: its density is known to a few %.
    squared = ((flat - MEAN) @ torch.linalg.inv(COVARIANCE) * (flat - MEAN)).sum(-1)
    student = math.lgamma(3.5) - math.lgamma(2.5) - math.log(5) - 3.5 * torch.log1p(squared / 5)
    normal = -math.log(2) - 0.5 * squared
    expected = torch.logaddexp(torch.zeros_like(student), student - normal) - math.log(2)
    torch.testing.assert_close(ratio, expected, rtol=0, atol=0.15)


def test_without_tails_the_guide_alone_proposes():
    drawn, guide = approximate(1.3, tails=False, draws=300)
    assert drawn.info["corrected"] == 1
    torch.testing.assert_close(drawn.statistics["log_q"][0], guide.log_prob(drawn.z[0]))
    torch.testing.assert_close(drawn.statistics["lp"][0], TARGET.log_density(drawn.z[0]))
    assert drawn.info["khat"] == drawn.info["khat_guide"]


def test_weights_are_the_ratios_but_for_their_tail():
    log_ratio = torch.zeros(4, dtype=torch.float64)
    weights, khat = importance._smoothed(log_ratio)
    assert weights.tolist() == [0.25] * 4
    assert khat == -math.inf
    log_ratio = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights, khat = importance._smoothed(log_ratio)
    expected = log_ratio.softmax(0)
    # The tail of a log-normal ratio is light: smoothing changes the largest weights, and these by little.
    assert khat < 0.5
    torch.testing.assert_close(weights[log_ratio < 1.5], expected[log_ratio < 1.5], rtol=0.02, atol=0)
    assert float(weights.sum()) == pytest.approx(1)
    log_ratio[7] = math.nan
    assert float(importance._smoothed(log_ratio)[0][7]) < 1e-200
    log_ratio[8] = -math.inf
    assert float(importance._smoothed(log_ratio)[0][8]) < 1e-200


def test_the_worth_is_that_of_independent_draws():
    drawn, _ = approximate(1.0, draws=1000)
    # Resampling 1000 of nearly equal weights: 1000 draws with replacement of 4000, of whose size 1/5 is lost.
    assert 700 < drawn.info["importance_ess"] < 830
    drawn, _ = approximate(1.0, draws=1000, tails=False)
    assert drawn.info["importance_ess"] == pytest.approx(1 / (1 / 4000 + 1 / 1000), rel=0.01)


def test_a_guide_that_misses_is_found_out():
    drawn, guide = approximate(0.02, shift=4.0, draws=200)
    assert drawn.info["khat_guide"] > RELIABLE
    assert drawn.info["khat"] > RELIABLE
    assert drawn.info["corrected"] == 0
    assert "importance_ess" not in drawn.info
    assert drawn.z.shape == (1, 200, 2)
    torch.testing.assert_close(drawn.statistics["log_q"][0], guide.log_prob(drawn.z[0]))
    torch.testing.assert_close(drawn.statistics["lp"][0], TARGET.log_density(drawn.z[0]))


@pytest.mark.parametrize(("khat", "corrected"), [(0.69, 1), (0.7, 1), (0.71, 0)])
def test_weights_are_trusted_up_to_a_khat_of_seven_tenths(monkeypatch, khat, corrected):
    monkeypatch.setattr(importance, "_smoothed", lambda ratio: (torch.ones_like(ratio) / len(ratio), khat))
    assert approximate(1.0, draws=20)[0].info["corrected"] == corrected


def test_a_guide_without_overlap_is_an_error():
    guide = MultivariateNormal(torch.tensor([0.0] * 5 + [900.0], dtype=torch.float64), 1e-6 * torch.eye(6).double())
    target = LogDensity(bilinear_model(short_sequences()), short_sequences())
    with pytest.raises(InputError, match="svi: the density is finite at no draw"):
        draw_corrected(target, "svi", guide, draws=10, seed=0, correct=True, info={})


def test_the_random_state_is_left_as_it_was():
    before = torch.get_rng_state()
    approximate(1.0, draws=20)
    assert torch.equal(torch.get_rng_state(), before)


def test_slow_draws_say_how_far_they_are_and_quick_ones_nothing(caplog, monkeypatch):
    with caplog.at_level("INFO", logger="probattn"):
        quick = approximate(1.0, draws=500)[0]
    assert caplog.messages == []
    monkeypatch.setattr(importance.time, "monotonic", iter(range(0, 1000, 3)).__next__)  # three seconds pass each time
    with caplog.at_level("INFO", logger="probattn"):
        slow = approximate(1.0, draws=500)[0]
    steps = [(record.step, record.total) for record in caplog.records]
    assert steps[0] == (100, 2000)
    assert (2000, 2000) in steps
    assert steps[-1] == (1000, 1000)  # those of the Student t
    assert torch.equal(slow.z, quick.z)
