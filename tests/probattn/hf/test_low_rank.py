"""The estimate of log|det| from few directions of each covariance: exact where there are no more, else near."""

import numpy as np
import pytest
import torch
from layer_zoo import tiny
from transformers import Qwen3Config, Qwen3ForCausalLM

from probattn.errors import InputError
from probattn.hf.margins import margins

IDS = torch.randint(16, (1, 12), generator=torch.Generator().manual_seed(0))


def shared_keys(dtype=torch.float64):
    """Eight heads that share two keys, so that the small determinant is smaller than the core of 64 features."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=17, hidden_size=48, intermediate_size=16, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = 1.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
    return model.to(dtype)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-8), (torch.float32, 0.2)])
def test_it_is_exact_where_the_past_has_no_more_directions(dtype, atol):
    model = shared_keys(dtype)
    exact = margins(model, IDS, kinds=("logabsdet",))
    found = margins(model, IDS, kinds=("logabsdet",), rank=4)
    # In single precision the cube of the power iteration drops directions below 1e-2 of the largest one.
    first = slice(0, 5)  # a covariance of n tokens has rank n - 1 at most
    for name in ("logabsdet", "update_logabsdet", "sign", "update_sign"):
        np.testing.assert_allclose(found[name][..., first], exact[name][..., first], atol=atol)
    poor = margins(model, IDS, kinds=("logabsdet",), rank=1)
    assert np.abs(poor.logabsdet - exact.logabsdet)[..., 2:5].max() > 1e-2  # the control: one direction is too few
    error = np.abs(found.logabsdet - exact.logabsdet).mean()
    assert 0 < error < 0.5 * np.abs(poor.logabsdet - exact.logabsdet).mean()


def test_other_margins_beside_it_are_exact():
    model = shared_keys()
    exact = margins(model, IDS, attribution=True)
    found = margins(model, IDS, attribution=True, rank=2)
    for name in ("sigma_min", "spectral", "complex", "update_sigma_min", "attribution"):
        np.testing.assert_allclose(found[name], exact[name], atol=1e-10)
    assert found.attrs["rank_of_logabsdet"] == 2
    assert exact.attrs["rank_of_logabsdet"] == "exact"


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_where_it_saves_nothing_it_is_exact(family):
    model = tiny(family)
    np.testing.assert_allclose(
        margins(model, IDS, kinds=("logabsdet",), rank=5).logabsdet,
        margins(model, IDS, kinds=("logabsdet",)).logabsdet,
        atol=1e-9,
    )


def test_a_rank_of_none_is_refused():
    with pytest.raises(InputError, match="rank"):
        margins(tiny("llama"), IDS, rank=0)
