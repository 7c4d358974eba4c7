import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from probattn import CausalAttention
from probattn.errors import InputError
from probattn.mean_field import (
    CRITICAL,
    critical_noise,
    mean_field_flow,
    planar_critical,
    response,
    stationary_covariance,
)
from probattn.models.scalar import scalar_attention

ONE = torch.ones(1, 1, dtype=torch.float64)
PLANE = torch.eye(2, dtype=torch.float64)


def rotation(degrees, strength=1.0):
    angle = math.radians(degrees)
    matrix = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return CausalAttention.from_qk_matrix(strength * torch.tensor(matrix, dtype=torch.float64))


@given(a=st.floats(-5, 0.148))
def test_the_scalar_fixed_point_is_the_smallest_root_of_the_cubic(a):
    found = stationary_covariance(scalar_attention(a), ONE)
    v = float(found.covariance)
    assert v * (1 - a * v) ** 2 == pytest.approx(1, rel=1e-10)
    roots = np.roots([a * a, -2 * a, 1, -1]) if abs(a) > 1e-6 else np.array([1.0])
    real = roots[abs(roots.imag) < 1e-6].real
    assert v == pytest.approx(min(real[real > 0]), rel=1e-6)
    assert found.margin == pytest.approx(1 - a * v, rel=1e-9)
    assert found.drift == pytest.approx(a * v / (1 - a * v), rel=1e-6, abs=1e-12)
    assert abs(a) < 1e-9 or (found.drift > 0) == (a > 0)  # attraction drifts, repulsion does not


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_the_boundary_of_a_symmetric_attention_is_that_of_its_largest_eigenvalue(dim):
    generator = torch.Generator().manual_seed(dim)
    factor = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    matrix = factor + factor.mT + torch.eye(dim)
    largest = float(torch.linalg.eigvalsh(matrix)[-1])
    found = critical_noise(CausalAttention.from_qk_matrix(matrix), torch.eye(dim).double())
    assert found * largest == pytest.approx(CRITICAL, rel=1e-8)


@pytest.mark.parametrize("degrees", [0, 10, 45, 90, 115])
def test_the_closed_form_of_a_rotation(degrees):
    exact = planar_critical(math.radians(degrees))
    assert critical_noise(rotation(degrees), PLANE) == pytest.approx(exact, rel=1e-6)
    assert critical_noise(rotation(degrees, 3.0), PLANE) == pytest.approx(exact / 3, rel=1e-6)


@pytest.mark.parametrize("degrees", [125, 180])
def test_a_rotation_beyond_120_degrees_has_no_boundary(degrees):
    assert planar_critical(math.radians(degrees)) == math.inf
    assert critical_noise(rotation(degrees), PLANE) == math.inf


def test_the_end_of_a_rotating_branch_is_an_instability_and_not_a_fold():
    # Just below the boundary the largest eigenvalue of the response nears one; the circle is still a fixed point.
    below = stationary_covariance(rotation(60), 0.999 * planar_critical(math.radians(60)) * PLANE)
    assert 0.99 < below.slope < 1
    torch.testing.assert_close(below.covariance, below.covariance[0, 0] * PLANE, atol=1e-9, rtol=0)
    assert stationary_covariance(rotation(60), 1.001 * planar_critical(math.radians(60)) * PLANE) is None


def test_heads_add_up():
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    slopes = torch.tensor([1.5, 0.5], dtype=torch.float64).view(2, 1, 1)
    assert critical_noise(CausalAttention(slopes, one, one, 0.5 * one, scale=1.0), ONE) == pytest.approx(CRITICAL)


def test_response_is_the_gain_of_the_linear_map():
    attention, v = rotation(30, 0.4), torch.tensor([[1.0, 0.3], [0.3, 0.7]], dtype=torch.float64)
    block = PLANE - v @ attention.qk_matrix[0]
    inverse = torch.linalg.inv(block)
    torch.testing.assert_close(response(attention, v, PLANE), inverse @ inverse.mT)


class TestFlow:
    lengths = torch.logspace(0, 8, 9, dtype=torch.float64)

    def test_settles_at_the_fixed_point_when_the_mean_is_zero(self):
        _, v = mean_field_flow(scalar_attention(0.1), ONE, self.lengths, ONE, torch.zeros(1))
        assert float(v[-1]) == pytest.approx(
            float(stationary_covariance(scalar_attention(0.1), ONE).covariance), rel=1e-6
        )

    def test_the_mean_of_an_attractive_process_grows_as_a_power(self):
        drift = stationary_covariance(scalar_attention(0.05), ONE).drift
        v = stationary_covariance(scalar_attention(0.05), ONE).covariance
        mean, _ = mean_field_flow(scalar_attention(0.05), ONE, self.lengths, v, torch.full((1,), 1e-3))
        assert float(mean[-1] / mean[0]) == pytest.approx(1e8**drift, rel=1e-3)

    def test_and_carries_the_spread_over_the_boundary(self):
        lengths = torch.logspace(1, 20, 20, dtype=torch.float64)
        _, v = mean_field_flow(scalar_attention(0.1), ONE, lengths, ONE, torch.full((1,), 0.7))
        assert torch.isfinite(v[0]).all()
        assert torch.isinf(v[-1]).all()

    def test_the_mean_of_a_repulsive_process_decays(self):
        mean, v = mean_field_flow(scalar_attention(-0.3), ONE, self.lengths, ONE, torch.ones(1))
        assert abs(float(mean[-1])) < 0.1
        assert float(v[-1]) == pytest.approx(
            float(stationary_covariance(scalar_attention(-0.3), ONE).covariance), rel=1e-3
        )

    def test_beyond_the_boundary_nothing_holds_it(self):
        _, v = mean_field_flow(scalar_attention(0.2), ONE, self.lengths, ONE, torch.zeros(1))
        assert torch.isinf(v[-1]).all()


def test_bad_input():
    with pytest.raises(InputError, match=r"got batch shape \(2,\)"):
        critical_noise(scalar_attention(torch.ones(2).double()), ONE)
    with pytest.raises(InputError, match=r"S of shape \(1, 1\)"):
        stationary_covariance(rotation(10), ONE)
    with pytest.raises(InputError, match="not positive definite"):
        stationary_covariance(rotation(10), torch.zeros(2, 2))
