"""Krylov methods and kept factorisations against dense linear algebra, and what they do not call certain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn.numerics.krylov import rightmost_eigenvalues, smallest_singular_values
from probattn.numerics.lu import factor

DTYPES = {torch.float32: 1e-3, torch.float64: 1e-8}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_eigenvalues(blocks, size, seed=0):
    """A real matrix, not normal, with the given real numbers and complex pairs (upper ones) and else small ones."""
    core = torch.zeros(size, size, dtype=torch.float64)
    place = 0
    for value in blocks:
        if isinstance(value, complex):
            part = torch.tensor([[value.real, value.imag], [-value.imag, value.real]], dtype=torch.float64)
        else:
            part = torch.tensor([[value]], dtype=torch.float64)
        core[place : place + len(part), place : place + len(part)] = part
        place += len(part)
    rest = torch.linspace(-0.01, 0.01, size - place, dtype=torch.float64)
    core.diagonal()[place:] = rest
    basis = torch.eye(size, dtype=torch.float64) + 0.3 * normal(size, size, seed=seed) / size**0.5
    return basis @ core @ torch.linalg.inv(basis)


def search(matrices, dtype=torch.float64, tolerance=1e-9, signs=(1, -1), **options):
    matrices = matrices.to(dtype)
    start = normal(matrices.shape[-1], seed=5).to(dtype).expand(len(matrices), -1)
    return rightmost_eigenvalues(
        lambda x, rows: (matrices[rows] @ x.unsqueeze(-1)).squeeze(-1), start, tolerance, signs, **options
    )


@pytest.mark.parametrize("size", [1, 5, 64, 65, 150])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kept_factorisation_is_that_of_the_matrix(size, dtype):
    matrix = torch.eye(size, dtype=dtype) + 0.5 * normal(3, size, size, seed=size).to(dtype) / size**0.5
    right = normal(3, size, 2, seed=1).to(dtype)
    found, tolerance = factor(matrix), 1e-3 if dtype == torch.float32 else 1e-10
    expected = [torch.linalg.slogdet(one) for one in matrix]
    torch.testing.assert_close(found.logabsdet()[0], torch.stack([one[0] for one in expected]))
    torch.testing.assert_close(found.logabsdet()[1], torch.stack([one[1] for one in expected]), rtol=0, atol=tolerance)
    torch.testing.assert_close(matrix @ found.solve(right), right, rtol=0, atol=tolerance)
    torch.testing.assert_close(matrix.mT @ found.solve(right, transposed=True), right, rtol=0, atol=tolerance)
    assert not torch.allclose(matrix @ found.solve(right, transposed=True), right, atol=1e-2) or size == 1
    some = torch.tensor([2, 0])
    torch.testing.assert_close(found.solve(right[some], some), found.solve(right)[some])
    inverses = torch.stack([torch.linalg.inv(one) for one in matrix])
    torch.testing.assert_close(
        found.inverse_diagonal(), inverses.diagonal(dim1=-2, dim2=-1), rtol=0, atol=10 * tolerance
    )
    torch.testing.assert_close(factor(matrix.clone(), overwrite=True).lu, found.lu)


def test_factors_of_singular_and_unusable_matrices_say_so():
    matrix = torch.eye(70, dtype=torch.float64).repeat(3, 1, 1)
    matrix[1, 4, 4], matrix[2, 4, 5] = 0.0, torch.nan
    sign, logabs = factor(matrix).logabsdet()
    assert sign[0] == 1
    assert logabs[0] == 0
    assert sign[1] == 0
    assert logabs[1] == -torch.inf
    assert logabs[2].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 4])
def test_smallest_singular_values_are_those_of_the_matrix(dtype, width):
    matrix = torch.eye(120, dtype=torch.float64) - 1.5 * normal(6, 120, 120) / 120**0.5
    left, values, right = torch.linalg.svd(matrix[0])
    values[-1] = 1e-6  # near the boundary
    matrix[0] = left * values @ right
    factored = factor(matrix.to(dtype))
    found = smallest_singular_values(
        factored.solve,
        lambda columns, rows: factored.solve(columns, rows, transposed=True),
        normal(6, 120, width, seed=2).to(dtype),
        1e-9 if dtype == torch.float64 else 1e-4,
    )
    expected = torch.linalg.svdvals(matrix)[:, -1]
    sure = found.converged
    assert sure.sum() >= 4
    error = (found.value.double() - expected).abs()
    assert (error <= (1e-8 if dtype == torch.float64 else 2e-4) * expected + 1e-6 * (dtype == torch.float32))[
        sure
    ].all()
    assert (found.value[sure].double() >= expected[sure] - 1e-5).all()


def test_what_the_iteration_cannot_solve_is_not_called_converged():
    start = normal(2, 30, 2)

    def solve(columns, rows):
        return torch.where((rows == 1)[:, None, None], torch.nan, columns)

    found = smallest_singular_values(solve, solve, start, 1e-9)
    assert found.converged.tolist() == [True, False]
    assert found.value[0] == pytest.approx(1.0)
    assert found.value[1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_complex_pair_is_never_counted_as_real(dtype):
    matrix = with_eigenvalues([0.9 + 0.01j, 0.6, 0.55 + 0.3j, -0.7, -0.8 + 0.2j], 110)
    found = search(matrix.unsqueeze(0), dtype, tolerance=DTYPES[dtype])
    right, left = found[1], found[-1]
    for one in (right, left):
        assert bool(one.real_certain.all() & one.abscissa_certain.all())
    assert float(right.real) == pytest.approx(0.6, abs=DTYPES[dtype])
    assert float(right.abscissa) == pytest.approx(0.9, abs=DTYPES[dtype])
    assert float(left.real) == pytest.approx(0.7, abs=DTYPES[dtype])
    assert float(left.abscissa) == pytest.approx(0.8, abs=DTYPES[dtype])
    assert abs(float(right.real) - float(right.abscissa)) > 0.2  # counting the pair would give another number


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.3, 1.0, 3.0]), decay=st.sampled_from([0.5, 2.0, 4.0]))
def test_what_is_certain_is_right(seed, scale, decay):
    size = 100
    falling = torch.linspace(0, 1, size, dtype=torch.float64).neg().mul(decay * 2).exp()
    matrix = scale * (normal(4, size, size, seed=seed) * falling) / size**0.5
    values = torch.linalg.eigvals(matrix)
    found = search(matrix, tolerance=1e-7, steps=(16, 24, 40, 60))
    for sign in (1, -1):
        part = sign * values.real
        real = part.masked_fill(values.imag != 0, -torch.inf).amax(-1)
        one = found[sign]
        assert ((one.real - real).abs()[one.real_certain] < 1e-6).all()
        assert ((one.abscissa - part.amax(-1)).abs()[one.abscissa_certain] < 1e-6).all()


def test_certainty_is_reached_on_decaying_spectra_and_refused_on_flat_ones():
    size = 100
    falling = torch.linspace(0, 1, size, dtype=torch.float64).neg().mul(12).exp()
    easy = search(normal(8, size, size) * falling, tolerance=1e-7, steps=(60,))[1]
    assert easy.real_certain.double().mean() > 0.8
    flat = search(normal(8, size, size) / 10, tolerance=1e-7, steps=(16,))[1]
    assert not bool(flat.real_certain.any())
    assert not bool(flat.abscissa_certain.any())


def test_an_invariant_space_is_left_for_another():
    matrix = torch.diag(torch.tensor([0.5] * 50 + [0.2] * 50, dtype=torch.float64))
    matrix[3, 3] = 0.7
    found = search(matrix.unsqueeze(0), steps=(8,))
    assert float(found[1].abscissa) == pytest.approx(0.7)
    assert float(found[-1].abscissa) == pytest.approx(-0.2)
    nothing = search(torch.zeros(1, 100, 100, dtype=torch.float64))
    assert float(nothing[1].real) == 0.0


def test_numbers_that_are_not_finite_are_not_certain():
    matrix = torch.full((2, 100, 100), torch.nan, dtype=torch.float64)
    matrix[1] = with_eigenvalues([0.5], 100)
    found = search(matrix)[1]
    assert found.real_certain.tolist() == [False, True]
    assert found.abscissa_certain.tolist() == [False, True]
