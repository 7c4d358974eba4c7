"""The own token in closed form against the moments of a past that holds it."""

import pytest
import torch

from probattn.moments.operators import OriginMoments, origin_moments, past_moments
from probattn.moments.own import add_own_token


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(query, key, value):
    """The closed form, and the moments, weights and means of the tokens up to and including each row's own."""
    place = torch.arange(key.shape[2])
    first = torch.zeros_like(place)
    rows = query.unsqueeze(3)
    past = OriginMoments(*(part.squeeze(3) for part in origin_moments(rows, key, value, first, place)))
    found = add_own_token(past, query, key, value)
    whole = past_moments(rows, key, value, first, place + 1)
    return found, OriginMoments(
        whole.covariance.squeeze(3), whole.mean.squeeze(3), whole.log_sum.squeeze(3), whole.mean
    )


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_it_is_one_more_token_of_the_past(offset):
    query, key, value = normal(2, 3, 8, 2, seed=1), normal(2, 3, 8, 2, seed=2) + offset, normal(2, 3, 8, 4, seed=3)
    found, whole = both(query, key, value)
    torch.testing.assert_close(found.mean, whole.offset[..., :4], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.covariance, whole.covariance, rtol=0, atol=1e-12)
    weight = ((query * key).sum(-1) - whole.log_sum).exp().unsqueeze(-1)
    torch.testing.assert_close(found.weight, weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.away, weight * (value - whole.offset[..., :4]), rtol=0, atol=1e-12)
    assert (found.weight[:, :, 0] == 1).all()
    assert (found.away[:, :, 0] == 0).all()


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_weights_near_zero_and_near_one_keep_their_digits(sign):
    """The own weight, or that of the others, is near e^-60: both have all their digits."""
    query, key, value = (torch.zeros(1, 1, 2, 1, dtype=torch.float64) for _ in range(3))
    query[:, :, 1], key[:, :, 1], value[:, :, 1] = 1.0, 60.0 * sign, 3.0
    found, _ = both(query, key, value)
    tiny = torch.tensor(60.0, dtype=torch.float64).neg().exp().item()
    away = found.away[0, 0, 1, 0].item()
    assert away == pytest.approx(3 * tiny, rel=1e-12)
    assert found.covariance[0, 0, 1, 0, 0].item() == pytest.approx(180.0 * sign * tiny, rel=1e-12)
    assert found.mean[0, 0, 1, 0].item() == pytest.approx(3.0 if sign > 0 else 3 * tiny, rel=1e-12)
    plain = 3 - (1 - tiny) * 3  # what the difference would leave of it
    assert sign < 0 or abs(plain - 3 * tiny) > 0.1 * tiny


def test_gradients():
    parts = [normal(1, 1, 4, n, seed=n).requires_grad_() for n in (2, 2, 3)]

    def function(*own):
        found, _ = both(*own)
        return (*found,)

    assert torch.autograd.gradcheck(function, parts, fast_mode=True)
