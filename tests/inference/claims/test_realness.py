"""Realness of eigenvalues by their conditions, where a tolerance by the size of the matrix fails."""

import pytest
import torch

from probattn.inference.claims.realness import may_be_real


def turned(matrix, seed=0):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(*matrix.shape, generator=generator, dtype=torch.float64))[0]
    return basis @ matrix.double() @ basis.mT


@pytest.mark.parametrize("imaginary", [1e-1, 1e-4, 9e-8])
def test_a_pair_is_complex_however_small_it_is_beside_the_matrix(imaginary):
    matrix = torch.diag(torch.tensor([-16.0, -0.2, 1e-8, 1e-8], dtype=torch.float64))
    matrix[2, 3], matrix[3, 2] = imaginary, -imaginary
    matrix = turned(matrix)
    found = torch.linalg.eigvals(matrix)
    assert may_be_real(matrix).tolist() == (found.imag == 0).tolist()
    # The tolerance 4 sqrt(eps) |K| would call the smallest pair real.
    by_size = found.imag.abs() <= 6e-8 * torch.linalg.matrix_norm(matrix)
    assert bool(by_size.all()) == (imaginary < 1e-6)


def test_a_double_eigenvalue_split_by_rounding_may_be_real():
    matrices = torch.stack(
        [turned(torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -1.0]]), k) for k in range(40)]
    )
    assert (torch.linalg.eigvals(matrices).imag != 0).any(), "nothing was split"
    assert may_be_real(matrices).all()


def test_zeros_are_real():
    assert may_be_real(torch.zeros(2, 3, 3, dtype=torch.float64)).all()
