import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from probattn.errors import InputError
from probattn.folds.mass import next_token_density, scalar_mass
from probattn.models.scalar import scalar_attention
from probattn.solve.context import Context


def past(a, *points):
    return Context.of(scalar_attention(a), torch.tensor(points, dtype=torch.float64).unsqueeze(-1))


@given(seed=st.integers(0, 10**6), a=st.floats(-4, 4), noise=st.floats(0.2, 3.0), length=st.integers(1, 8))
def test_quadrature_equals_the_mean_number_of_roots(seed, a, noise, length):
    points = np.random.default_rng(seed).normal(size=length)
    mass = scalar_mass(past(a, *points), noise)
    assert mass.signed == pytest.approx(1, abs=1e-8)
    assert mass.absolute == pytest.approx(mass.roots, abs=1e-8)
    assert mass.absolute >= 1 - 1e-9
    assert (mass.absolute > 1 + 1e-12) <= (len(mass.turning_points) > 0)


@pytest.mark.parametrize(("far", "roots"), [(50.0, 3), (5e3, 3), (5e5, 3), (5e7, 3), (0.5, 1)])
def test_tokens_far_apart_cost_no_more_panels(far, roots, monkeypatch):
    """Panels of the width of the noise would be 10^8 with 24 candidates each, and miss the steep middle branch."""
    asked = []

    def counted(past, u, *arguments, **options):
        asked.append(len(u))
        return next_token_density(past, u, *arguments, **options)

    monkeypatch.setattr("probattn.folds.mass.next_token_density", counted)
    mass = scalar_mass(past(1 / far, -far, 0.3 * far, far), 1.0)
    assert mass.absolute == pytest.approx(mass.roots, abs=1e-7)
    assert mass.signed == pytest.approx(1, abs=1e-7)
    assert round(mass.roots) == roots
    assert sum(asked) < 200_000


@pytest.mark.parametrize("a", [-3.0, 0.5, 1.0, 1.2, 3.0])
def test_against_scipy_on_the_tanh_example(a):
    mass = scalar_mass(past(a, -1.0, 1.0), 0.5)

    def integrand(u):
        jacobian = 1 - a / np.cosh(a * u) ** 2
        return np.exp(-0.5 * ((u - np.tanh(a * u)) / 0.5) ** 2) / (0.5 * np.sqrt(2 * np.pi)) * abs(jacobian)

    points = [0.0, *mass.turning_points]
    expected = integrate.quad(integrand, -20, 20, points=points, limit=500, epsabs=1e-12)[0]
    assert mass.absolute == pytest.approx(expected, abs=1e-9)
    assert (len(mass.turning_points) == 2) == (a > 1)


def test_counting_roots_by_simulation():
    law = past(2.5, -1.3, 0.4, 1.1)
    grid = torch.linspace(-8, 8, 40_001, dtype=torch.float64).unsqueeze(-1)
    residual = (grid - law.mean(grid)).squeeze(-1).numpy()
    noise = np.random.default_rng(0).normal(scale=0.6, size=4000)
    roots = np.array([(np.diff(np.sign(residual - e)) != 0).sum() for e in noise])
    error = roots.std() / np.sqrt(len(roots))
    assert abs(roots.mean() - scalar_mass(law, 0.6).absolute) < 4 * error  # four standard errors of 4000 counts


def test_without_the_jacobian_the_signed_mass_is_not_one():
    assert abs(scalar_mass(past(0.8, -1.0, 1.0), 0.5, jacobian=False).signed - 1) > 0.1


def test_density_is_negative_on_a_fold_only():
    u = torch.linspace(-3, 3, 601, dtype=torch.float64)
    assert (next_token_density(past(0.9, -1.0, 1.0), u, 0.5) >= 0).all()
    assert (next_token_density(past(2.0, -1.0, 1.0), u, 0.5) < 0).any()


def test_empty_and_constant_pasts():
    for law in (past(2.0), past(2.0, 1.0), past(2.0, 1.0, 1.0)):
        assert scalar_mass(law, 1.0).absolute == pytest.approx(1, abs=1e-12)


def test_bad_input():
    with pytest.raises(InputError, match="noise_scale is 0"):
        scalar_mass(past(1.0, 0.0), 0)
    with pytest.raises(InputError, match="one-dimensional tokens"):
        scalar_mass(Context.of(scalar_attention(1.0, mask="inclusive"), torch.zeros(2, 1).double()), 1.0)
    with pytest.raises(InputError, match="not finite"):
        scalar_mass(past(1.0, float("nan")), 1.0)
    with pytest.raises(InputError, match="p = 1"):
        Context.of(scalar_attention(1.0), torch.zeros(2, 2).double())
