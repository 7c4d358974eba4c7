"""The map onto a ball and its derivative: against autograd, at zero, far out, and in single precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn.numerics.ball import onto_ball, onto_ball_jacobian
from support import tokens

RADIUS = torch.tensor(1.7, dtype=torch.float64)


def autograd_jacobian(u, radius):
    return torch.stack([torch.autograd.functional.jacobian(lambda x: onto_ball(x, radius), point) for point in u])


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_value_and_derivative_are_those_of_the_formula(dim):
    u = 3 * tokens(0, 8, dim)
    plain = u / (1 + u.square().sum(-1, keepdim=True) / RADIUS**2).sqrt()
    torch.testing.assert_close(onto_ball(u, RADIUS), plain, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(onto_ball_jacobian(u, RADIUS), autograd_jacobian(u, RADIUS), rtol=1e-13, atol=1e-13)


def test_radii_broadcast_and_all_derivatives_are_right():
    u, radius = tokens(1, 2, 3, 2).requires_grad_(), torch.tensor([[0.5], [2.0]]).double().requires_grad_()
    for function in (onto_ball, onto_ball_jacobian):
        assert torch.autograd.gradcheck(function, (u, radius))
        assert torch.autograd.gradgradcheck(function, (u, radius))


@given(
    st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=4),
    st.floats(1e-3, 1e3),
)
@settings(max_examples=100, deadline=None)
def test_points_of_any_size_land_in_the_ball_in_their_direction(point, radius):
    u, rho = torch.tensor(point, dtype=torch.float64), torch.tensor(radius, dtype=torch.float64)
    image, slope = onto_ball(u, rho), onto_ball_jacobian(u, rho)
    assert torch.isfinite(image).all()
    assert float(torch.linalg.vector_norm(image)) <= radius * (1 + 1e-15 * len(point))
    assert (image * u.sign() >= 0).all()
    eigenvalues = torch.linalg.eigvalsh(slope)
    assert float(eigenvalues[-1]) <= 1 + 1e-14
    assert float(eigenvalues[0]) >= -1e-15


def test_zero_and_the_largest_numbers_have_finite_images_and_the_right_gradients():
    zero = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(onto_ball(zero, RADIUS)[0], zero)
    assert torch.equal(slope, torch.tensor([1.0, 0, 0]).double())
    far = torch.tensor([1e300, 0.0], dtype=torch.float64, requires_grad=True)
    image = onto_ball(far, RADIUS)
    torch.testing.assert_close(image, torch.tensor([1.7, 0.0]).double())
    (across,) = torch.autograd.grad(image[1], far)  # s = rho / |u|
    torch.testing.assert_close(across / 1e-300, torch.tensor([0.0, 1.7]).double())
    single = onto_ball(torch.tensor([3e38, -3e38]), torch.tensor(2.0))
    torch.testing.assert_close(single, torch.tensor([2**0.5, -(2**0.5)]))


def test_the_slope_along_a_line_keeps_its_digits_far_out():
    u = torch.tensor([[1e6]], dtype=torch.float64)
    exact = (1 + 1e12) ** -1.5
    found = float(onto_ball_jacobian(u, torch.ones((), dtype=torch.float64)))
    assert abs(found / exact - 1) < 1e-14
    # Without the care that it takes: 1 - phi^2 has four digits left.
    s = (1 + 1e12) ** -0.5
    assert abs(s * (1 - (1e6 * s) ** 2) / exact - 1) > 1e-6
