"""The next-token map against the attention of a whole sequence, automatic differentiation and a plain loop."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn.errors import InputError
from probattn.solve import bound
from probattn.solve.bound import contraction_bound
from probattn.solve.context import Context
from support import attention_like, tokens

MASKS = pytest.mark.parametrize("mask", ["strict", "inclusive"])


@MASKS
@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), heads=st.integers(1, 3), dim=st.integers(1, 4), length=st.integers(0, 6))
def test_the_next_token_of_a_sequence_is_its_last(mask, seed, heads, dim, length):
    attention, u = attention_like(seed, heads, 2, dim, 2, mask, size=0.5), tokens(seed, 3, length + 1, dim)
    mean, jacobian = Context.of(attention, u[:, :length]).mean_and_jacobian(u[:, length])
    torch.testing.assert_close(mean, attention.mean(u)[:, length], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(jacobian, attention.jacobian(u)[:, length], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(Context.of(attention, u[:, :length]).mean(u[:, length]), mean, rtol=1e-11, atol=1e-11)


@MASKS
def test_the_jacobian_is_that_of_automatic_differentiation(mask):
    attention, seen, u = attention_like(1, 2, 3, 3, 2, mask), tokens(1, 5, 3), tokens(2, 3)
    context = Context.of(attention, seen)
    expected = torch.eye(3) - torch.autograd.functional.jacobian(context.mean, u)
    torch.testing.assert_close(context.mean_and_jacobian(u)[1], expected, rtol=0, atol=1e-12)


@MASKS
def test_the_pull_back_is_that_of_automatic_differentiation(mask):
    attention, seen = attention_like(2, 2, 3, 3, 2, mask), tokens(3, 4, 5, 3).requires_grad_()
    u, w = tokens(4, 4, 3), tokens(5, 4, 3)
    mean = Context.of(attention, seen).mean(u)
    (expected,) = torch.autograd.grad((w * mean).sum(), seen)
    torch.testing.assert_close(Context.of(attention, seen.detach()).pull_back(u, w), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_many_candidates_are_evaluated_as_one_by_one(offset):
    """Side by side, candidates go through products of moments, which far from the origin would lose the covariance."""
    attention, seen = attention_like(17, 2, 2, 3, 2, size=0.3 if offset == 0 else 1e-4), tokens(17, 2, 9, 3)
    seen[..., 1:, :] += offset
    context, rows = Context.of(attention, seen), tokens(18, 5, 2, 3) + offset
    mean, jacobian = context.mean_and_jacobian(rows)
    for row, u in enumerate(rows):
        one = context.mean_and_jacobian(u)
        torch.testing.assert_close(mean[row], one[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(jacobian[row], one[1], rtol=1e-8, atol=1e-8)


@MASKS
def test_candidates_with_pasts_of_their_own(mask):
    attention, u = attention_like(6, 2, 2, 3, 2, mask, size=0.5), tokens(6, 2, 9, 3)
    visible = torch.ones(4, 9, dtype=torch.bool).tril(5)  # pasts of 6, 7, 8, 9 tokens
    context = replace(Context.of(attention, u), visible=visible)
    candidates = tokens(7, 3, 4, 2, 3)  # three starts, four rows, a batch of two
    mean, jacobian = context.mean_and_jacobian(candidates)
    torch.testing.assert_close(context.mean(candidates), mean, rtol=1e-11, atol=1e-11)
    index = (torch.tensor([0, 3, 2]), torch.tensor([1, 0, 1]))
    chosen = context.select(index, torch.Size([4, 2])).mean_and_jacobian(candidates[0][index])
    for row in range(4):
        alone = Context.of(attention, u[:, : 6 + row]).mean_and_jacobian(candidates[:, row])
        torch.testing.assert_close(mean[:, row], alone[0], rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(jacobian[:, row], alone[1], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(chosen[0], mean[0][index], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(chosen[1], jacobian[0][index], rtol=1e-10, atol=1e-10)


def test_extending_is_building_anew():
    attention, u = attention_like(8, 2, 2, 3, 2, batch=(2,)), tokens(8, 2, 6, 3)
    context = Context.of(attention, u[:, :2])
    for i in range(2, 6):
        context = context.extend(u[:, i])
    whole = Context.of(attention, u)
    for name in ("values", "keys", "largest"):
        torch.testing.assert_close(getattr(context, name), getattr(whole, name), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(context.diameters, whole.diameters, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(context.contraction_bound(), whole.contraction_bound(), rtol=1e-12, atol=0)
    bounds = contraction_bound(attention, torch.cat([u, u[:, :1]], dim=1))
    torch.testing.assert_close(bounds[:, -1], whole.contraction_bound(), rtol=1e-12, atol=0)
    assert whole.first(3).length == 3


def test_the_cumulants_on_a_line_are_derivatives_of_the_mean():
    attention, seen = attention_like(9, 3, 1, 1, 1, size=1.0), tokens(9, 6, 1)
    context, u = Context.of(attention, seen), torch.tensor([0.3], dtype=torch.float64)
    mean, first, second = context.line_cumulants(u)
    torch.testing.assert_close(mean.sum(-1, keepdim=True), context.mean(u), rtol=0, atol=1e-12)

    slope = torch.autograd.functional.jacobian(context.mean, u).squeeze()
    torch.testing.assert_close(first.sum(), slope, rtol=0, atol=1e-12)
    (expected,) = torch.autograd.functional.jacobian(lambda x: context.line_cumulants(x)[1].sum(), u)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-11)


class TestBound:
    def test_rounding_never_makes_it_too_small(self, monkeypatch):
        """Single precision against double on tokens that share a large offset; without the allowance it fails."""

        def too_small():
            count = 0
            for seed in range(60):
                attention = attention_like(seed, 2, 3, 3, 2, size=0.3, dtype=torch.float32)
                u = tokens(seed, 6, 3, dtype=torch.float32) + 3e3
                exact = contraction_bound(attention.to(torch.float64), u.double())
                for found in (contraction_bound(attention, u)[-1], Context.of(attention, u[:5]).contraction_bound()):
                    count += float(found) < float(exact[-1])
            return count

        assert too_small() == 0
        none = torch.zeros(2), torch.zeros(2)
        monkeypatch.setattr(bound, "projection_slack", lambda attention: none)
        monkeypatch.setattr("probattn.solve.context.projection_slack", lambda attention: none)
        assert too_small() > 10

    @settings(max_examples=40)
    @given(seed=st.integers(0, 10**6), heads=st.integers(1, 3), dim=st.integers(1, 4), size=st.floats(0.01, 2))
    def test_it_is_an_upper_bound(self, seed, heads, dim, size):
        attention, seen = attention_like(seed, heads, 2, dim, 2, size=size), tokens(seed, 5, dim)
        context, candidates = Context.of(attention, seen), 5 * tokens(seed + 1, 200, dim)
        change = torch.eye(dim) - context.mean_and_jacobian(candidates)[1]
        assert float(torch.linalg.matrix_norm(change, 2).max()) <= float(context.contraction_bound()) * (1 + 1e-12)

    def test_two_tokens_attain_it(self):
        from probattn import CausalAttention

        attention = CausalAttention.from_qk_matrix(torch.tensor([[0.7]], dtype=torch.float64))
        context = Context.of(attention, torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
        jacobian = context.mean_and_jacobian(torch.zeros(1, dtype=torch.float64))[1]
        assert 1 - float(jacobian) == pytest.approx(float(context.contraction_bound()), rel=1e-12)


def test_other_tokens_are_refused():
    with pytest.raises(InputError, match="p = 3"):
        Context.of(attention_like(0), torch.zeros(2, 2).double())


@pytest.mark.parametrize("distances", [1, 40, 1 << 22])
@given(seed=st.integers(0, 10**6), dim=st.integers(1, 4), count=st.integers(0, 9), seen=st.integers(0, 9))
@settings(max_examples=20)
def test_diameters_are_the_largest_distances_so_far_however_few_exist_at_a_time(distances, seed, dim, count, seen):
    points, seen = tokens(seed, 2, count, dim), min(seen, count)

    def diameter(number):
        pairs = [(points[:, i] - points[:, j]).norm(dim=-1) for i in range(number) for j in range(i)]
        return torch.stack(pairs).amax(0) if pairs else points.new_zeros(2)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bound, "_DISTANCES", distances)
        found = bound.running_diameters(points, diameter(seen), seen)
    expected = torch.stack([diameter(number) for number in range(seen, count + 1)])
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
