import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn import blocks
from probattn.solve.context import Context
from support import attention_like, dense, dense_blocks, tokens


@settings(max_examples=200)
@given(
    seed=st.integers(0, 10**6),
    mask=st.sampled_from(["strict", "inclusive"]),
    heads=st.integers(1, 4),
    rank=st.integers(1, 5),
    dim=st.integers(1, 5),
    value_dim=st.none() | st.integers(1, 5),
    length=st.integers(1, 6),
    size=st.sampled_from([0.1, 1.0, 5.0]),
)
def test_blocks_and_determinants_match_autograd(seed, mask, heads, rank, dim, value_dim, length, size):
    attention = attention_like(seed, heads, rank, dim, value_dim, mask, size)
    u = tokens(seed, length, dim)
    whole = dense(attention, u)
    reference = torch.stack([whole[i, i] for i in range(length)])
    assert (attention.jacobian(u) - reference).abs().max() <= 1e-10
    above = torch.ones(length, length).triu(1).bool()
    assert (whole[above] == 0).all()

    sign, value = attention.logabsdet(u)
    expected_sign, expected = torch.linalg.slogdet(reference)
    # The logarithm loses digits with the conditioning of the block; beyond 1e8 neither side knows more.
    singular = torch.linalg.svdvals(reference)
    condition = singular[..., 0].clamp(min=1.0) / singular[..., -1]
    known = condition < 1e8
    assert ((value - expected).abs()[known] <= 1e-10 * condition[known].clamp(min=1.0)).all()
    assert (sign == expected_sign)[known].all()


def test_the_strict_formula_is_wrong_under_an_inclusive_mask():
    attention = attention_like(1, heads=2, value_dim=2, mask="inclusive")
    u = tokens(1, 6, 3)
    factors = attention.mean_and_factors(u).factors._replace(own=None)
    strict_formula = torch.eye(3) - blocks.mean_jacobian(factors)
    assert (strict_formula - dense_blocks(attention, u)).abs().max() > 0.1


def test_several_heads_do_not_factor():
    attention = attention_like(2, heads=2)
    u = tokens(2, 6, 3)
    product = sum(
        type(attention)(attention.query[h : h + 1], attention.key[h : h + 1], start=attention.start).logabsdet(u)[1]
        for h in (0, 1)
    )
    assert (attention.logabsdet(u)[1] - product).abs().max() > 0.1


def test_first_two_positions_of_a_strict_mask_are_the_identity():
    factor = attention_like(3, heads=2, value_dim=2).jacobian(tokens(3, 5, 3))
    assert torch.equal(factor[:2], torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert not torch.allclose(factor[2], torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
def test_first_and_second_derivatives(mask):
    # The strict formula, and one head of rank one so that the Sylvester route is differentiated as well.
    attention = attention_like(4, heads=1, rank=1, dim=2, value_dim=2, mask=mask, size=0.5)

    def evaluate(query, key, value, output, start, u):
        other = type(attention)(query, key, value, output, mask=mask, start=start)
        residual, logabs = other.residual_and_logabsdet(u)
        return residual, logabs, other.jacobian(u)

    inputs = [
        x.clone().requires_grad_()
        for x in (
            attention.query,
            attention.key,
            attention.value,
            0.5 * attention.output,
            attention.start,
            tokens(4, 4, 2),
        )
    ]
    assert torch.autograd.gradcheck(evaluate, inputs)
    assert torch.autograd.gradgradcheck(evaluate, inputs)


def test_step_by_step_agrees_with_the_sequence():
    for mask in ("strict", "inclusive"):
        attention = attention_like(5, heads=3, value_dim=2, mask=mask)
        u = tokens(5, 7, 3)
        past = Context.of(attention, u[:0])
        for i in range(7):
            mean, block = past.mean_and_jacobian(u[i])
            torch.testing.assert_close(mean, attention.mean(u)[i])
            torch.testing.assert_close(block, attention.jacobian(u)[i])
            past = past.extend(u[i])


class TestCores:
    # The sizes (heads, rank, value_dim) of attentions of six features, and the size of the core under each mask.
    @pytest.mark.parametrize(
        ("heads", "rank", "value_dim", "strict", "inclusive"),
        [
            (2, 5, 4, 6, 6),  # the features are fewest
            (1, 2, 3, 2, 3),  # the keys; under the inclusive mask they cannot be used
            (1, 3, 3, 3, 3),  # keys and values alike
            (2, 1, 4, 2, 6),
            (1, 4, 1, 1, 1),  # the values
            (2, 4, 2, 4, 4),
            (2, 3, 3, 6, 6),  # all alike
        ],
    )
    def test_every_route_has_the_determinant_and_the_eigenvalues_of_the_block(
        self, heads, rank, value_dim, strict, inclusive
    ):
        for mask, size in (("strict", strict), ("inclusive", inclusive)):
            attention, u = attention_like(8, heads, rank, 6, value_dim, mask, 0.5), tokens(8, 5, 6)
            core = attention.core(u)
            assert core.shape == (5, size, size)
            block = attention.jacobian(u)
            sign, logabs = blocks.logabsdet_one_minus(core)
            expected = torch.linalg.slogdet(block)
            assert torch.equal(sign, expected.sign)
            torch.testing.assert_close(logabs, expected.logabsdet)
            change = torch.eye(6, dtype=torch.float64) - block
            torch.testing.assert_close(attention.mean_jacobian(u), change)
            for power in range(1, 5):  # the sums of powers of the eigenvalues
                moments = [
                    torch.linalg.matrix_power(m, power).diagonal(dim1=-2, dim2=-1).sum(-1) for m in (core, change)
                ]
                torch.testing.assert_close(*moments)

    def test_batches_of_parameters_and_of_tokens(self):
        for heads, rank, value_dim in ((2, 5, 4), (1, 2, 3), (1, 4, 1)):
            for mask in ("strict", "inclusive"):
                attention = attention_like(9, heads, rank, 6, value_dim, mask, batch=(3, 1))
                u = tokens(9, 2, 4, 6)
                logabs, change = attention.logabsdet(u)[1], attention.mean_jacobian(u)
                assert logabs.shape == (3, 2, 4)
                assert change.shape == (3, 2, 4, 6, 6)
                one = attention.select((torch.tensor([1]), torch.tensor([0])))
                torch.testing.assert_close(one.logabsdet(u[1])[1][0], logabs[1, 1])
                torch.testing.assert_close(one.mean_jacobian(u[1])[0], change[1, 1])


class TestLogabsdet:
    @pytest.mark.parametrize("size", [1, 2, 64, 65])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_sizes_on_both_sides_of_the_kernel(self, size, dtype):
        matrix = (0.5 * tokens(1, 3, 2, size, size) / size**0.5).to(dtype)
        matrix[0, 0] = torch.eye(size)
        sign, logabs = blocks.logabsdet_one_minus(matrix)
        expected = torch.linalg.slogdet(torch.eye(size) - matrix.double())
        assert (sign.dtype, logabs.dtype, sign.shape, logabs.shape) == (dtype, dtype, (3, 2), (3, 2))
        assert torch.equal(sign.double(), expected.sign)
        torch.testing.assert_close(logabs.double(), expected.logabsdet, rtol=1e-4, atol=1e-4)
        assert (sign[0, 0], logabs[0, 0]) == (0, -torch.inf)

    @pytest.mark.parametrize("size", [1, 3, 66])
    def test_derivatives_on_both_sides_of_the_kernel(self, size):
        matrix, direction = 0.5 * tokens(2, 2, size, size) / size**0.5, tokens(3, 2, size, size)

        def along(t):
            return blocks.logabsdet_one_minus(matrix + t * direction)[1].sum()

        def plain(t):
            return torch.linalg.slogdet(torch.eye(size) - matrix - t * direction)[1].sum()

        zero = torch.zeros((), dtype=torch.float64)
        for transform in (
            torch.func.grad,
            torch.func.jacfwd,
            lambda f: torch.func.grad(torch.func.grad(f)),
            lambda f: torch.func.jacfwd(torch.func.grad(f)),
            lambda f: torch.func.grad(torch.func.grad(torch.func.grad(f))),
        ):
            torch.testing.assert_close(transform(along)(zero), transform(plain)(zero), rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("size", [3, 66])
    def test_value_and_gradient_in_one_loss(self, size):
        weight = tokens(4, 2, size, size)

        def slope(logabsdet):
            matrix = (0.5 * tokens(2, 2, size, size) / size**0.5).requires_grad_()
            value = logabsdet(matrix).sum()
            (gradient,) = torch.autograd.grad(value, matrix, create_graph=True)
            return torch.autograd.grad(value + (weight * gradient).sum(), matrix)[0]

        mine = slope(lambda k: blocks.logabsdet_one_minus(k)[1])
        torch.testing.assert_close(mine, slope(lambda k: torch.linalg.slogdet(torch.eye(size) - k)[1]))

    def test_under_vmap_along_any_axis(self):
        matrix = 0.3 * tokens(5, 4, 2, 3, 3)
        expected = blocks.logabsdet_one_minus(matrix)
        for axis in range(4):
            found = torch.func.vmap(blocks.logabsdet_one_minus, in_dims=axis)(matrix.movedim(0, axis))
            torch.testing.assert_close(found, expected)


class TestSmallestSingularValue:
    def test_is_the_distance_to_the_nearest_singular_matrix(self):
        matrix = tokens(4, 3, 2, 5, 5)
        block = torch.eye(5) - matrix
        found = blocks.smallest_singular_value_one_minus(matrix)
        torch.testing.assert_close(found, 1 / torch.linalg.matrix_norm(torch.linalg.inv(block), 2))
        assert blocks.smallest_singular_value_one_minus(torch.eye(3)) == 0

    def test_what_is_not_finite_stays_in_its_matrix(self):
        matrix = tokens(5, 4, 3, 3)
        matrix[1, 0, 2], matrix[2, 2, 2] = torch.nan, -torch.inf
        found = blocks.smallest_singular_value_one_minus(matrix)
        assert found.isnan().tolist() == [False, True, True, False]

    def test_again_in_double_precision_where_lapack_gives_up_in_single(self, monkeypatch):
        plain = torch.linalg.svdvals

        def stalls(matrix):
            if matrix.dtype == torch.float32:
                raise torch.linalg.LinAlgError("the algorithm failed to converge")
            return plain(matrix)

        matrix = tokens(6, 4, 3, 3).float()
        expected = blocks.smallest_singular_value_one_minus(matrix)
        monkeypatch.setattr(torch.linalg, "svdvals", stalls)
        found = blocks.smallest_singular_value_one_minus(matrix)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)


class TestEigenvalues:
    """Their own tests are those of probattn.numerics.eigenvalues; here, what the size of M adds."""

    turn = torch.tensor([[0.0, 2.0], [-2.0, 0.0]], dtype=torch.float64)
    spiral = turn - torch.eye(2)

    def test_a_core_smaller_than_the_block_adds_the_eigenvalue_zero(self):
        assert torch.isneginf(blocks.largest_real_eigenvalue(self.turn, 2))
        assert blocks.largest_real_eigenvalue(self.turn, 3) == 0
        assert blocks.spectral_abscissa(self.spiral, 2) == pytest.approx(-1)
        assert blocks.spectral_abscissa(self.spiral, 3) == 0
        for function in (blocks.largest_real_eigenvalue, blocks.spectral_abscissa):
            assert function(torch.diag(torch.tensor([-2.0, 3.0])), 5) == 3
            assert function(torch.full((2, 2), torch.nan), 3).isnan()
            negative = -torch.eye(2).expand(3, 4, 2, 2)
            assert (function(negative, 2) == -1).all()
            assert (function(negative, 3) == 0).all()

    def test_gradients(self):
        for matrix in (self.spiral + 2 * torch.eye(2), torch.diag(torch.tensor([0.5, -0.25])).double()):
            for function in (blocks.largest_real_eigenvalue, blocks.spectral_abscissa):
                if torch.isfinite(function(matrix, 2)):
                    assert torch.autograd.gradcheck(lambda m, f=function: f(m, 3), matrix.clone().requires_grad_())
