import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probattn import CausalAttention, log_barrier, regime, stability_margin, support_tokens
from probattn.barrier import penalty_and_margin, require_penalty
from probattn.errors import InputError
from probattn.solve.bound import contraction_bound
from probattn.solve.context import Context
from support import attention_like, dense_blocks, tokens

KINDS = ["logdet", "one_sided", "smooth", "spectral", "singular_value"]
MARGINS = ["determinant", "spectral", "complex", "singular_value"]
PAIR = torch.tensor([[1.0], [-1.0], [0.0]], dtype=torch.float64)  # past {+1, -1}, u = 0: J = 1 - a


def scalar(a):
    return CausalAttention.from_qk_matrix(torch.tensor([[a]], dtype=torch.float64))


class Blocks:
    """The least that a barrier asks of an attention: given blocks."""

    def __init__(self, change, core=None):
        self.change, self.given = change, core

    @property
    def dim(self):
        return self.change.shape[-1]

    def core(self, u):
        assert u is PAIR
        return self.change if self.given is None else self.given

    def mean_jacobian(self, u):
        assert u is PAIR
        return self.change


class TestInterface:
    """Barriers and margins take anything that has a core, blocks and a dimension."""

    change = torch.diag_embed(torch.tensor([[0.0, 0.5], [0.25, -1.0], [2.0, 3.0]], dtype=torch.float64))

    def test_margins_and_barriers_of_given_blocks(self):
        attention = Blocks(self.change)
        for kind, expected in {
            "determinant": [0.5, 1.5, 2.0],
            "spectral": [0.5, 0.75, -2.0],
            "complex": [0.5, 0.75, -2.0],
            "singular_value": [0.5, 0.75, 1.0],
        }.items():
            found = stability_margin(attention, PAIR, kind)
            assert found.tolist() == pytest.approx(expected), kind
        assert log_barrier(attention, PAIR).tolist() == pytest.approx([math.log(2), -math.log(1.5), -math.log(2)])
        spectral = log_barrier(attention, PAIR, "spectral").tolist()
        assert spectral == pytest.approx([math.log(2), -math.log(0.75), math.inf])
        gain = log_barrier(attention, PAIR, "singular_value").tolist()
        assert gain == pytest.approx([math.log(2), -math.log(0.75), 0.0])
        assert support_tokens(attention, PAIR, k=2, kind="spectral").positions.tolist() == [2, 0]

    def test_the_singular_value_is_that_of_the_blocks_and_the_rest_that_of_the_core(self):
        core = torch.tensor([0.1, 0.2, -0.3], dtype=torch.float64)[:, None, None]
        attention = Blocks(self.change, core)
        assert stability_margin(attention, PAIR, "determinant").tolist() == pytest.approx([0.9, 0.8, 1.3])
        # A core smaller than the block leaves the eigenvalue zero to it.
        for kind in ("spectral", "complex"):
            assert stability_margin(attention, PAIR, kind).tolist() == pytest.approx([0.9, 0.8, 1.0])
        assert stability_margin(attention, PAIR).tolist() == pytest.approx([0.5, 0.75, 1.0])
        assert log_barrier(attention, PAIR, "singular_value")[0] == pytest.approx(math.log(2))
        assert log_barrier(attention, PAIR, "one_sided").tolist() == pytest.approx([-math.log(0.9), -math.log(0.8), 0])

    def test_penalty_and_the_margin_that_it_guards(self):
        matrix = torch.tensor([[[0.5]], [[1.5]], [[-3.0]], [[-1.0]]], dtype=torch.float64)
        for kind in ("logdet", "one_sided", "smooth"):
            margin = penalty_and_margin(matrix, 1, kind)[1]
            assert margin.tolist() == pytest.approx([0.5, -0.5, 4.0, 2.0]), kind
        assert penalty_and_margin(matrix, 1, "spectral")[1].tolist() == pytest.approx([0.5, -0.5, 4.0, 2.0])
        assert penalty_and_margin(matrix, 1, "singular_value")[1].tolist() == pytest.approx([0.5, 0.5, 4.0, 2.0])

    def test_the_default_sharpness_is_ten(self):
        matrix = torch.tensor([[[0.5]], [[-1.0]]], dtype=torch.float64)
        literal = [math.log(2), -math.log(2)]
        expected = [math.log1p(math.exp(10 * value)) / 10 for value in literal]
        assert penalty_and_margin(matrix, 1, "smooth")[0].tolist() == pytest.approx(expected, rel=1e-12)
        attention = Blocks(matrix)
        assert log_barrier(attention, PAIR, "smooth").tolist() == pytest.approx(expected, rel=1e-12)
        assert require_penalty("smooth", 10.0) is None


class TestBarrier:
    @pytest.mark.parametrize(
        ("a", "expected"),
        [
            (0.5, dict.fromkeys(["logdet", "one_sided", "spectral", "singular_value"], math.log(2))),
            (-3.0, {"logdet": -math.log(4), "one_sided": 0.0, "spectral": 0.0, "singular_value": 0.0}),
            (
                1.5,
                {"logdet": math.log(2), "one_sided": math.log(2), "spectral": math.inf, "singular_value": math.log(2)},
            ),
            (3.0, {"logdet": -math.log(2), "one_sided": 0.0, "spectral": math.inf, "singular_value": 0.0}),
        ],
    )
    def test_known_values_on_both_sides_of_the_boundary(self, a, expected):
        for kind, value in expected.items():
            assert float(log_barrier(scalar(a), PAIR, kind)[-1]) == pytest.approx(value, abs=1e-14)

    def test_unbounded_below_with_zero_residual(self):
        for c in (1.0, 1e3, 1e6):
            assert float(log_barrier(scalar(-c), PAIR)[-1]) == pytest.approx(-math.log1p(c))
            assert float(scalar(-c).residual(PAIR)[-1]) == 0

    def test_smooth_lies_above_one_sided_by_at_most_log2_over_sharpness(self):
        attention, u = attention_like(0, heads=2, dim=4), tokens(0, 3, 9, 4)
        for sharpness in (1.0, 10.0, 1000.0):
            gap = log_barrier(attention, u, "smooth", sharpness=sharpness) - log_barrier(attention, u, "one_sided")
            assert (gap >= 0).all()
            assert (gap <= math.log(2) / sharpness + 1e-12).all()

    def test_infinite_exactly_on_the_boundary(self):
        for kind in KINDS:
            assert torch.isposinf(log_barrier(scalar(1.0), PAIR, kind)[-1])

    @pytest.mark.parametrize("kind", KINDS)
    def test_gradients(self, kind):
        u = tokens(1, 5, 3)

        def penalty(query, key):
            return log_barrier(CausalAttention(query, key), u, kind)

        attention = attention_like(1, size=0.4)
        inputs = (attention.query.clone().requires_grad_(), attention.key.clone().requires_grad_())
        assert torch.autograd.gradcheck(penalty, inputs)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_shape_and_dtype(self, kind, dtype):
        result = log_barrier(
            attention_like(2, heads=2, dtype=dtype, batch=(4, 1)), tokens(2, 5, 6, 3, dtype=dtype), kind
        )
        assert result.shape == (4, 5, 6)
        assert result.dtype == dtype

    def test_bad_arguments(self):
        with pytest.raises(InputError, match=r"^kind is 'log'; use one of 'logdet', 'one_sided'"):
            log_barrier(scalar(0.5), PAIR, "log")
        with pytest.raises(InputError, match=r"^sharpness is 0"):
            log_barrier(scalar(0.5), PAIR, "smooth", sharpness=0)


class TestMargins:
    @settings(max_examples=40)  # of five tokens each
    @given(seed=st.integers(0, 10**6), mask=st.sampled_from(["strict", "inclusive"]), heads=st.integers(1, 3))
    def test_each_by_its_definition_from_the_dense_block(self, seed, mask, heads):
        attention, u = attention_like(seed, heads, 2, 4, 2, mask), tokens(seed, 5, 4)
        block = dense_blocks(attention, u)
        margin = {kind: stability_margin(attention, u, kind) for kind in MARGINS}
        torch.testing.assert_close(margin["determinant"], torch.linalg.det(block), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(margin["singular_value"], torch.linalg.svdvals(block)[..., -1])
        rightmost = torch.linalg.eigvals(torch.eye(4) - block).real.amax(-1)
        torch.testing.assert_close(margin["complex"], 1 - rightmost, atol=1e-6, rtol=1e-6)
        assert (margin["complex"] <= margin["spectral"]).all()
        # A negative determinant has an odd number of negative eigenvalues: the spectral margin must see one.
        assert (margin["spectral"][margin["determinant"] < -1e-9] < 0).all()
        # And the path I - t M, t in [0, 1], meets no singular matrix where the margin is positive.
        path = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None, None, None]
        change = torch.eye(4) - block
        determinants = torch.linalg.det(torch.eye(4) - path * change)
        assert (determinants[:, margin["spectral"] > 1e-9] > 0).all()

    def test_two_folds_hide_from_the_determinant_but_not_from_the_spectrum(self):
        corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [0, 0]], dtype=torch.float64)
        attention = CausalAttention.from_qk_matrix(2.0 * torch.eye(2, dtype=torch.float64))
        assert float(stability_margin(attention, corners, "determinant")[-1]) == pytest.approx(1.0)
        assert float(stability_margin(attention, corners, "spectral")[-1]) == pytest.approx(-1.0)
        assert float(log_barrier(attention, corners)[-1]) == pytest.approx(0.0)

    def test_determinant_one_can_be_far_from_safe(self):
        corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [0, 0]], dtype=torch.float64)
        attention = CausalAttention.from_qk_matrix(torch.diag(torch.tensor([-9.0, 0.9])).double())  # J = diag(10, 0.1)
        assert float(stability_margin(attention, corners, "determinant")[-1]) == pytest.approx(1.0)
        assert float(stability_margin(attention, corners, "singular_value")[-1]) == pytest.approx(0.1)

    def test_spectral_margin_is_infinite_without_a_real_eigenvalue(self):
        corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [0, 0]], dtype=torch.float64)
        attention = CausalAttention.from_qk_matrix(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double())
        assert torch.isposinf(stability_margin(attention, corners, "spectral")[-1])
        assert log_barrier(attention, corners, "spectral")[-1] == 0

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_nan_stays_nan(self, kind, dtype):
        u = tokens(0, 2, 4, 2, dtype=dtype)
        u[1, 1, 0] = float("nan")
        penalty = log_barrier(CausalAttention.from_qk_matrix(0.5 * torch.eye(2, dtype=dtype)), u, kind)
        assert torch.isfinite(penalty[0]).all()
        assert penalty[1, 2:].isnan().all()

    @pytest.mark.parametrize("kind", MARGINS)
    @pytest.mark.parametrize("heads", [1, 3])
    def test_single_precision_agrees_with_double(self, kind, heads):
        attention, u = attention_like(7, heads, 3, 6, 4, batch=(40,), size=0.5), tokens(7, 40, 12, 6)
        expected = stability_margin(attention, u, kind)
        single = stability_margin(attention.to(torch.float32), u.float(), kind)
        assert single.dtype == torch.float32
        # 1e-3: eigenvalues of condition 1e3 are moved by that when the entries are rounded.
        torch.testing.assert_close(single, expected.float(), rtol=1e-3, atol=1e-3)

    def test_a_rotation_far_beyond_the_boundary_is_seen_by_the_complex_margin_alone(self):
        corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [0, 0]], dtype=torch.float64)
        matrix = torch.tensor([[3.0, 5.0], [-5.0, 3.0]], dtype=torch.float64)
        attention = CausalAttention.from_qk_matrix(matrix)
        found = {kind: float(stability_margin(attention, corners, kind)[-1]) for kind in MARGINS}
        assert found["complex"] == pytest.approx(-2.0)
        assert found["spectral"] == math.inf
        assert found["determinant"] == pytest.approx(29.0)  # |1 - 3 - 5i|^2
        assert found["singular_value"] == pytest.approx(29.0**0.5)
        # The relaxation du/dt = mu(u) + e - u leaves the solution at the rate 2; a step of Euler shows it.
        u = torch.tensor([1e-6, 0.0], dtype=torch.float64)
        step = corners[:4].T @ torch.softmax(corners[:4] @ attention.qk_matrix[0] @ u, 0) - u
        assert float(u @ step / u.square().sum()) == pytest.approx(2.0, rel=1e-4)

    @pytest.mark.parametrize("matrix", [[[3.0, 5.0], [-5.0, 3.0]], [[0.5, 0.2], [0.1, -0.3]]])
    def test_gradient_of_the_complex_margin(self, matrix):
        u = tokens(2, 6, 2)

        def margin(matrix):
            return stability_margin(CausalAttention.from_qk_matrix(matrix), u, "complex")

        assert torch.autograd.gradcheck(margin, torch.tensor(matrix, dtype=torch.float64, requires_grad=True))

    def test_kinds_are_named_when_one_is_wrong(self):
        with pytest.raises(
            InputError, match=r"^kind is 'sigma'; use one of 'determinant', 'spectral', 'complex', 'sing"
        ):
            stability_margin(scalar(0.5), PAIR, "sigma")

    @pytest.mark.parametrize("kind", MARGINS)
    def test_overflow_is_nan_not_a_crash(self, kind):
        u = tokens(0, 4, 2, dtype=torch.float32)
        u[2] = 1e25
        margin = stability_margin(CausalAttention.from_qk_matrix(0.5 * torch.eye(2)), u, kind)
        assert not torch.isfinite(margin[-1]) or margin[-1] == 1

    def test_a_defective_double_eigenvalue_is_real(self):
        turn, _ = torch.linalg.qr(tokens(3, 100, 2, 2))
        jordan = torch.tensor([[2.0, 1.0], [0.0, 2.0]]).double()
        corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1], [0, 0]], dtype=torch.float64)
        attention = CausalAttention.from_qk_matrix((turn @ jordan @ turn.mT).unsqueeze(1), heads=1)
        # sqrt(eps) is what rounding does to such an eigenvalue.
        assert (stability_margin(attention, corners, "spectral")[:, -1] + 1).abs().max() < 1e-6

    def test_not_finite_tokens_are_located(self):
        u = tokens(0, 2, 4, 3)
        u[1, 2, 0] = float("inf")
        with pytest.raises(InputError, match=r"^u is not finite: inf at index \(1, 2, 0\); 1 of 24"):
            stability_margin(attention_like(0), u)


class TestSupportTokens:
    def test_smallest_first_and_the_earlier_among_equals(self):
        attention, u = attention_like(3), tokens(3, 4, 12, 3)
        positions, margins = support_tokens(attention, u, k=12)
        everything = stability_margin(attention, u)
        torch.testing.assert_close(margins, everything.sort(-1).values)
        torch.testing.assert_close(everything.gather(-1, positions), margins)
        equal = support_tokens(scalar(0.0), PAIR, k=3)
        assert equal.positions.tolist() == [0, 1, 2]
        many = support_tokens(scalar(0.0), torch.zeros(500, 1, dtype=torch.float64), k=500)
        assert many.positions.tolist() == list(range(500))
        assert support_tokens(attention, u).positions.shape == (4, 5)
        assert torch.equal(support_tokens(attention, u, k=1).margins, margins[:, :1])

    def test_they_are_the_positions_of_largest_noise_gain(self):
        attention, u = attention_like(4, size=0.3), tokens(4, 8, 3)
        gain = torch.linalg.svdvals(torch.linalg.inv(dense_blocks(attention, u)))[..., 0]
        assert support_tokens(attention, u, k=3).positions.tolist() == gain.argsort(descending=True)[:3].tolist()

    @pytest.mark.parametrize("k", [0, 4])
    def test_k_out_of_range(self, k):
        with pytest.raises(InputError, match=f"k is {k}; it must lie between 1 and the 3 tokens"):
            support_tokens(scalar(0.5), PAIR, k=k)
        with pytest.raises(InputError, match=f"k is {k}; it must lie between 1 and the 3 tokens"):
            support_tokens(scalar(0.5), PAIR.expand(2, 3, 1), k=k)


def assert_witness(attention, u, found):
    past = Context.of(attention, u[: found.position])
    assert float(torch.linalg.det(past.mean_and_jacobian(found.witness)[1])) < 0


class TestRegime:
    @pytest.mark.parametrize(
        ("a", "name", "proved"), [(0.9, "certified", True), (1.1, "folded", True), (-5.0, "certified", True)]
    )
    def test_of_one_sequence(self, a, name, proved):
        found = regime(scalar(a), PAIR)
        assert (str(found), found.proved) == (name, proved)
        assert "position" in found.evidence

    def test_two_folds_under_a_positive_determinant_are_proved_by_a_witness(self):
        # Only the last token sees its past evenly; both eigenvalues of its J are negative.
        corners = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -2], [0, 0]], dtype=torch.float64)
        attention = CausalAttention.from_qk_matrix(2.0 * torch.eye(2, dtype=torch.float64))
        assert float(attention.logabsdet(corners)[0].min()) > 0
        found = regime(attention, corners)
        assert (str(found), found.proved) == ("folded", True)
        assert "found by search" in found.evidence
        assert_witness(attention, corners, found)

    def test_a_search_finds_what_the_sequence_does_not_show(self):
        # The last token is far out, where its past is one token; the fold is at the middle of the past.
        u = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [9.0, 9.0]], dtype=torch.float64)
        attention = CausalAttention.from_qk_matrix(1.5 * torch.eye(2, dtype=torch.float64))
        assert str(regime(attention, u)) == "regular"
        found = regime(attention, u, search=True)
        assert (str(found), found.proved) == ("folded", True)
        assert_witness(attention, u, found)
        opposite = CausalAttention.from_qk_matrix(-attention.qk_matrix, heads=1)  # expands everywhere
        found = regime(opposite, u, search=True).evidence
        assert re.search(r"no fold found at [\d,]+ points after (\d+) of \1 pasts, the budget", found)
        few = regime(opposite, u, search=True, budget=240).evidence
        assert re.search(r"no fold found at 240 points after 1 of \d+ pasts, the budget", few)

    def test_of_batches(self):
        attention = CausalAttention.from_qk_matrix(torch.tensor([0.9, 1.1]).double()[:, None, None, None], heads=1)
        assert [str(found) for found in regime(attention, PAIR)] == ["certified", "folded"]
        nested = regime(attention.expand((3, 2)), PAIR)
        assert [[str(found) for found in row] for row in nested] == [["certified", "folded"]] * 3

    def test_inclusive_mask_is_never_certified(self):
        assert (
            str(regime(attention_like(5, mask="inclusive", size=1e-6, value_dim=1), 0.1 * tokens(5, 6, 3)))
            != "certified"
        )

    @given(seed=st.integers(0, 10**6), heads=st.integers(1, 3), length=st.integers(2, 6))
    def test_the_bound_bounds_every_next_token(self, seed, heads, length):
        attention, u = attention_like(seed, heads, 2, 3, 2), tokens(seed, length, 3)
        bound = float(contraction_bound(attention, torch.cat([u, u[:1]]))[-1])
        candidates = 5 * tokens(seed + 1, 200, 3)
        jacobian = Context.of(attention, u).mean_and_jacobian(candidates)[1]
        norm = torch.linalg.matrix_norm(torch.eye(3) - jacobian, ord=2).max()
        assert float(norm) <= bound * (1 + 1e-9)
        assert bound == pytest.approx(float(Context.of(attention, u).contraction_bound()))

    def test_the_bound_of_several_attentions_at_one_sequence(self):
        matrices, u = tokens(0, 5, 2, 2, 2), tokens(1, 7, 2)  # five attentions of two heads, identity values
        bounds = contraction_bound(CausalAttention.from_qk_matrix(matrices, heads=2), u)
        alone = [contraction_bound(CausalAttention.from_qk_matrix(matrix, heads=2), u) for matrix in matrices]
        torch.testing.assert_close(bounds, torch.stack(alone), rtol=1e-14, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
    def test_a_fold_at_the_critical_tilt_is_never_certified(self, offset, dtype):
        # Past {c - 1, c + 1} and a token whose tilt is even there: J = 1 - a (with logits a u (c +- 1), even only at u
        # = 0).
        for excess in (1e-6, 1e-4, 1e-2):
            points = torch.tensor([offset - 1, offset + 1], dtype=dtype)
            spread = float(points[1].double() - points[0].double())
            a = (1 + excess) * 4 / spread**2
            attention = CausalAttention.from_qk_matrix(torch.tensor([[a]], dtype=dtype))
            u = torch.cat([points, points[:1]]).unsqueeze(-1)
            assert str(regime(attention, u)) != "certified"
        attention = CausalAttention.from_qk_matrix(torch.tensor([[0.5 * a]], dtype=dtype))
        assert str(regime(attention, u)) == "certified"

    def test_determinants_that_overflow_do_not_matter(self):
        attention = CausalAttention.from_qk_matrix(-8 * torch.eye(64))
        found = regime(attention, torch.cat([tokens(0, 400, 64, dtype=torch.float32), torch.zeros(1, 64)]))
        assert str(found) == "regular"

    def test_a_negative_determinant_proves_nothing_under_the_inclusive_mask(self):
        one = torch.ones(1, 1, 1).double()
        found = regime(CausalAttention(one, one, 2 * one, one, mask="inclusive"), one[0])  # e(u) = u - 2 u, one to one
        assert (str(found), found.proved) == ("folded", False)
        assert "proves no fold under the inclusive mask" in found.evidence

    @given(seed=st.integers(0, 10**6), share=st.floats(0.01, 0.999))
    def test_certified_means_no_fold_anywhere(self, seed, share):
        attention, u = attention_like(seed, 2, 2, 3, 2), 0.5 * tokens(seed, 5, 3)
        # The bound is linear in the query: of any attention this makes one that is certified, just so.
        query = attention.query * (share / contraction_bound(attention, u)[-1])
        attention = CausalAttention(query, attention.key, attention.value, attention.output, start=attention.start)
        assert str(regime(attention, u)) == "certified"
        candidates = torch.cat(
            [10 * tokens(seed + 1, 200, 3), 0.5 * tokens(seed + 2, 200, 3), tokens(seed, 200, 3) / 100]
        )
        for i in range(5):
            assert (torch.linalg.det(Context.of(attention, u[:i]).mean_and_jacobian(candidates)[1]) > 0).all()
