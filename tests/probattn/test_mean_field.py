import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
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
from support import attention_like

ONE = torch.ones(1, 1, dtype=torch.float64)
PLANE = torch.eye(2, dtype=torch.float64)


def rotation(degrees, strength=1.0):
    angle = math.radians(degrees)
    matrix = [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]
    return CausalAttention.from_qk_matrix(strength * torch.tensor(matrix, dtype=torch.float64))


@settings(max_examples=30)
@given(a=st.floats(-5, 0.148))
def test_the_scalar_fixed_point_is_the_smallest_root_of_the_cubic(a):
    found = stationary_covariance(scalar_attention(a), ONE)
    v = float(found.covariance)
    assert v * (1 - a * v) ** 2 == pytest.approx(1, rel=1e-10)
    roots = np.roots([a * a, -2 * a, 1, -1]) if abs(a) > 1e-4 else np.array([1 + 2 * a + 7 * a * a])  # its series
    real = roots[abs(roots.imag) < 1e-6].real
    assert v == pytest.approx(min(real[real > 0]), rel=1e-6)
    assert found.margin == pytest.approx(1 - a * v, rel=1e-9)
    assert found.slope == pytest.approx(2 * a * v / (1 - a * v), rel=1e-6, abs=1e-12)
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
    assert planar_critical(math.radians(degrees)) == planar_critical(-math.radians(degrees)) == math.inf
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

    def test_follows_the_equation_step_by_step(self):
        # Two dimensions and two heads, a mean and a covariance of their own, against small steps of Euler.
        attention, noise = TestFixedPoint.attention, TestFixedPoint.noise
        v = torch.tensor([[0.4, 0.1], [0.1, 0.6]], dtype=torch.float64)
        m = torch.tensor([0.3, -0.5], dtype=torch.float64)
        mean, covariance = mean_field_flow(attention, noise, torch.tensor([10.0, 20.0]).double(), v, m)
        torch.testing.assert_close(mean[0], m)
        torch.testing.assert_close(covariance[0], v)
        steps = 4000
        for _ in range(steps):
            inverse = torch.linalg.inv(TestFixedPoint().block(v))
            drift = inverse @ attention.ov_matrix.sum(0) @ m - m
            change = inverse @ noise @ inverse.mT - v + torch.outer(drift, drift)
            m, v = m + drift * math.log(2) / steps, v + change * math.log(2) / steps
        # 1e-3: Euler's own error, with steps of 2e-4.
        torch.testing.assert_close(mean[1], m, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(covariance[1], v, rtol=1e-3, atol=1e-3)

    def test_ends_at_the_cap(self):
        # Without attention dV/dt = 1 - V and dm/dt = 0: from V = 9 the trace falls, from 0 it rises to 1.
        still, far = scalar_attention(0.0), 9 * ONE
        lengths = torch.tensor([1.0, 1e3, 1e6], dtype=torch.float64)
        for start, cap, finite in ((far, 10.0, True), (0 * ONE, 0.5, False), (0 * ONE, 1.1, True)):
            mean, v = mean_field_flow(still, ONE, lengths, start, torch.zeros(1), cap=cap)
            assert torch.isfinite(v[0]).all()
            assert bool(torch.isfinite(v[1:]).all()) == finite
            assert bool(torch.isfinite(mean[1:]).all()) == finite
        # A million unless told otherwise.
        start = torch.zeros(1)
        lengths = torch.tensor([1.0, 1.0001], dtype=torch.float64)
        assert torch.isfinite(mean_field_flow(still, ONE, lengths, 0.9e6 * ONE, start)[1]).all()
        assert torch.isinf(mean_field_flow(still, 1.2e10 * ONE, lengths, 0.9e6 * ONE, start)[1][1]).all()

    def test_ends_where_the_block_is_singular(self):
        # 1 - a V at 0.001 of the boundary ends it; at 0.002 it is still on its way.
        lengths = torch.tensor([1.0, 1.0 + 1e-9], dtype=torch.float64)
        for a, finite in ((1 - 3e-3, True), (1 - 1.0000001e-3, False)):
            _, v = mean_field_flow(scalar_attention(a), ONE, lengths, ONE, torch.zeros(1))
            assert bool(torch.isfinite(v[1])) == finite

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


class TestFixedPoint:
    """Several heads in the plane with values of their own, away from every symmetry."""

    attention = attention_like(11, 2, 2, 2, 2, size=0.5)
    noise = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)

    def block(self, covariance):
        change = sum(self.attention.ov_matrix[h] @ covariance @ self.attention.qk_matrix[h] for h in (0, 1))
        return PLANE - change

    def test_solves_the_equation_and_says_how_it_lies(self):
        found = stationary_covariance(self.attention, self.noise)
        v = found.covariance
        inverse = torch.linalg.inv(self.block(v))
        torch.testing.assert_close(inverse @ self.noise @ inverse.mT, v, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(response(self.attention, v, self.noise), v, rtol=1e-12, atol=1e-12)
        slopes = torch.func.jacrev(lambda x: response(self.attention, x, self.noise))(v).reshape(4, 4)
        assert found.slope == pytest.approx(float(torch.linalg.eigvals(slopes).real.max()), rel=1e-10)
        motion = inverse @ self.attention.ov_matrix.sum(0) - PLANE
        assert found.drift == pytest.approx(float(torch.linalg.eigvals(motion).real.max()), rel=1e-10)
        assert found.margin == pytest.approx(float(torch.linalg.svdvals(self.block(v))[-1]), rel=1e-10)
        assert found.slope < 1
        assert (v - v.mT).abs().max() < 1e-12

    def test_single_precision_is_solved_in_double(self):
        found = stationary_covariance(self.attention.to(torch.float32), self.noise.float())
        expected = stationary_covariance(self.attention, self.noise)
        assert found.covariance.dtype == torch.float64
        torch.testing.assert_close(found.covariance, expected.covariance, rtol=1e-6, atol=1e-6)

    def test_the_critical_noise_ends_the_branch(self):
        factor = critical_noise(self.attention, self.noise, largest=4.0)
        assert stationary_covariance(self.attention, factor * (1 - 1e-6) * self.noise) is not None
        assert stationary_covariance(self.attention, factor * (1 + 1e-6) * self.noise) is None
        assert critical_noise(self.attention, self.noise, largest=0.5 * factor) == math.inf
        assert critical_noise(self.attention, self.noise, largest=2 * factor) == pytest.approx(factor, rel=1e-9)

    def test_without_attention_the_noise_is_stationary_at_any_strength(self):
        still = CausalAttention.from_qk_matrix(torch.zeros(2, 2, dtype=torch.float64))
        found = stationary_covariance(still, self.noise)
        torch.testing.assert_close(found.covariance, self.noise)
        assert (found.slope, found.drift, found.margin) == (0, 0, 1)
        assert critical_noise(still, self.noise) == math.inf
        # Where the search stops is a thousand unless told otherwise.
        weak = scalar_attention(CRITICAL / 900)
        assert critical_noise(weak, ONE) == pytest.approx(900)
        assert critical_noise(scalar_attention(CRITICAL / 1100), ONE) == math.inf

    def test_repulsion_has_no_boundary_though_the_margin_grows(self):
        found = stationary_covariance(scalar_attention(-1.0), 1e3 * ONE)
        v = float(found.covariance)
        assert v * (1 + v) ** 2 == pytest.approx(1e3)
        assert found.margin == pytest.approx(1 + v)


def test_bad_input():
    with pytest.raises(InputError, match=r"got batch shape \(2,\)"):
        critical_noise(scalar_attention(torch.ones(2).double()), ONE)
    with pytest.raises(InputError, match=r"got batch shape \(2,\)"):
        mean_field_flow(scalar_attention(torch.ones(2).double()), ONE, torch.ones(2), ONE, torch.zeros(1))
    with pytest.raises(InputError, match=r"S of shape \(1, 1\)"):
        stationary_covariance(rotation(10), ONE)
    with pytest.raises(InputError, match="not positive definite"):
        stationary_covariance(rotation(10), torch.zeros(2, 2))
    with pytest.raises(InputError, match="noise_covariance is not finite"):
        critical_noise(rotation(10), torch.full((2, 2), math.inf))
