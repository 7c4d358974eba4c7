"""A layer of a transformer as a Pyro distribution: its density, its draws and their gradients."""

import warnings

import pytest
import torch
from layer_zoo import FAMILIES, Exact, tiny

from probattn import AttentionTransform, LatentAttention, log_barrier, regime, stability_margin, support_tokens
from probattn.errors import SeveralSolutionsWarning
from probattn.hf.layers import attention_layer
from probattn.next_token import NextToken

SCALE = 3.0
NORMAL = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), torch.tensor(SCALE, dtype=torch.float64))


@pytest.fixture(params=FAMILIES)
def layer(request):
    return attention_layer(tiny(request.param), 1).detach()


def whole_jacobian(layer, u):
    size = u.numel()
    return torch.autograd.functional.jacobian(layer.residual, u).reshape(size, size)


def test_the_density_is_the_dense_change_of_variables(layer):
    with Exact():
        u = stream_like(layer, 5)
        log_prob = LatentAttention(layer, SCALE, 5).log_prob(u)
        dense = torch.linalg.slogdet(whole_jacobian(layer, u))[1]
        expected = NORMAL.log_prob(layer.residual(u)).sum() + dense
        assert abs(float(log_prob - expected)) < 1e-8
        naive = NORMAL.log_prob(layer.residual(u)).sum()
        assert abs(float(log_prob - naive)) > 1e-3  # the determinant is there


def test_a_draw_solves_the_equation_and_carries_the_gradient(layer):
    with Exact(), warnings.catch_warnings():
        warnings.simplefilter("ignore", SeveralSolutionsWarning)  # random layers fold; the rule takes one of the roots
        transform = AttentionTransform(layer, selection="smallest_step")
        noise = SCALE * torch.randn(3, layer.dim, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        noise.requires_grad_()
        u = transform(noise)
        assert (layer.residual(u) - noise).abs().max() < 1e-9
        weight = torch.randn(u.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        (found,) = torch.autograd.grad(u, noise, weight)
        expected = torch.linalg.solve(whole_jacobian(layer, u.detach()).mT, weight.flatten())
        # Rotations are computed in single precision by the models' own code, and the mode that lifts them to double
        # does not reach into a backward pass.
        torch.testing.assert_close(found.flatten(), expected, rtol=1e-4, atol=1e-5)
        assert (found - weight).abs().max() > 0.05  # the identity would not do


def test_margins_and_regimes_take_a_layer(layer):
    with Exact(), torch.no_grad():
        u = stream_like(layer, 6)
        sign, value = layer.logabsdet(u)
        torch.testing.assert_close(log_barrier(layer, u), -value)
        margin = stability_margin(layer, u, "singular_value")
        torch.testing.assert_close(margin, torch.linalg.svdvals(layer.jacobian(u))[:, -1])
        assert support_tokens(layer, u, k=1).positions[0] == margin.argmin()
        assert (str(regime(layer, u)) == "folded") >= bool((sign < 0).any())


def test_the_next_token_has_the_ratio_of_the_joint_densities(layer):
    with Exact(), torch.no_grad():
        u = stream_like(layer, 4)
        joint = LatentAttention(layer, SCALE, 4).log_prob(u) - LatentAttention(layer, SCALE, 3).log_prob(u[:3])
        torch.testing.assert_close(NextToken(layer.context(u[:3]), SCALE).log_prob(u[3]), joint)


def stream_like(layer, length):
    return torch.randn(length, layer.dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
