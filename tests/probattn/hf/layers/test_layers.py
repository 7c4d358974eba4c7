"""A layer is what the model's own code computes, for every family that is covered."""

import pytest
import torch
from layer_zoo import FAMILIES, Exact, own_blocks, own_mean, stream, tiny

from probattn.hf.layers import attention_layer


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.mark.parametrize("number", [0, 1])
class TestAgainstTheModelsOwnCode:
    def test_the_mean(self, family, number):
        model = tiny(family)
        u = stream(model, 7)
        with Exact(), torch.no_grad():
            layer = attention_layer(model, number)
            error = (layer.mean(u) - own_mean(model, number, u)).abs().max()
        assert error < 1e-10

    def test_the_blocks(self, family, number):
        model = tiny(family)
        u = stream(model, 7)
        with Exact():
            layer, own = attention_layer(model, number), own_blocks(model, number, u)
            blocks = layer.mean_jacobian(u)
        assert own.abs().max() > 0.1  # there is something to see
        assert (blocks - own).abs().max() < 1e-8

    def test_in_single_precision(self, family, number):
        model = tiny(family, dtype=torch.float32)
        u = stream(model, 7)
        layer, own = attention_layer(model, number), own_blocks(model, number, u)
        torch.testing.assert_close(layer.mean(u), own_mean(model, number, u), rtol=1e-4, atol=1e-5)
        assert (layer.mean_jacobian(u) - own).abs().max() < 1e-4 * own.abs().max()
