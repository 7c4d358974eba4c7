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


def test_every_route_to_the_determinant_is_taken_and_agrees():
    # (heads, rank, value_dim) chosen so that p, H r and H dv = 6 are each the smallest once.
    sizes = {}
    for name, (heads, rank, value_dim) in {"features": (2, 5, 4), "keys": (1, 2, 3), "values": (1, 4, 1)}.items():
        attention = attention_like(0, heads, rank, 6, value_dim)
        u = tokens(0, 5, 6)
        core = blocks.sylvester_core(attention.mean_and_factors(u).factors)
        sizes[name] = core.shape[-1]
        torch.testing.assert_close(
            blocks.logabsdet_one_minus(core)[1], torch.linalg.slogdet(dense_blocks(attention, u))[1]
        )
    assert sizes == {"features": 6, "keys": 2, "values": 1}


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


class TestLargestRealEigenvalue:
    def test_against_numpy(self):
        matrices = tokens(0, 200, 4, 4)
        eigenvalues = torch.linalg.eigvals(matrices)
        expected = torch.where(eigenvalues.imag == 0, eigenvalues.real, -torch.inf).amax(-1)
        result = blocks.largest_real_eigenvalue(matrices, 4)
        assert torch.isneginf(result).any()
        assert torch.equal(result, expected)

    def test_a_rank_deficient_matrix_has_the_eigenvalue_zero(self):
        turn = torch.tensor([[0.0, 2.0], [-2.0, 0.0]]).double()
        assert blocks.largest_real_eigenvalue(turn, 3) == 0

    def test_gradient_also_where_the_eigenvectors_do_not_span(self):
        matrix = (
            torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]).double().requires_grad_()
        )  # a Jordan block
        blocks.largest_real_eigenvalue(matrix, 3).backward()
        expected = torch.zeros(3, 3).double()
        expected[0, 0] = 1
        torch.testing.assert_close(matrix.grad, expected)

    def test_gradient_numerically(self):
        matrix = (torch.diag(torch.tensor([3.0, 1.0, -1.0])).double() + 0.3 * tokens(1, 3, 3)).requires_grad_()
        assert torch.autograd.gradcheck(lambda m: blocks.largest_real_eigenvalue(m, 3), (matrix,))

    def test_second_derivatives_are_refused_not_wrong(self):
        matrix = tokens(1, 2, 2).requires_grad_()
        value = blocks.largest_real_eigenvalue(matrix.mT @ matrix, 2)
        (slope,) = torch.autograd.grad(value, matrix, create_graph=True)
        with pytest.raises(RuntimeError, match="largest real eigenvalue is differentiable once"):
            slope.sum().backward()
