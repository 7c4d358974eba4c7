"""Starts that are feasible, and approximations that are corrected, or found out."""

import pytest
import torch
from posteriors import Linear, bilinear_model, moments, sequences, short_sequences
from torch.distributions import MultivariateNormal

from probattn.errors import InputError
from probattn.inference.methods.draws import approximation, curvature_guess, feasible_start
from probattn.inference.methods.log_density import LogDensity

TARGET = LogDensity(Linear(), Linear.data())
MEAN, COVARIANCE = Linear.posterior()


def approximate(scale, *, shift=0.0, correct=True):
    law = MultivariateNormal(MEAN + shift, scale * COVARIANCE)
    return approximation(TARGET, "test", law, draws=2000, seed=0, correct=correct, notes={"kept": 1})


def test_the_posterior_itself_has_a_small_khat():
    draws = approximate(1.0)
    assert draws.notes["kept"] == 1
    assert draws.notes["corrected"] == 1
    assert draws.notes["khat_guide"] < 0.3
    assert draws.z.shape == (1, 2000, 2)


@pytest.mark.parametrize("scale", [0.4, 2.0], ids=["too narrow", "too wide"])
def test_a_wrong_width_is_corrected(scale):
    draws = approximate(scale)
    found = moments(draws)
    assert draws.notes["corrected"] == 1
    # Five standard errors of means and variances from as many draws as the weights say they are worth.
    size = float(draws.notes["importance_ess"])
    deviations = COVARIANCE.diagonal().sqrt()
    assert bool(((found[0] - MEAN).abs() <= 5 * deviations / size**0.5).all())
    assert bool(((found[1].diagonal() / COVARIANCE.diagonal() - 1).abs() <= 5 * (2 / size) ** 0.5).all())
    plain = moments(approximate(scale, correct=False))[1].diagonal() / COVARIANCE.diagonal()
    assert bool(((plain - 1).abs() > 5 * (2 / 2000) ** 0.5).all())  # uncorrected it is as wrong as it was made


def test_a_law_that_misses_is_found_out():
    draws = approximate(0.02, shift=4.0)
    assert draws.notes["khat_guide"] > 0.7
    assert draws.notes["corrected"] == 0
    assert "khat" in draws.notes


def test_a_law_without_overlap_is_an_error():
    law = MultivariateNormal(torch.tensor([0.0] * 5 + [900.0], dtype=torch.float64), 1e-6 * torch.eye(6).double())
    target = LogDensity(bilinear_model(short_sequences()), short_sequences())
    with pytest.raises(InputError, match="the density is finite at no draw"):
        approximation(target, "svi", law, draws=10, seed=0, correct=True, notes={})


def test_starts_are_feasible_where_a_wide_one_is_not():
    target = LogDensity(bilinear_model(sequences(), prior_scale=5.0), sequences())
    z = feasible_start(target, 4, 0, spread=1e6)  # noise scales overflow there, so that it has to shrink
    value, gradient = target.value_and_gradient(z)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(gradient).all())
    assert len({tuple(row.tolist()) for row in z}) == 4
    with pytest.raises(InputError, match="no feasible start"):
        feasible_start(target, 1, 0, spread=1e6, tries=1)


def test_the_curvature_of_a_normal_is_its_covariance():
    guess = curvature_guess(TARGET, torch.randn(3, 2, dtype=torch.float64))
    torch.testing.assert_close(guess, COVARIANCE.expand(3, 2, 2))
