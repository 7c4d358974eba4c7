"""Shared by the tests of inference: models whose posterior is known, and the sequences that the methods are held to."""

from functools import cache

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule

from probattn import CausalAttention
from probattn.inference.methods.draws import Draws
from probattn.models import EmbeddingModel, simulate

A = torch.tensor([[0.15, 0.10], [-0.10, 0.08]], dtype=torch.float64)
NOISE = torch.tensor([0.8, 1.0], dtype=torch.float64)


class Linear(PyroModule):
    """y_n ~ N(theta_1 + theta_2 x_n, 1), theta ~ N(0, I): a normal posterior that is known exactly and correlated."""

    x = torch.linspace(0.0, 2.0, 12, dtype=torch.float64)

    def __init__(self):
        with pyro.settings.context(module_local_params=True):
            super().__init__()
        self.register_buffer("unit", torch.ones((), dtype=torch.float64))

    def forward(self, y, total=None):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
        with pyro.plate("data", total or y.shape[-2], subsample_size=y.shape[-2]):
            mean = theta[..., :1] + theta[..., 1:] * y[..., 1:]
            pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y[..., :1])

    @classmethod
    def data(cls):
        """Response and x, (12, 2)."""
        noise = torch.randn(12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return torch.stack([1.0 - 0.5 * cls.x + noise, cls.x], dim=-1)

    @classmethod
    def posterior(cls):
        """Mean, (2,), and covariance, (2, 2)."""
        y, x = cls.data().unbind(-1)
        design = torch.stack([torch.ones_like(x), x], dim=-1)
        covariance = torch.linalg.inv(design.mT @ design + torch.eye(2, dtype=torch.float64))
        return covariance @ design.mT @ y, covariance


@cache
def sequences():
    """8 sequences of 32 two-dimensional tokens from a known attention, (8, 32, 2)."""
    return simulate(CausalAttention.from_qk_matrix(A), NOISE, length=32, sequences=8, seed=1).u


@cache
def short_sequences():
    """3 sequences of 8 tokens, for what needs no large data."""
    return sequences()[:3, :8].clone()


def bilinear_model(u, **options):
    return EmbeddingModel(u.shape[1], u.shape[2], parameters="qk_matrix", **{"prior_scale": 0.5, **options})


def moments(draws: Draws):
    """Mean and covariance over all draws."""
    flat = draws.z.reshape(-1, draws.z.shape[-1])
    return flat.mean(0), torch.cov(flat.mT)
