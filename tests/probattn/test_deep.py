"""A stack of attention transforms: against the dense Jacobian of the whole map, in both masks, and as a density."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import transforms

from probattn.distributions import noise_distribution
from probattn.errors import InputError
from probattn.testing import check_distribution, check_transform
from probattn.transforms import AttentionTransform, DeepTransform
from support import attention_like, tokens


def stack(*masks, dim=2, affine=True, selection="unique"):
    """Contractive layers, with a token-wise affine map between them."""
    layers = []
    for k, mask in enumerate(masks):
        if layers and affine:
            layers.append(transforms.AffineTransform(0.3, 1.7, event_dim=2))
        attention = attention_like(k, 2, 2, dim, mask=mask).with_memory(1.5).scaled_to(0.8)
        layers.append(AttentionTransform(attention, selection=selection))
    return DeepTransform(layers)


@pytest.mark.parametrize("masks", [("strict",), ("strict", "strict"), ("inclusive", "strict", "inclusive")])
def test_a_stack_is_a_causal_transform_with_the_jacobian_of_the_whole(masks):
    check_transform(stack(*masks), tokens(0, 2, 4, 2), causal=True)


def test_its_log_determinant_is_the_sum_over_layers_at_their_own_tokens():
    deep, u = stack("strict", "strict"), tokens(1, 3, 5, 2)
    last, affine, first = reversed(deep.parts)
    middle = last.inv(u)
    below = affine.inv(middle)
    expected = last.log_abs_det_jacobian(middle, u) + 5 * 2 * torch.tensor(1.7).double().log()
    expected = expected + first.log_abs_det_jacobian(first.inv(below), below)
    e, ladj = deep.inverse_and_ladj(u)
    torch.testing.assert_close(ladj, expected)
    torch.testing.assert_close(e, first.inv(below))
    # The negative control: all layers at the last tokens.
    wrong = last.log_abs_det_jacobian(e, u) + first.log_abs_det_jacobian(e, u)
    assert (ladj - 10 * torch.tensor(1.7).double().log() - wrong).abs().max() > 1e-3


def test_single_precision():
    deep, u = stack("strict", "inclusive"), tokens(2, 6, 2)
    single = DeepTransform(
        [
            AttentionTransform(part.attention.to(torch.float32)) if hasattr(part, "attention") else part
            for part in deep.parts
        ]
    )
    torch.testing.assert_close(
        single.log_abs_det_jacobian(u.float(), u.float()).double(),
        deep.log_abs_det_jacobian(u, u),
        rtol=1e-4,
        atol=1e-5,
    )
    torch.testing.assert_close(single(u.float()).double(), deep(u), rtol=1e-4, atol=1e-4)


def test_as_a_distribution_it_draws_what_it_scores():
    deep = stack("strict", "strict")
    check_distribution(dist.TransformedDistribution(noise_distribution(0.7, 3, 2, like=tokens(3, 1)), deep))


def test_stacks_that_cannot_be_are_refused():
    layer = stack("strict").parts[0]
    with pytest.raises(InputError, match="at least one layer"):
        DeepTransform([])
    with pytest.raises(InputError, match="layer 1 has 3 features where those before it have 2"):
        DeepTransform([layer, stack("strict", dim=3).parts[0]])
    with pytest.raises(InputError, match="layer 1 is ExpTransform"):
        DeepTransform([layer, transforms.ExpTransform()])
