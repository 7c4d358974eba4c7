"""All solutions on a line: none missed, none invented, whatever the past, the batch and the sharpness."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn import AttentionProcess, CausalAttention
from probattn.errors import InputError
from probattn.models.scalar import scalar_attention
from probattn.solve.context import Context
from probattn.solve.line import Slopes, line_range, line_roots
from probattn.solve.token import find_roots, find_token, solve_token
from support import attention_like, tokens


def residual(context, u, noise):
    return u - context.mean(u.unsqueeze(-1)).squeeze(-1) - noise


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    heads=st.integers(1, 3),
    length=st.integers(2, 9),
    size=st.floats(0.1, 30),
    noise=st.floats(-4, 4),
)
def test_as_many_as_a_fine_grid_sees(seed, heads, length, size, noise):
    context = Context.of(attention_like(seed, heads, 1, 1, 1, size=size), tokens(seed, length, 1))
    found = line_roots(context, torch.tensor([noise], dtype=torch.float64)).flatten()
    low, high, _ = line_range(context)
    grid = torch.linspace(noise + float(low) - 1, noise + float(high) + 1, 40_001, dtype=torch.float64)
    values = residual(context, grid, noise)
    seen = int((values[1:] * values[:-1] < 0).sum())
    assert len(found) >= seen
    assert len(found) % 2 == 1
    assert (found.diff() > 0).all()
    # A bracket of one ulp, times the slope of the residual there.
    steep = 1 + context.line_cumulants(found.unsqueeze(-1))[1].abs().sum(-1)
    assert (residual(context, found, noise).abs() <= 1e-13 * steep * (1 + found.abs() + abs(noise))).all()


def test_without_the_bounds_on_the_slope_solutions_are_missed(monkeypatch):
    """The control: brackets that are called monotone too early hold three solutions and give one."""
    context = Context.of(scalar_attention(3.0), torch.tensor([[-1.0], [1.0]]).double())
    noise = torch.tensor([0.05]).double()
    assert len(line_roots(context, noise)) == 3
    over = Slopes.over

    def careless(*arguments):
        return over(*arguments)._replace(upper=torch.tensor(0.0), lower=torch.tensor(0.0))

    monkeypatch.setattr(Slopes, "over", careless)
    assert len(line_roots(context, noise)) == 1


def test_sharp_weights_need_few_intervals():
    """Keys and values so large that a grid of 1 / diameter would be 1e12 intervals; weights underflow between."""
    seen = 1e6 * tokens(3, 20, 1)
    found = line_roots(Context.of(scalar_attention(1.0), seen), torch.tensor([0.3]).double()).flatten()
    # For u > 0 the weights are on the largest token, for u < 0 on the smallest; the third solution lies between.
    assert len(found) == 3
    assert float(found[0]) == pytest.approx(float(seen.min()) + 0.3, rel=1e-12)
    assert float(found[2]) == pytest.approx(float(seen.max()) + 0.3, rel=1e-12)
    assert abs(float(found[1])) < 1e-5


def test_a_batch_with_pasts_and_noise_of_its_own():
    attention = CausalAttention.from_qk_matrix(torch.tensor([1.0, 3.0]).double().view(2, 1, 1, 1), heads=1)
    context = Context.of(attention, tokens(1, 3, 1, 6, 1))  # batch (3, 2)
    noise = tokens(2, 4, 3, 2, 1)
    found = line_roots(context, noise)
    assert found.shape[1:] == (4, 3, 2, 1)
    for i in range(3):
        for j in range(2):
            alone = Context.of(attention.select(j), tokens(1, 3, 1, 6, 1)[i, 0])
            for k in range(4):
                expected = line_roots(alone, noise[k, i, j]).flatten()
                got = found[:, k, i, j, 0]
                torch.testing.assert_close(got[: len(expected)], expected, rtol=1e-12, atol=1e-12)
                assert got[len(expected) :].isnan().all()


def test_candidates_with_pasts_of_their_own():
    attention, u = scalar_attention(2.5), tokens(4, 2, 8, 1)
    context = replace(Context.of(attention, u), visible=torch.ones(3, 8, dtype=torch.bool).tril(5))  # 6, 7, 8 tokens
    noise = tokens(5, 3, 2, 1)
    found = line_roots(context, noise)
    for row, length in enumerate((6, 7, 8)):
        expected = line_roots(Context.of(attention, u[:, :length]), noise[row])
        torch.testing.assert_close(found[: len(expected), row], expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_next_to_a_fold():
    """e(u) = u - tanh(a u) turns at +-u*; noise just inside of the fold has three solutions, just outside one."""
    a = 3.0
    turn = np.arccosh(a**0.5) / a
    edge = float(np.tanh(a * turn) - turn)
    context = Context.of(scalar_attention(a), torch.tensor([[-1.0], [1.0]]).double())
    for shift, count in ((-1e-9, 3), (1e-9, 1)):
        assert len(line_roots(context, torch.tensor([edge + shift], dtype=torch.float64))) == count


def test_single_precision_is_solved_in_double():
    attention = scalar_attention(3.0)
    u = torch.tensor([[-1.0], [1.0]])
    found = line_roots(Context.of(attention.to(torch.float32), u), torch.tensor([0.05]))
    assert found.dtype == torch.float32
    expected = line_roots(Context.of(attention, u.double()), torch.tensor([0.05]).double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_other_pasts_are_refused():
    for attention in (attention_like(0), scalar_attention(1.0, mask="inclusive")):
        context = Context.of(attention, tokens(0, 4, attention.dim))
        with pytest.raises(InputError, match="for one-dimensional tokens under the strict mask only"):
            line_roots(context, torch.zeros(attention.dim).double())


class TestOneRuleForPathsAndConditionals:
    @pytest.mark.parametrize("rule", ["smallest_step", "nearest_mean"])
    def test_a_path_takes_the_root_that_the_conditional_takes(self, rule):
        process = AttentionProcess(scalar_attention(2.5), 1.0, selection=rule)
        chosen = 0
        for seed in range(10):
            path, noise = process.path(seed), process.noise(seed, 0)
            for n in range(2, 7):
                context = Context.of(process.attention, path[0:n])
                roots = find_roots(context, noise[n])
                chosen += len(roots) > 1
                taken, several = solve_token(context, noise[n], rule, n)
                assert bool(several) == (len(roots) > 1)
                aim = noise[n] if rule == "smallest_step" else path[0:n].mean(0)
                nearest = roots[(roots - aim).abs().squeeze(-1).argmin()]
                torch.testing.assert_close(path[n], nearest, rtol=1e-10, atol=1e-10)
                torch.testing.assert_close(taken, nearest, rtol=1e-10, atol=1e-10)
        assert chosen > 2  # where nothing folds there is nothing to choose

    def test_a_random_choice_is_a_function_of_seed_and_position(self):
        process = AttentionProcess(scalar_attention(2.0), 1.0, selection="uniform")
        torch.manual_seed(0)
        first = process.path(3)[0:12]
        torch.manual_seed(1)
        assert torch.equal(process.path(3)[0:12], first)
        assert not torch.equal(process.path(4)[0:12], first)

    def test_uniform_counts_each_solution_once(self):
        # Three solutions; the search of several dimensions would meet the outer ones from many starts.
        context = Context.of(scalar_attention(3.0), torch.tensor([[-1.0], [1.0]]).double())
        share = (torch.arange(300, dtype=torch.float64) + 0.5) / 300
        found = find_token(context, torch.full((300, 1), 0.05).double(), "uniform", share)
        counts = found.u.round(decimals=6).unique(return_counts=True)[1]
        assert counts.tolist() == [100, 100, 100]
        flat = CausalAttention.from_qk_matrix(torch.diag(torch.tensor([3.0, 0.0])).double())
        context = Context.of(flat, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]).double())
        noise = torch.tensor([0.05, 0.1]).double().expand(300, 2)
        found = find_token(context, noise, "uniform", share)
        assert found.u[:, 0].round(decimals=6).unique(return_counts=True)[1].tolist() == [100, 100, 100]
