import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_zoo import FAMILIES, Exact, own_blocks, own_mean, stream, sublayer_modules, tiny

from probattn import LatentAttention
from probattn.errors import InputError
from probattn.hf import attention_layer
from probattn.hf.layers.volume import VolumeMemory, log_volume

LENGTH = 6
FACTORS = {
    "gain": torch.tensor([0.5, 1.7, -0.3, 1.0], dtype=torch.float64),
    "inverse_temperature": torch.tensor([1.5, 0.4, 1.0, 0.8], dtype=torch.float64),
    "share": torch.tensor(0.7, dtype=torch.float64),
}


def factors_for(layer):
    return {name: value[: layer.heads] if value.dim() else value for name, value in FACTORS.items()}


def blocks_of_mean(layer, u):
    whole = torch.autograd.functional.jacobian(layer.mean, u)
    return torch.stack([whole[i, :, i] for i in range(len(u))])


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_derivatives_of_the_scaled_mean(family):
    model = tiny(family)
    layer = attention_layer(model, 1, check=False)
    scaled = layer.scaled(**factors_for(layer))
    u = stream(model, LENGTH)
    expected = blocks_of_mean(scaled, u)
    torch.testing.assert_close(scaled.mean_jacobian(u), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(scaled.context(u[:-1]).mean(u[-1]), scaled.mean(u)[-1])
    torch.testing.assert_close(
        scaled.context(u[:-1]).mean_and_jacobian(u[-1])[1], torch.eye(16).double() - expected[-1], rtol=1e-9, atol=1e-10
    )
    assert (expected - layer.mean_jacobian(u)).abs().max() > 0.01


def test_a_copy_of_the_model_with_scaled_weights_computes_the_same():
    model = tiny("llama")
    layer, u = attention_layer(model, 1, check=False), stream(model, LENGTH)
    twin = copy.deepcopy(model)
    _, attention = sublayer_modules(twin, 1)
    attention.o_proj.weight.data *= (FACTORS["share"] * FACTORS["gain"]).repeat_interleave(4)
    attention.q_proj.weight.data *= FACTORS["inverse_temperature"].repeat_interleave(4).unsqueeze(-1)
    scaled = layer.scaled(**FACTORS)
    with Exact():
        torch.testing.assert_close(scaled.mean(u), own_mean(twin, 1, u))
        torch.testing.assert_close(scaled.mean_jacobian(u), own_blocks(twin, 1, u))
        assert (scaled.mean(u) - own_mean(model, 1, u)).abs().max() > 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [None, torch.tensor([1, 4])])
def test_volume_and_gradient_agree_with_automatic_differentiation(family, rows):
    model = tiny(family)
    layer, u = attention_layer(model, 1, check=False), stream(model, LENGTH, batch=(2,))
    found, expected = [], []
    for way in (found, expected):
        leaves = [value.clone().requires_grad_() for value in factors_for(layer).values()]
        scaled = layer.detach().scaled(*leaves)
        value = log_volume(scaled, u, rows).value if way is found else scaled.logabsdet(u, rows)[1].sum(-1)
        weighted = (value * torch.tensor([1.0, 2.0]).double()).sum()
        way.extend([value.detach(), *torch.autograd.grad(weighted, leaves)])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_gradient_by_a_gain_is_the_trace_known_in_closed_form():
    model = tiny("llama")
    layer, u = attention_layer(model, 0, check=False), stream(model, LENGTH)
    gain = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(log_volume(layer.scaled(gain), u).value, gain)
    torch.testing.assert_close(found, layer.head_attribution(u).sum(0).detach())


def test_batches_of_factors_meet_batches_of_tokens():
    model = tiny("qwen3")
    layer = attention_layer(model, 1, check=False).detach()
    u = stream(model, LENGTH, batch=(3,))
    generator = torch.Generator().manual_seed(0)
    gain = 1 + 0.3 * torch.randn(2, 1, 4, generator=generator, dtype=torch.float64)
    temperature = 1 + 0.3 * torch.rand(2, 1, 4, generator=generator, dtype=torch.float64)
    share = torch.tensor([[0.5], [1.5]], dtype=torch.float64)
    together = layer.scaled(gain, temperature, share)
    value = log_volume(together, u).value
    assert value.shape == (2, 3)
    mean = together.mean(u)
    context = together.context(u[:, :3])
    for row in range(2):
        for column in range(3):
            one = layer.scaled(gain[row, 0], temperature[row, 0], share[row, 0])
            torch.testing.assert_close(mean[row, column], one.mean(u[column]))
            torch.testing.assert_close(value[row, column], one.logabsdet(u[column])[1].sum())
            torch.testing.assert_close(context.mean(u[:, 3].expand(2, 3, -1))[row, column], one.mean(u[column, :4])[-1])


def test_draws_of_a_scaled_layer_have_the_noise_that_was_put_in():
    model = tiny("llama")
    layer = attention_layer(model, 1, check=False).detach().scaled(0.2, torch.full((2, 4), 0.5).double())
    noise = LatentAttention(layer, 0.5, LENGTH)
    torch.manual_seed(0)
    e = noise.base_dist.sample()
    u = noise.transforms[0](e)
    torch.testing.assert_close(layer.residual(u), e)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 3), st.floats(0.1, 3.0))
def test_one_gain_is_linear_in_the_mean(head, size):
    model = tiny("llama")
    layer, u = attention_layer(model, 1, check=False).detach(), stream(model, LENGTH)

    def mean(value):
        gain = torch.ones(4, dtype=torch.float64)
        gain[head] = value
        return layer.scaled(gain).mean(u)

    torch.testing.assert_close(mean(size), mean(0.0) + size * (mean(1.0) - mean(0.0)))


def test_a_memory_answers_only_for_what_it_knows():
    model = tiny("llama")
    layer, u = attention_layer(model, 1, check=False), stream(model, LENGTH)
    memory = VolumeMemory()
    gain = torch.full((4,), 0.9, dtype=torch.float64, requires_grad=True)
    first = log_volume(layer.scaled(gain.detach()), u, memory=memory).value
    again = log_volume(layer.scaled(gain), u, memory=memory).value  # a value without a gradient does not serve
    again.backward()
    torch.testing.assert_close(first, again.detach())
    assert bool((gain.grad != 0).all())
    other = log_volume(layer.scaled(1.1 * gain.detach()), u, memory=memory).value
    assert abs(float(other - first)) > 1e-3
    u.mul_(1.5)
    changed = log_volume(layer.scaled(gain.detach()), u, memory=memory).value
    torch.testing.assert_close(changed, layer.scaled(gain).logabsdet(u)[1].sum().detach())


def test_single_precision():
    model = tiny("llama", dtype=torch.float32)
    layer, u = attention_layer(model, 1, check=False), stream(model, LENGTH)
    wide = layer.to(torch.float64).scaled(0.8)
    found = log_volume(layer.scaled(0.8), u).value
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), log_volume(wide, u.double()).value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"gain": torch.ones(3).double()}, "3 entries"),
        ({"gain": torch.ones(4)}, "float32"),
        ({"gain": torch.ones(2, 4).double(), "share": torch.ones(3).double()}, "must broadcast"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors, words):
    layer = attention_layer(tiny("llama"), 1, check=False)
    with pytest.raises(InputError, match=words):
        layer.scaled(**factors)
