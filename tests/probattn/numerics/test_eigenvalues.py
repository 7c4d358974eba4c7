import numpy as np
import pytest
import torch

from probattn.numerics.eigenvalues import largest_real_eigenvalue, spectral_abscissa

BOTH = [largest_real_eigenvalue, spectral_abscissa]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(matrix, count, seed=0):
    """The matrix in random orthogonal coordinates, (count, m, m)."""
    turn, _ = torch.linalg.qr(normal(count, len(matrix), len(matrix), seed=seed))
    return turn @ matrix @ turn.mT


def skewed(matrix, count):
    """The matrix in random oblique coordinates, whose rounding is not symmetric, (count, m, m)."""
    frame = torch.eye(len(matrix)) + 0.3 * normal(count, len(matrix), len(matrix))
    return frame @ matrix @ torch.linalg.inv(frame)


def pair(real, imaginary, *others):
    """A normal matrix with the eigenvalues real +- i imaginary and others."""
    block = torch.tensor([[real, imaginary], [-imaginary, real]], dtype=torch.float64)
    return torch.block_diag(block, *(torch.tensor([[x]], dtype=torch.float64) for x in others))


class TestValues:
    @pytest.mark.parametrize("size", [1, 2, 3, 8, 24, 64])
    def test_against_numpy(self, size):
        matrices = normal(60, size, size, seed=size)
        reference = np.linalg.eigvals(matrices.numpy())
        expected = np.where(reference.imag == 0, reference.real, -np.inf).max(-1)
        np.testing.assert_allclose(largest_real_eigenvalue(matrices), expected, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(spectral_abscissa(matrices), reference.real.max(-1), rtol=1e-8, atol=1e-8)
        if size == 2:
            assert np.isneginf(expected).any()

    @pytest.mark.parametrize("function", BOTH)
    @pytest.mark.parametrize("size", [2, 3, 5, 8, 16, 32, 64])
    def test_single_precision_agrees_with_double(self, function, size):
        matrices = normal(100, size, size, seed=100 + size) / size**0.5
        single = function(matrices.float())
        assert single.dtype == torch.float32
        # 1e-3: an eigenvalue of condition 1e3 moves by that when the entries are rounded.
        torch.testing.assert_close(single, function(matrices).float(), rtol=0, atol=1e-3)
        assert torch.equal(single, function(matrices.float().double()).float())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("imaginary", [1e-2, 1e-3, 1e-4, 1e-5])
    def test_a_dominant_pair_close_to_the_real_axis_is_complex(self, dtype, imaginary):
        matrices = turned(pair(0.088, imaginary, 0.035, -0.5), 50).to(dtype)
        torch.testing.assert_close(largest_real_eigenvalue(matrices), torch.full((50,), 0.035, dtype=dtype))
        torch.testing.assert_close(spectral_abscissa(matrices), torch.full((50,), 0.088, dtype=dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_also_where_the_pair_is_far_from_normal(self, dtype):
        for imaginary in (1e-2, 1e-4, 1e-5):
            matrix = torch.tensor([[1.0, 1.0], [-(imaginary**2), 1.0]], dtype=dtype)
            assert torch.isneginf(largest_real_eigenvalue(matrix))
            assert spectral_abscissa(matrix) == pytest.approx(1.0)

    def test_what_the_square_root_of_rounding_as_tolerance_would_do(self):
        # The rule of old: every pair with an imaginary part below 4 sqrt(eps) |K| is real.
        matrix = pair(0.088, 1e-3, 0.035).float()
        found = torch.linalg.eigvals(matrix)
        tolerance = 4 * torch.finfo(torch.float32).eps ** 0.5 * torch.linalg.matrix_norm(pair(0.088, 0.0, 0.035, 1.0))
        assert float(found.real[found.imag.abs() <= tolerance].max()) == pytest.approx(0.088)
        assert float(largest_real_eigenvalue(matrix)) == pytest.approx(0.035)

    @pytest.mark.parametrize(
        ("name", "matrix", "accuracy"),
        [
            ("two eigenvectors", torch.diag(torch.tensor([2.0, 2.0, -1.0])), 1e-12),
            ("one eigenvector", torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -1.0]]), 1e-6),
            ("weakly coupled", torch.tensor([[2.0, 1e-3, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -1.0]]), 1e-6),
            ("strongly coupled", torch.tensor([[2.0, 30.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -1.0]]), 1e-5),
            ("triple", torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 2.0]]), 1e-4),
        ],
    )
    def test_a_double_eigenvalue_split_by_rounding_is_real(self, name, matrix, accuracy):
        matrices = skewed(matrix.double(), 200)
        assert (torch.linalg.eigvals(matrices).imag != 0).any()  # rounding does split some of them
        assert (largest_real_eigenvalue(matrices) - 2).abs().max() < accuracy
        for unit in (1e-6, 1e6):
            assert (largest_real_eigenvalue(unit * matrices) / unit - 2).abs().max() < accuracy

    def test_a_double_eigenvalue_with_two_eigenvectors_in_single_precision(self):
        matrices = skewed(torch.diag(torch.tensor([2.0, 2.0, -1.0])).double(), 200).float()
        assert (torch.linalg.eigvals(matrices.double()).imag.amax(-1) > 1e-9).any()
        assert (largest_real_eigenvalue(matrices) - 2).abs().max() < 1e-6

    @pytest.mark.parametrize(
        ("dtype", "limit"),
        [
            (torch.float32, 8 * torch.finfo(torch.float32).eps * 2**0.5),
            (torch.float64, 8 * 2 * torch.finfo(torch.float64).eps * 2**0.5),
        ],
    )
    def test_the_limits_are_as_stated(self, dtype, limit):
        assert largest_real_eigenvalue(pair(1.0, 0.9 * limit).to(dtype)) == 1
        assert torch.isneginf(largest_real_eigenvalue(pair(1.0, 1.1 * limit).to(dtype)))

    def test_of_several_close_pairs_the_first_real_one_counts(self):
        # From right to left: a complex pair, one split by rounding, a real eigenvalue, a pair split by rounding.
        matrix = torch.block_diag(pair(3.0, 1e-4), pair(2.0, 1e-15), pair(1.0, 1e-15, 1.5))
        assert float(largest_real_eigenvalue(matrix)) == 2
        # A pair left of the largest real eigenvalue changes nothing.
        assert float(largest_real_eigenvalue(torch.block_diag(pair(1.0, 1e-15), pair(0.5, 1.0, 1.5)))) == 1.5
        batch = torch.stack([matrix, torch.diag(torch.arange(7.0)).double(), -matrix])
        np.testing.assert_allclose(largest_real_eigenvalue(batch), [2.0, 6.0, -1.0])

    @pytest.mark.parametrize("function", BOTH)
    def test_values_that_are_not_finite_stay_in_their_matrix(self, function):
        matrices = normal(4, 3, 3)
        matrices[1, 0, 2], matrices[2, 1, 1] = torch.nan, torch.inf
        found = function(matrices)
        assert found.isnan().tolist() == [False, True, True, False]
        assert torch.equal(found[::3], function(matrices[::3]))

    @pytest.mark.parametrize("function", BOTH)
    def test_shapes(self, function):
        assert function(torch.zeros(0, 3, 3)).shape == (0,)
        assert function(torch.zeros(2, 5, 3, 3)).shape == (2, 5)
        assert function(torch.full((1, 1), -3.0)) == -3
        matrices = normal(2, 3, 4, 4, seed=5)
        mapped = torch.func.vmap(function, in_dims=2)(matrices.movedim(0, 2))
        torch.testing.assert_close(mapped, function(matrices))


class TestGradients:
    simple = torch.diag(torch.tensor([3.0, 1.0, -1.0])).double() + 0.3 * normal(3, 3, seed=1)
    spiral = pair(0.5, 2.0, -1.0) + 0.3 * normal(3, 3, seed=2)

    @pytest.mark.parametrize("function", BOTH)
    def test_numerically(self, function):
        for matrix in (self.simple, torch.stack([self.simple, self.simple.mT])):
            assert torch.autograd.gradcheck(function, matrix.clone().requires_grad_(), check_batched_grad=True)

    def test_of_a_complex_pair(self):
        assert torch.autograd.gradcheck(spectral_abscissa, self.spiral.clone().requires_grad_())

    def test_single_precision_has_the_gradient_of_double(self):
        for function, matrix in ((largest_real_eigenvalue, self.simple), (spectral_abscissa, self.spiral)):
            single, double = matrix.float().requires_grad_(), matrix.float().double().requires_grad_()
            function(single).backward()
            function(double).backward()
            assert single.grad.dtype == torch.float32
            assert torch.equal(single.grad, double.grad.float())

    @pytest.mark.parametrize("function", BOTH)
    def test_a_multiple_eigenvalue_has_that_of_the_mean_of_the_cluster(self, function):
        matrix = turned(torch.diag(torch.tensor([2.0, 2.0, -1.0])).double(), 1)[0].requires_grad_()
        function(matrix).backward()
        # The projector onto the eigenvectors, halved.
        torch.testing.assert_close(matrix.grad, ((matrix.detach() + torch.eye(3)) / 3).mT / 2)

    @pytest.mark.parametrize("function", BOTH)
    def test_a_defective_kernel_behind_the_eigenvalue(self, function):
        matrix = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
        matrix = matrix.requires_grad_()
        function(matrix).backward()
        expected = torch.zeros(3, 3, dtype=torch.float64)
        expected[0, 0] = 1
        torch.testing.assert_close(matrix.grad, expected)

    @pytest.mark.parametrize("function", BOTH)
    def test_the_kernel_of_a_matrix_of_low_rank_stays(self, function):
        factor = normal(4, 2, seed=3)
        for matrix in (
            -factor @ factor.mT,
            torch.zeros(2, 2).double(),
            turned(torch.block_diag(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), -torch.ones(1, 1)).double(), 1)[0],
        ):
            matrix = matrix.clone().requires_grad_()
            value = function(matrix)
            value.backward()
            assert value.detach() == 0
            assert (matrix.grad == 0).all()

    @pytest.mark.parametrize("function", BOTH)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_limit_of_the_kernel_is_as_stated(self, function, dtype):
        limit = 8 * max(torch.finfo(dtype).eps, 2 * torch.finfo(torch.float64).eps)
        for size, kernel in ((0.9 * limit, True), (1.1 * limit, False)):
            matrix = torch.diag(torch.tensor([size, -1.0], dtype=dtype)).requires_grad_()
            value = function(matrix)
            value.backward()
            assert (value.detach() == 0) == kernel
            assert (matrix.grad[0, 0] == 0) == kernel
        # An eigenvalue of large condition is moved farther: here |K| = 30 and |y^H x| = 1 / 30.
        for size, kernel in ((0.9 * 900 * limit, True), (1.1 * 900 * limit, False)):
            matrix = torch.tensor([[size, 30.0], [0.0, -1.0]], dtype=dtype)
            assert (function(matrix) == 0) == kernel

    def test_a_defective_kernel_in_oblique_coordinates(self):
        nilpotent = torch.block_diag(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), -torch.ones(1, 1)).double()
        matrices = skewed(nilpotent, 200)
        assert (torch.linalg.eigvals(matrices).real.amax(-1) > 1e-9).any()
        assert (largest_real_eigenvalue(matrices) == 0).all()
        assert (spectral_abscissa(matrices) == 0).all()
        assert (spectral_abscissa(matrices.float()) == 0).all()

    def test_a_pair_on_the_imaginary_axis_is_no_kernel(self):
        matrix = pair(0.0, 2.0, -1.0).requires_grad_()
        spectral_abscissa(matrix).backward()
        torch.testing.assert_close(matrix.grad, torch.diag(torch.tensor([0.5, 0.5, 0.0])).double())

    def test_zero_without_a_real_eigenvalue_and_nan_where_nothing_is_known(self):
        matrices = torch.stack([pair(0.0, 1.0), normal(2, 2), torch.eye(2).double()])
        matrices[1, 0, 0] = torch.nan
        matrices.requires_grad_()
        largest_real_eigenvalue(matrices).sum().backward()
        assert (matrices.grad[0] == 0).all()
        assert matrices.grad[1].isnan().all()
        torch.testing.assert_close(matrices.grad[2], torch.eye(2).double() / 2)

    @pytest.mark.parametrize("function", BOTH)
    def test_no_gradient_comes_out_where_none_comes_in(self, function):
        matrices = normal(2, 2, 2, seed=4)
        matrices[0, 0, 0] = torch.nan
        matrices.requires_grad_()
        value = function(matrices)
        torch.where(value.isnan(), 0.0, value).sum().backward()
        assert (matrices.grad[0] == 0).all()
        assert (matrices.grad[1] != 0).any()

    def test_the_gradient_of_a_pair_that_counts_as_real_is_that_of_its_mean(self):
        limit = 8 * torch.finfo(torch.float32).eps
        matrix = pair(1.0, 0.5 * limit, -1.0).float().requires_grad_()
        largest_real_eigenvalue(matrix).backward()
        torch.testing.assert_close(matrix.grad, torch.diag(torch.tensor([0.5, 0.5, 0.0])))

    @pytest.mark.parametrize(
        ("function", "name"),
        [(largest_real_eigenvalue, "the largest real eigenvalue"), (spectral_abscissa, "the spectral abscissa")],
    )
    def test_second_derivatives_are_refused_not_wrong(self, function, name):
        matrix = self.simple.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(matrix), matrix, create_graph=True)
        with pytest.raises(RuntimeError, match=f"^{name} is differentiable once"):
            slope.sum().backward()

    # 2026-11-24: torch's compiler makes an instance of an autograd.Function and warns of that itself.
    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
    @pytest.mark.parametrize("function", BOTH)
    def test_compiles_into_one_graph(self, function):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        matrix, other = (self.simple.clone().requires_grad_() for _ in range(2))
        compiled(matrix).backward()
        function(other).backward()
        torch.testing.assert_close(matrix.grad, other.grad)


def test_pairs_far_from_the_axis_cost_no_decomposition(monkeypatch):
    calls = []
    plain = torch.linalg.svdvals
    monkeypatch.setattr(torch.linalg, "svdvals", lambda matrix: calls.append(len(matrix)) or plain(matrix))
    largest_real_eigenvalue(torch.stack([pair(1.0, 0.5, -1.0), pair(1.0, 1e-4, -1.0), pair(-2.0, 1e-4, -1.0)]))
    assert sum(calls) == 1


def test_tiny_matrices_and_tiny_entries_have_eigenvalues():
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(200, 32, 32, generator=generator, dtype=torch.float64)
    tiny = 1e-300 * plain
    torch.testing.assert_close(spectral_abscissa(tiny) * 1e300, spectral_abscissa(plain), rtol=1e-9, atol=0)
    one = tiny * 10 ** (-20 * torch.rand(200, 32, 32, generator=generator, dtype=torch.float64))
    one = one + torch.diag(torch.tensor([0.5] + 31 * [0.0]).double())
    assert (spectral_abscissa(one) == 0.5).all()
    huge = 1e300 * torch.diag(torch.tensor([-1.0, 17.0]).double())
    assert largest_real_eigenvalue(huge) == huge.max()
