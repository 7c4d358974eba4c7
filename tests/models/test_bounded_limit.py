"""The long run of bounded memory in mean field: known limits, and the process itself."""

import pytest
import torch

from probattn.attention import CausalAttention
from probattn.errors import InputError
from probattn.models.bounded_limit import bounded_limit
from probattn.models.bounded_run import bounded_run


def line(kappa, radius):
    return CausalAttention.from_qk_matrix(torch.tensor([[kappa / radius**2]]).double(), memory_radius=radius)


def test_the_mean_square_is_that_of_the_process():
    limit = bounded_limit(line(0.9, 1.0), 1.0)
    run = bounded_run(line(0.9, 1.0), 1.0, [20_000], sequences=4)
    error = float(run.square[-1].std()) / 2
    assert abs(float(run.square[-1].mean()) - limit.square) < 5 * error + 0.02
    assert float(limit.density.sum()) * float(limit.points[1] - limit.points[0]) == pytest.approx(1, abs=1e-10)
    assert abs(1.0 - limit.square) > 0.5  # the square of the noise alone is not


def test_the_mean_returns_at_the_predicted_rate():
    run = bounded_run(line(0.9, 2.0), 1.0, [1000, 8000], sequences=12)
    fell = float((run.mean[1].square().mean() / run.mean[0].square().mean()).sqrt())
    growth = bounded_limit(line(0.9, 2.0), 1.0).growth
    assert fell == pytest.approx(8 ** (growth - 1), rel=0.05)
    assert abs(fell - 8**-0.5) > 0.2  # the rate of independent tokens is another


@pytest.mark.parametrize("kappa", [0.3, 0.9, 1.5, 2.5])
def test_for_a_large_radius_the_exponent_is_that_of_the_expansion(kappa):
    errors = []
    for radius in (8.0, 16.0):
        expected = 1 + (kappa - 1.5) / radius**2
        errors.append(abs(bounded_limit(line(kappa, radius), 1.0).growth - expected))
    assert errors[1] < 1e-3
    assert errors[1] < errors[0] / 4  # the next order is the fourth power


def test_the_mean_leaves_zero_beyond_three_halves():
    below, above = (bounded_limit(line(kappa, 16.0), 1.0).growth for kappa in (1.45, 1.55))
    assert below < 1 < above


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (CausalAttention.from_qk_matrix(torch.ones(1, 1)), "a strict mask and a radius"),
        (CausalAttention.from_qk_matrix(torch.eye(2), memory_radius=1.0), "one head on the line"),
        (CausalAttention.from_qk_matrix(torch.ones(1, 1), mask="inclusive", memory_radius=1.0), "a strict mask"),
        (CausalAttention.from_qk_matrix(torch.ones(3, 1, 1, 1), heads=1, memory_radius=1.0), "batch shape"),
        (line(4.0, 0.5), "without a fold"),
    ],
)
def test_what_has_no_such_limit_is_refused(attention, message):
    with pytest.raises(InputError, match=message):
        bounded_limit(attention, 1.0)
