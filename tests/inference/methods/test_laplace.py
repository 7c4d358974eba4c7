"""The Laplace approximation: exact where the posterior is normal, and honest where it cannot be made."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import Linear, bilinear_model, moments, sequences, short_sequences
from pyro.nn import PyroModule

from probattn.errors import InputError
from probattn.inference.methods.laplace import fit_laplace, maximise
from probattn.inference.methods.log_density import LogDensity
from probattn.models import EmbeddingModel


def test_exact_for_a_normal_posterior():
    target = LogDensity(Linear(), Linear.data())
    mean, covariance = Linear.posterior()
    torch.testing.assert_close(maximise(target, torch.full((2,), 3.0, dtype=torch.float64)), mean)
    draws = fit_laplace(target, draws=4000, correct=False)
    found = moments(draws)
    # Five standard errors of means and variances of 4000 independent draws.
    assert bool(((found[0] - mean).abs() <= 5 * (covariance.diagonal() / 4000).sqrt()).all())
    torch.testing.assert_close(found[1], covariance, rtol=0.12, atol=0.0)
    assert draws.notes["flat_directions"] == 0


def test_the_mode_is_one():
    target = LogDensity(bilinear_model(sequences()), sequences())
    mode = maximise(target, torch.zeros(6, dtype=torch.float64))
    value, gradient = target.value_and_gradient(mode.unsqueeze(0))
    assert float(gradient.abs().max()) < 1e-8
    around = mode + 0.02 * torch.randn(50, 6, dtype=torch.float64)
    assert bool((target.log_density(around) < value).all())


def test_directions_without_curvature_are_counted_and_do_not_touch_the_product():
    u = short_sequences()
    flat = EmbeddingModel(8, 2, rank=2, prior_scale=1e5, noise_scale=1.0)  # a prior too wide to see
    target = LogDensity(flat, u)
    start = 0.3 * torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = fit_laplace(target, draws=50, start=start)
    assert draws.notes["flat_directions"] == 4  # W_Q -> G W_Q, W_K -> G^-T W_K for any invertible 2 x 2 matrix G
    assert "khat" not in draws.notes
    assert bool(torch.isfinite(draws.z).all())


class Saddle(PyroModule):
    """A density that grows away from 0 in one direction."""

    def forward(self, y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(theta[..., :1], 1.0).to_event(1), obs=y)
        pyro.factor("away", theta[..., 1].square().squeeze())


class Growing(Saddle):
    """A density without a mode."""

    def forward(self, y):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=torch.float64), 1e3).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0 * theta[..., :1], 1.0).to_event(1), obs=y)
        pyro.factor("up", theta[..., 1].exp().squeeze())


def test_no_mode_is_an_error_with_a_remedy():
    with pyro.settings.context(module_local_params=True):
        saddle, growing = Saddle(), Growing()
    y = torch.ones(3, 1, dtype=torch.float64)
    with pytest.raises(InputError, match="saddle"):
        fit_laplace(LogDensity(saddle, y), start=torch.zeros(2, dtype=torch.float64))
    with pytest.raises(InputError, match="no mode found from this start"):
        maximise(LogDensity(growing, y), torch.full((2,), 20.0, dtype=torch.float64))
