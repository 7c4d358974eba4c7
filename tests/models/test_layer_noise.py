import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn.errors import InputError
from probattn.models.layer_noise import StreamNoise


def dense(noise):
    """Covariance of the tokens side by side, (T p, T p), from the definition."""
    length, dim = noise.event_shape
    one = torch.diag(noise.scale.square().expand(dim))
    if noise.factor is not None:
        one = one + noise.factor @ noise.factor.mT
    shared = torch.zeros(dim) if noise.offset is None else noise.offset.square()
    return torch.kron(torch.eye(length), one) + torch.kron(torch.ones(length, length), torch.diag(shared))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 99))
def test_density_is_that_of_one_large_normal_distribution(length, dim, diagonal, low_rank, offset, seed):
    generator = torch.Generator().manual_seed(seed)

    def positive(*shape):
        return 0.3 + torch.rand(*shape, generator=generator)

    torch.set_default_dtype(torch.float64)
    try:
        noise = StreamNoise(
            positive(dim if diagonal else 1).double(),
            length,
            dim,
            factor=torch.randn(dim, 2, generator=generator).double() if low_rank else None,
            offset=3 * positive(dim).double() if offset else None,
        )
        e = torch.randn(length, dim, generator=generator, dtype=torch.float64)
        whole = torch.distributions.MultivariateNormal(torch.zeros(length * dim), dense(noise))
        torch.testing.assert_close(noise.log_prob(e), whole.log_prob(e.flatten()))
    finally:
        torch.set_default_dtype(torch.float32)


def test_draws_have_the_covariance():
    torch.manual_seed(0)
    noise = StreamNoise(
        torch.tensor([0.5, 1.0]), 3, 2, factor=torch.tensor([[1.0], [-1.0]]), offset=torch.tensor([2.0, 0.1])
    )
    drawn = noise.sample((40_000,)).flatten(1)
    torch.testing.assert_close(drawn.T.cov(), dense(noise), atol=0.12, rtol=0.03)  # three standard errors


def test_batches_and_expansion():
    scale = torch.rand(4, 1, 3) + 0.5
    noise = StreamNoise(scale, 5, 3)
    wide = noise.expand((4, 6))
    assert (noise.batch_shape, wide.batch_shape, wide.sample((2,)).shape) == ((4, 1), (4, 6), (2, 4, 6, 5, 3))
    e = torch.randn(4, 6, 5, 3)
    torch.testing.assert_close(wide.log_prob(e)[2, 3], StreamNoise(scale[2, 0], 5, 3).log_prob(e[2, 3]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"scale": torch.ones(3)}, "1 or 2 long"),
        ({"scale": torch.ones(2), "factor": torch.ones(3, 1)}, r"\*batch, 2, k"),
        ({"scale": torch.ones(2), "offset": torch.ones(3)}, "2 long"),
        ({"scale": torch.ones(2), "length": 0}, "length is 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        StreamNoise(**{"length": 4, "dim": 2, **arguments})
