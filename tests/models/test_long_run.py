import pytest
import torch

from probattn import CausalAttention
from probattn.errors import InputError
from probattn.models.long_run import long_run
from probattn.models.scalar import scalar_attention
from probattn.solve.sequence import find_sequence


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
def test_the_run_is_the_solution_for_its_noise(mask):
    generator = torch.Generator().manual_seed(0)
    query, key = 0.3 * torch.randn(2, 2, 2, 3, generator=generator, dtype=torch.float64)
    half = 0.4 * torch.eye(3).double().expand(2, 3, 3)
    attention = CausalAttention(query, key, half, half, mask=mask)
    run = long_run(attention, 0.7, [5, 12], sequences=4, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        noise = 0.7 * torch.randn(4, 12, 3, dtype=torch.float64)
    u, _ = find_sequence(attention, noise, "smallest_step")
    assert run.unsolved == 0
    for row, n in enumerate((5, 12)):
        torch.testing.assert_close(run.mean[row], u[:, :n].mean(1), atol=1e-9, rtol=0)
        centred = u[:, :n] - u[:, :n].mean(1, keepdim=True)
        torch.testing.assert_close(run.covariance[row], centred.mT @ centred / n, atol=1e-9, rtol=0)


def test_attentions_of_a_batch_run_side_by_side():
    slopes = torch.tensor([0.05, 0.1]).double()
    both = long_run(scalar_attention(slopes), 1.0, [20], sequences=3)
    for k, slope in enumerate(slopes):
        one = long_run(scalar_attention(slope), 1.0, [20], sequences=3)
        torch.testing.assert_close(both.covariance[:, k], one.covariance)


def test_a_symmetric_run_holds_the_mean_of_its_past_at_zero():
    run = long_run(scalar_attention(0.0), 1.0, [400], sequences=50, symmetric=True)
    # Without attention a symmetric past has mean zero, and the tokens are the noise itself; without the symmetry they
    # follow their own mean.
    assert float(run.mean.abs().max()) < 5 / 400**0.5
    assert float(long_run(scalar_attention(0.0), 1.0, [400], sequences=50).mean.abs().max()) > 5 / 400**0.5


def test_a_sequence_beyond_the_limit_has_escaped():
    run = long_run(scalar_attention(0.5), 1.0, [10, 60], sequences=16, limit=2.0)
    escaped = torch.isfinite(run.escape)
    assert escaped.any()
    assert torch.equal(torch.isinf(run.covariance[1, :, 0, 0]), escaped)
    assert run.escape[escaped].min() >= 1
    assert not torch.isfinite(long_run(scalar_attention(-0.5), 1.0, [60], sequences=16, limit=2.0).escape).any()


def test_bad_input():
    for lengths in ([], [0], [5, 3], [4, 4]):
        with pytest.raises(InputError, match="must increase strictly"):
            long_run(scalar_attention(0.1), 1.0, lengths, sequences=2)
    with pytest.raises(InputError, match="sequences is 0"):
        long_run(scalar_attention(0.1), 1.0, [5], sequences=0)
