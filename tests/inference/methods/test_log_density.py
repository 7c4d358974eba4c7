"""The posterior as a plain function agrees with Pyro's own potential, and takes many points at a time."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from posteriors import Linear, bilinear_model, short_sequences
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule

from probattn import CausalAttention, LatentAttention
from probattn.errors import InputError
from probattn.inference.methods.log_density import LogDensity
from probattn.models import EmbeddingModel, ScalarModel

U = short_sequences()
MODELS = {
    "qk_matrix": (bilinear_model(U), U),
    "factors with values, two heads": (EmbeddingModel(8, 2, heads=2, rank=1, value_dim=2, prior_scale=0.3), U),
    "tempered, known noise": (bilinear_model(U, noise_scale=0.9, power=0.3), U),
    "inclusive": (EmbeddingModel(8, 2, value_dim=2, mask="inclusive", prior_scale=0.3), U),
    "without the Jacobian": (bilinear_model(U, jacobian=False), U),
    "scalar": (ScalarModel(8), U[..., :1]),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_density_is_minus_pyros_potential(name):
    model, u = MODELS[name]
    target = LogDensity(model, u)
    with pyro.settings.context(module_local_params=True):
        _, potential, transforms, _ = initialize_model(model, (u,))
    z = 0.2 * torch.randn(4, target.dim, dtype=torch.float64)
    expected = []
    for point in z:
        free = {name: site.transform.inv(target.constrain(point)[name]) for name, site in target.sites.items()}
        assert set(free) >= set(transforms)
        expected.append(-potential(free))
    torch.testing.assert_close(target.log_density(z), torch.stack(expected), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_and_hessian(name):
    model, u = MODELS[name]
    target = LogDensity(model, u)
    z = 0.2 * torch.randn(2, target.dim, dtype=torch.float64)
    z[1, 0] = -1.0
    assert torch.autograd.gradcheck(target.log_density, z.clone().requires_grad_())
    value, gradient = target.value_and_gradient(z)
    torch.testing.assert_close(value, target.log_density(z))
    (expected,) = torch.autograd.grad(target.log_density(point := z.clone().requires_grad_()).sum(), point)
    torch.testing.assert_close(gradient, expected)
    exact = torch.stack([torch.autograd.functional.hessian(lambda x: target.log_density(x[None])[0], x) for x in z])
    found = target.hessian(z)
    torch.testing.assert_close(found, exact, rtol=1e-7, atol=1e-7 * float(exact.abs().max()))
    assert torch.equal(found, found.mT)
    assert not gradient.requires_grad
    assert not found.requires_grad
    assert not value.requires_grad


def test_constrain_and_unconstrain_are_inverse():
    target = LogDensity(bilinear_model(U), U)
    z = torch.randn(5, target.dim, dtype=torch.float64)
    values = target.constrain(z)
    assert values["noise_scale"].shape == (5, 2)
    assert bool((values["noise_scale"] > 0).all())
    torch.testing.assert_close(target.unconstrain(values), z)


def test_each_point_can_have_data_of_its_own():
    several = torch.stack([U, 0.5 * U, U + 0.1])
    z = 0.1 * torch.randn(3, 6, dtype=torch.float64)
    together = LogDensity(bilinear_model(U), several)
    alone = torch.cat([LogDensity(bilinear_model(U), part).log_density(z[k : k + 1]) for k, part in enumerate(several)])
    torch.testing.assert_close(together.log_density(z), alone)
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(together.log_density(z[rows], rows), alone[rows])
    torch.testing.assert_close(together.value_and_gradient(z[rows], rows)[0], alone[rows])
    torch.testing.assert_close(together.hessian(z[rows], rows), together.hessian(z)[rows])


def test_terms_are_the_likelihood_a_sequence_and_the_prior_a_site():
    model = bilinear_model(U)
    target = LogDensity(model, U)
    z = 0.1 * torch.randn(70, target.dim, dtype=torch.float64)
    terms = target.evaluate(z)
    values = target.constrain(z)
    lifted = {name: value.unsqueeze(1) for name, value in values.items()}
    torch.testing.assert_close(terms["u"], model.likelihood(lifted).log_prob(U))
    prior = dist.Normal(0.0, 0.5 / 2**0.5).log_prob(values["qk_matrix"]).sum((-3, -2, -1))
    torch.testing.assert_close(terms["qk_matrix"], prior)
    torch.testing.assert_close(terms["lp"], target.log_density(z))


def test_a_power_tempers_the_likelihood_alone():
    """Against densities that Pyro has no part in: torch's own normal and log-normal, and the attention's."""
    tempered = LogDensity(bilinear_model(U, power=0.3), U)
    z = 0.1 * torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix, scale = z[:, :4].view(5, 1, 1, 2, 2), z[:, 4:].exp().unsqueeze(1)
    attention = CausalAttention.from_qk_matrix(matrix, heads=1)
    likelihood = LatentAttention(attention, scale, 8).log_prob(U)
    terms = tempered.evaluate(z)
    torch.testing.assert_close(terms["u"], 0.3 * likelihood)
    prior = torch.distributions.Normal(0.0, 0.5 / 2**0.5).log_prob(z[:, :4]).sum(-1)
    prior = prior + torch.distributions.LogNormal(0.0, 0.5).log_prob(z[:, 4:].exp()).sum(-1)
    torch.testing.assert_close(tempered.log_density(z), 0.3 * likelihood.sum(-1) + prior + z[:, 4:].sum(-1))


def test_groups_are_as_large_as_the_memory_allows(monkeypatch):
    target = LogDensity(bilinear_model(U), U)
    # Between what the graph of a sequence must hold, its blocks and weights, and ten times as much.
    tokens = 3 * 8
    assert 8 * tokens * 4 < target.bytes_per_point < 8 * tokens * 4 * 100
    assert target.group_size == 2**27 // target.bytes_per_point
    double, many = LogDensity(bilinear_model(U), torch.cat([U, U])), LogDensity(bilinear_model(U), U[:1])
    assert double.bytes_per_point == pytest.approx(2 * target.bytes_per_point, abs=2)
    assert target.bytes_per_point == pytest.approx(3 * many.bytes_per_point, abs=3)
    several = LogDensity(bilinear_model(U), torch.stack([U, U]))
    assert several.bytes_per_point == target.bytes_per_point  # each point has one of the data sets
    z = 0.1 * torch.randn(7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, sizes = target.evaluate(z), []
    monkeypatch.setattr(LogDensity, "group_size", 3)
    terms = target.log_terms
    monkeypatch.setattr(target, "log_terms", lambda values: sizes.append(len(values["qk_matrix"])) or terms(values))
    grouped = target.evaluate(z)
    assert sizes == [3, 3, 1]
    for name, values in whole.items():
        torch.testing.assert_close(grouped[name], values)


def test_the_memory_of_a_point_grows_with_the_tokens_and_not_with_their_square():
    long, longer = (
        LogDensity(EmbeddingModel(length, 2, parameters="qk_matrix"), torch.zeros(2, length, 2, dtype=torch.float64))
        for length in (512, 1024)
    )
    assert longer.bytes_per_point / long.bytes_per_point == pytest.approx(2, rel=0.1)
    wide = LogDensity(EmbeddingModel(512, 8, parameters="qk_matrix"), torch.zeros(2, 512, 8, dtype=torch.float64))
    assert wide.bytes_per_point > 4 * long.bytes_per_point  # blocks of p x p
    giant = torch.zeros(1, 64, 2, dtype=torch.float64).expand(2**24, 64, 2)
    assert LogDensity(EmbeddingModel(64, 2, parameters="qk_matrix"), giant).group_size == 1


def test_sizes():
    target = LogDensity(bilinear_model(U), U)
    assert (target.dim, target.sequences, target.data_sets) == (6, 3, None)
    assert (target.observed, list(target.sites)) == (["u"], ["qk_matrix", "noise_scale"])
    several = LogDensity(bilinear_model(U), torch.stack([U] * 4))
    assert (several.sequences, several.data_sets) == (3, 4)
    only = LogDensity(bilinear_model(U), torch.stack([U]))
    assert (only.sequences, only.data_sets) == (3, 1)
    alone = LogDensity(bilinear_model(U), U[:1]).evaluate(torch.zeros(5, 6, dtype=torch.float64))
    assert {name: tuple(term.shape) for name, term in alone.items()} == {
        "qk_matrix": (5,),
        "noise_scale": (5,),
        "u": (5, 1),
        "lp": (5,),
    }
    single = LogDensity(bilinear_model(U).to(torch.float32), U.float())
    assert single.origin.dtype == torch.float32
    assert torch.equal(single.origin, torch.zeros(6))
    with pytest.raises(InputError, match="there are no sequences to fit"):
        LogDensity(bilinear_model(U), U[:0])


def test_far_out_it_is_not_a_number_and_no_error():
    target = LogDensity(bilinear_model(U), U)
    z = torch.zeros(2, target.dim, dtype=torch.float64)
    z[0, -1] = 800.0  # exp overflows: a noise scale of infinity
    value, _ = target.value_and_gradient(z)
    assert not bool(torch.isfinite(value[0]))
    assert bool(torch.isfinite(value[1]))
    assert torch.distributions.Distribution._validate_args  # and validation is as it was


def test_prior_draws_follow_the_prior():
    drawn = LogDensity(bilinear_model(U), U).prior_draws(4000, seed=1)
    assert drawn["qk_matrix"].shape == (4000, 1, 2, 2)
    # Four standard errors of a standard deviation from 16000 draws: 4 / sqrt(2 * 16000) = 2.2 %.
    assert float(drawn["qk_matrix"].std()) == pytest.approx(0.5 / 2**0.5, rel=0.022)
    assert float(drawn["noise_scale"].log().std()) == pytest.approx(0.5, rel=0.032)
    several = LogDensity(EmbeddingModel(8, 2, heads=3, rank=1, value_dim=2), U).prior_draws(5, seed=1)
    assert {name: tuple(value.shape) for name, value in several.items()} == {
        "query": (5, 3, 1, 2),
        "key": (5, 3, 1, 2),
        "value": (5, 3, 2, 2),
        "output": (5, 3, 2, 2),
        "noise_scale": (5, 2),
    }
    again = LogDensity(bilinear_model(U), U)
    assert torch.equal(again.prior_draws(3, seed=1)["qk_matrix"], again.prior_draws(3, seed=1)["qk_matrix"])
    assert not torch.equal(again.prior_draws(3, seed=1)["qk_matrix"], again.prior_draws(3, seed=2)["qk_matrix"])


class Coin(PyroModule):
    def forward(self, y):
        side = pyro.sample("side", dist.Bernoulli(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(side, 1.0), obs=y)


class Nothing(PyroModule):
    def forward(self, y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def test_models_that_cannot_be_used_are_refused():
    with pytest.raises(InputError, match=r"Coin keeps its parameters in Pyro's global store; construct it under"):
        LogDensity(Coin(), torch.zeros(3))
    with pyro.settings.context(module_local_params=True):
        coin, nothing = Coin(), Nothing()
    with pytest.raises(InputError, match="site side is discrete"):
        LogDensity(coin, torch.zeros(3))
    with pytest.raises(InputError, match="no latent site"):
        LogDensity(nothing, torch.zeros(3))


def test_the_known_posterior_is_the_density_up_to_a_constant():
    target = LogDensity(Linear(), Linear.data())
    mean, covariance = Linear.posterior()
    z = torch.randn(6, 2, dtype=torch.float64)
    gap = target.log_density(z) - dist.MultivariateNormal(mean, covariance).log_prob(z)
    torch.testing.assert_close(gap, gap[:1].expand(6))
