import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn import CausalAttention, LatentAttention
from probattn.errors import InputError, NoSolutionError, SeveralSolutionsError, SeveralSolutionsWarning
from probattn.solve.context import Context
from probattn.solve.sequence import solve_sequence
from probattn.solve.token import solve_token
from support import attention_like, tokens


def folded(a=3.0):
    """Past {-1, +1} under slope a: e(u) = u - tanh(a u)."""
    attention = CausalAttention.from_qk_matrix(torch.tensor([[a]], dtype=torch.float64))
    # Noise that makes the first two tokens -1 and +1 and puts the third between the turning points.
    first = torch.tensor([[-1.0]], dtype=torch.float64)
    noise = attention.residual(torch.cat([first, -first, 0 * first]))
    return attention, noise


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), heads=st.integers(1, 3), dim=st.integers(1, 4), length=st.integers(1, 12))
def test_solutions_solve(seed, heads, dim, length):
    attention, e = attention_like(seed, heads, 2, dim, 2, size=0.15), tokens(seed, 3, length, dim)
    try:
        u = solve_sequence(attention, e)
    except SeveralSolutionsError:
        return
    assert (attention.residual(u) - e).abs().max() <= 1e-11


@pytest.mark.parametrize("mask", ["strict", "inclusive"])
def test_pathwise_gradients(mask):
    attention = attention_like(0, 2, 2, 2, 1, mask, size=0.4)
    scale = torch.tensor([0.6, 0.9], dtype=torch.float64)

    def sample(query, key, value, output, start, scale, e):
        return solve_sequence(CausalAttention(query, key, value, output, mask=mask, start=start), scale * e)

    inputs = [
        x.clone().requires_grad_()
        for x in (
            attention.query,
            attention.key,
            0.4 * attention.value,
            attention.output,
            attention.start,
            scale,
            tokens(0, 2, 5, 2),
        )
    ]
    assert torch.autograd.gradcheck(sample, inputs, fast_mode=True)


def test_second_derivatives_are_refused_not_wrong():
    e = tokens(0, 4, 3).requires_grad_()
    u = solve_sequence(attention_like(0, size=0.2), e)
    (slope,) = torch.autograd.grad(u.square().sum(), e, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(slope.sum(), e)


def test_several_solutions_raise_with_position_and_roots():
    attention, noise = folded()
    with pytest.raises(
        SeveralSolutionsError, match=r"position 2, batch element \(\): .*several solutions.*name a rule with selection="
    ):
        solve_sequence(attention, noise)


def test_nearest_takes_the_smallest_step_and_says_so():
    attention, noise = folded()
    with pytest.warns(SeveralSolutionsWarning, match="1 of 1 sequences had several solutions, at positions 2"):
        u = solve_sequence(attention, noise + 0.05 * torch.tensor([[0.0], [0.0], [1.0]]), selection="smallest_step")
    assert (attention.residual(u) - noise - 0.05 * torch.tensor([[0.0], [0.0], [1.0]])).abs().max() < 1e-12
    # Roots of u - tanh(3 u) = 0.05 are near 1.04, -0.94 and -0.025; the last needs the smallest step.
    assert -0.1 < float(u[-1]) < 0


def test_a_unique_solution_beyond_the_certificate_is_not_reported():
    attention, noise = folded()
    far = noise + torch.tensor([[0.0], [0.0], [2.0]])  # noise beyond the fold: one root
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        u = solve_sequence(attention, far)
    assert (attention.residual(u) - far).abs().max() < 1e-12


def test_folds_in_two_dimensions_are_found_where_the_determinant_is_positive():
    # Two independent coordinates, each folded: nine roots; the one at the origin has det J = 1.
    corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [0, 0]], dtype=torch.float64)
    attention = CausalAttention.from_qk_matrix(2.0 * torch.eye(2, dtype=torch.float64))
    with pytest.raises(SeveralSolutionsError, match="position"):
        solve_sequence(attention, attention.residual(corners))


def test_a_bijection_with_negative_determinant_under_the_inclusive_mask():
    one = torch.ones(1, 1, 1).double()
    inclusive = CausalAttention(one, one, 2 * one, one, mask="inclusive")  # e(u) = u - 2 u
    assert float(solve_sequence(inclusive, torch.tensor([[0.7]]).double())) == pytest.approx(-0.7)


@pytest.mark.parametrize("heads", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_on_a_line_several_solutions_are_found_as_a_grid_finds_them(heads):
    missed = several = 0
    for seed in range(150):
        attention, u = attention_like(seed, heads, 1, 1, 1, size=10.0), tokens(seed, 5, 1)
        past = Context.of(attention, u[:4])
        noise = u[4] - past.values.mean(-2).sum(-2)
        grid = torch.linspace(-60, 60, 20_001, dtype=torch.float64).unsqueeze(-1)
        residual = (grid - past.mean(grid) - noise).squeeze(-1)
        if int((residual[1:] * residual[:-1] < 0).sum()) < 2:
            continue
        several += 1
        missed += not bool(solve_token(past, noise, "smallest_step", 4)[1])
    assert several > 5
    assert missed == 0


def test_a_hard_case_under_the_strict_mask_is_solved():
    solved = 0
    for seed in range(20):
        attention, e = attention_like(seed, 1, 3, 3, size=8.0), tokens(seed, 8, 3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SeveralSolutionsWarning)
            u = solve_sequence(attention, e, selection="smallest_step")
        # Where J is nearly singular the residual may stop at the tolerance of 1000 epsilons.
        assert (attention.residual(u) - e).abs().max() < 1e-9
        solved += 1
    assert solved == 20


@pytest.mark.parametrize("rule", ["uniform", "smallest_step", "nearest_mean"])
def test_rules_choose_as_they_say(rule):
    attention, noise = folded()
    noise = (noise + 0.05 * torch.tensor([[0.0], [0.0], [1.0]])).expand(200, 3, 1)
    with pytest.warns(SeveralSolutionsWarning, match=rule):
        last = solve_sequence(attention, noise, selection=rule)[:, -1, 0]
    roots = torch.unique(last.round(decimals=6))
    # The roots of u - tanh(3 u) = 0.05 are near -0.93, -0.025 and 1.05.
    if rule == "uniform":
        assert len(roots) == 3
        counts = torch.tensor([int(((last - root).abs() < 1e-4).sum()) for root in roots])
        assert counts.min() > 35  # of 200, each with probability 1/3: five standard deviations
    else:
        assert len(roots) == 1
        assert abs(float(roots[0]) + 0.025) < 0.01


def test_bad_noise_and_rules_are_named():
    attention = attention_like(0)
    for noise, message in (
        (tokens(0, 4, 2), r"it must be \(\*batch, T, 3\)"),
        (tokens(0, 4, 3, dtype=torch.float32), "is torch.float32"),
        (torch.full((4, 3), float("nan"), dtype=torch.float64), "the noise is not finite"),
        (torch.zeros(3, dtype=torch.float64), r"has shape \(3,\)"),
    ):
        with pytest.raises(InputError, match=message):
            solve_sequence(attention, noise)
    with pytest.raises(InputError, match="selection is 'closest'; use one of 'unique', 'uniform'"):
        LatentAttention(attention, 1.0, 3, selection="closest")


def test_no_solution_raises():
    # Inclusive mask, W_V = W_O = I: the first token attends to itself, e_1 = 0 whatever u_1.
    attention = CausalAttention.from_qk_matrix(torch.tensor([[0.3]], dtype=torch.float64), mask="inclusive")
    with pytest.raises(NoSolutionError, match=r"position 0.*Under the inclusive mask a solution need not exist"):
        solve_sequence(attention, torch.ones(2, 1, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 2])
def test_short_sequences_are_shifted_noise(length):
    attention = attention_like(1)
    e = tokens(1, length, 3)
    u = solve_sequence(attention, e)
    torch.testing.assert_close(u[0], e[0] + attention.start)


def test_float32_solves_to_its_own_precision():
    attention, e = (
        attention_like(2, 2, 2, 3, 2, size=0.2, dtype=torch.float32),
        tokens(2, 4, 16, 3, dtype=torch.float32),
    )
    u = solve_sequence(attention, e)
    assert u.dtype == torch.float32
    # 1000 epsilons of a quantity of size about ten.
    assert (attention.residual(u) - e).abs().max() < 1e-3


def test_prefixes_do_not_depend_on_what_follows():
    law = LatentAttention(attention_like(3, size=0.2), 0.7, 20)
    e = law.base_dist.sample((2,))
    u = law.transform(e)
    torch.testing.assert_close(law.transform(e[:, :9]), u[:, :9], rtol=0, atol=1e-12)
