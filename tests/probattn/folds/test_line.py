import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn import CausalAttention, regime
from probattn.errors import InputError
from probattn.folds.line import largest_sensitivity, turning_points
from probattn.folds.search import find_fold
from probattn.models.scalar import scalar_attention
from probattn.solve.context import Context
from support import attention_like, tokens

GRID = torch.linspace(-40, 40, 20_001, dtype=torch.float64).unsqueeze(-1)


@settings(max_examples=150)
@given(seed=st.integers(0, 10**6), heads=st.integers(1, 3), length=st.integers(2, 8), size=st.floats(0.1, 5))
def test_the_bracket_encloses_what_a_grid_sees(seed, heads, length, size):
    past = Context.of(attention_like(seed, heads, 1, 1, 1, size=size), tokens(seed, length, 1))
    bracket = largest_sensitivity(past)
    seen = float((1 - past.mean_and_jacobian(GRID)[1]).max())
    assert seen <= bracket.upper + 1e-9 or bracket.lower > 1  # above the threshold the search stops
    assert bracket.lower <= bracket.upper
    if bracket.lower > 0:
        attained = 1 - past.mean_and_jacobian(torch.tensor([bracket.at]).double())[1]
        assert float(attained) == pytest.approx(bracket.lower)
    assert (bracket.lower > 1) >= (seen > 1)


@pytest.mark.parametrize("excess", [-1e-6, -1e-9, 1e-9, 1e-6])
def test_decided_next_to_the_boundary(excess):
    past = Context.of(scalar_attention(1 + excess), torch.tensor([[-1.0], [1.0]]).double())
    bracket = largest_sensitivity(past)
    assert (bracket.lower > 1, bracket.upper < 1) == (excess > 0, excess < 0)


@settings(max_examples=100)
@given(seed=st.integers(0, 10**6), heads=st.integers(1, 3), length=st.integers(2, 8), size=st.floats(0.1, 5))
def test_turning_points_are_all_the_zeros_of_the_jacobian(seed, heads, length, size):
    past = Context.of(attention_like(seed, heads, 1, 1, 1, size=size), 2 * tokens(seed, length, 1))
    points = turning_points(past)
    slope = past.mean_and_jacobian(GRID)[1].flatten()
    seen = int((slope[1:] * slope[:-1] < 0).sum())
    inside = points[points.abs() < 40]
    assert len(points) % 2 == 0
    assert len(inside) >= seen
    if len(points):
        at = past.mean_and_jacobian(points.unsqueeze(-1))[1].flatten()
        assert at.abs().max() < 1e-9 * (1 + slope.abs().max())
        sides = torch.stack([points - 1e-6, points + 1e-6]).unsqueeze(-1)
        before, after = past.mean_and_jacobian(sides)[1].flatten(1)
        assert (before * after < 0).all()


def test_a_narrow_fold_is_not_overlooked():
    # Just beyond the boundary the two turning points are 6e-4 apart.
    points = turning_points(Context.of(scalar_attention(1 + 1e-7), torch.tensor([[-1.0], [1.0]]).double()))
    assert len(points) == 2
    assert float(points[1] - points[0]) == pytest.approx(2 * (1e-7) ** 0.5, rel=1e-3)


def test_a_tail_of_nearly_equal_tokens_is_searched_to_its_end():
    past = Context.of(scalar_attention(-1.0), torch.tensor([[0.0], [1.0], [1.0 + 1e-5]]).double())
    bracket = largest_sensitivity(past)
    assert bracket.upper < 1
    assert bracket.lower == 0


@pytest.mark.parametrize("dim", [2, 4])
def test_search_agrees_with_brute_force(dim):
    found = folded = 0
    for seed in range(60):
        past = Context.of(attention_like(seed, 1, dim, dim, size=0.8), tokens(seed, 6, dim))
        candidates = torch.cat([1.5 * tokens(seed, 4000, dim), 0.5 * tokens(seed + 1, 4000, dim)])
        if bool((torch.linalg.det(past.mean_and_jacobian(candidates)[1]) < 0).any()):
            folded += 1
            witness = find_fold(past)
            if witness is not None:
                found += 1
                assert float(torch.linalg.det(past.mean_and_jacobian(witness)[1])) < 0
    assert folded > 10
    assert found >= 0.99 * folded


def test_the_search_leaves_the_random_state_alone_and_does_not_depend_on_it():
    corners = torch.tensor([[1.0, 0.2], [-1.0, -0.2], [0.1, 1.0]]).double()
    past = Context.of(CausalAttention.from_qk_matrix(3 * torch.eye(2).double()), corners)
    witnesses, states = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        witnesses.append(find_fold(past))
        states.append(torch.equal(torch.get_rng_state(), before))
    assert witnesses[0] is not None
    assert torch.equal(*witnesses)
    assert all(states)


def test_search_says_none_where_a_contraction_certifies():
    past = Context.of(attention_like(0, 2, 2, 3, 2, size=0.01), 0.3 * tokens(0, 5, 3))
    assert float(past.contraction_bound()) < 1
    assert find_fold(past) is None


@settings(max_examples=200)
@given(seed=st.integers(0, 10**7), length=st.integers(3, 8), a=st.floats(-6, 6))
def test_regime_on_a_line_is_right(seed, length, a):
    u = tokens(seed, length, 1)
    found = regime(scalar_attention(a), u)
    folds = [
        bool((Context.of(scalar_attention(a), u[:i]).mean_and_jacobian(GRID)[1] < 0).any()) for i in range(2, length)
    ]
    if any(folds):
        assert str(found) == "folded"
        assert found.proved
        past = Context.of(scalar_attention(a), u[: found.position])
        assert float(past.mean_and_jacobian(found.witness.unsqueeze(0))[1]) < 0
    if str(found) == "certified":
        assert not any(folds)


@pytest.mark.slow
def test_regime_never_certifies_a_fold_over_ten_thousand_pasts():
    wrong = missed = folded = 0
    for seed in range(10_000):
        generator = torch.Generator().manual_seed(seed)
        length = int(torch.randint(2, 9, (1,), generator=generator))
        u = torch.randn(length + 1, 1, generator=generator, dtype=torch.float64)
        attention = scalar_attention(float(4 * torch.rand(1, generator=generator)))
        fold = bool((Context.of(attention, u[:length]).mean_and_jacobian(GRID[8000:12_001:4])[1] < 0).any())
        found = regime(attention, u)
        wrong += fold and str(found) == "certified"
        folded += fold
        missed += fold and found.witness is None
    assert folded > 1000
    assert wrong == 0
    assert missed <= 0.01 * folded


def test_regime_looks_at_the_pasts_of_its_tokens_and_no_further():
    u = torch.tensor([[-1.0], [0.0], [1.0], [5.0], [0.0]]).double()
    attention = scalar_attention(1.2)
    # After three tokens the contraction bound is 1.2 and the exact supremum below one; after the fourth it folds.
    assert str(regime(attention, u[:4])) == "certified"
    assert str(regime(attention, u)) == "folded"
    assert regime(attention, u).position == 4


def test_bad_pasts():
    flat = Context.of(attention_like(0), tokens(0, 4, 3))
    with pytest.raises(InputError, match="largest_sensitivity needs one-dimensional tokens"):
        largest_sensitivity(flat)
    with pytest.raises(InputError, match="turning_points needs"):
        turning_points(flat)
    with pytest.raises(InputError, match="without batch axes"):
        find_fold(Context.of(attention_like(0), tokens(0, 2, 4, 3)))
