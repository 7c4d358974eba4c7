"""Published numbers: closed forms against the package's attention, bounds against enumeration, and wrong versions."""

import math

import numpy as np
import pytest
import torch
from layer_zoo import tiny

from probattn.attention import CausalAttention
from probattn.errors import InputError
from probattn.hf.layers import attention_layer
from probattn.inference.studies.published import gaussian, lengths
from probattn.inference.studies.published.comparisons import (
    compare_critical,
    compare_gaussian,
    compare_growth,
    compare_selectivity,
    compare_sensitivity,
    finite_size_error,
)
from probattn.inference.studies.published.critical import measure_transition, sign_change, tokens_of_cosine
from probattn.inference.studies.published.long_context import measure_selectivity, selective_scale
from probattn.inference.studies.published.record import Comparison, Estimate, estimate, power_fit
from probattn.inference.studies.published.results import GrowthResults
from probattn.inference.studies.published.sensitivity import LocalBound, measure_local_bound, softmax_norm, theta


class TestCritical:
    @pytest.mark.parametrize("cosine", [0.0, 0.5, 0.9])
    def test_the_finite_form_is_that_of_the_attention(self, cosine):
        found = measure_transition(24, cosine)
        assert finite_size_error([found]) < 1e-7
        assert found.peak >= found.covariance
        assert 1 < found.peak_at < 1.3

    def test_the_determinant_of_the_whole_sequence_changes_sign_there(self):
        u, identity = tokens_of_cosine(16, 0.3), torch.eye(16, dtype=torch.float64).unsqueeze(0)
        for factor, sign in ((0.999, 1), (1.001, -1)):
            scale = factor * sign_change(16) / 0.7 * math.log(16)
            attention = CausalAttention(identity, identity, scale=scale, mask="inclusive")
            assert int(attention.logabsdet(u)[0][-1]) == sign

    def test_tokens_of_another_kind_have_another_place(self):
        """The negative control: with one pair of opposite tokens the closed form is wrong."""
        u = tokens_of_cosine(16, 0.3)
        u[0] = -u[-1]
        identity = torch.eye(16, dtype=torch.float64).unsqueeze(0)
        scale = 0.98 * sign_change(16) / 0.7 * math.log(16)
        attention = CausalAttention(identity, identity, scale=scale, mask="inclusive")
        assert int(attention.logabsdet(u)[0][-1]) == -1

    @pytest.mark.parametrize("cosine", [-0.1, 1.0])
    def test_cosines_that_no_tokens_have_are_refused(self, cosine):
        with pytest.raises(InputError, match="cosine"):
            tokens_of_cosine(4, cosine)


class TestLongContexts:
    def test_the_scale_is_that_of_the_weights(self):
        keys = torch.randn(3, 20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        keys = keys / keys.norm(dim=-1, keepdim=True)
        beta = selective_scale(keys)
        query = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        weights = torch.softmax(beta.unsqueeze(-1) * (keys @ query), -1)
        torch.testing.assert_close(weights.amax(-1), torch.full((3,), 0.5, dtype=torch.float64), atol=1e-6, rtol=0)

    def test_keys_in_the_ball_have_another_exponent(self):
        sizes = [64, 128, 256, 512]
        assert measure_selectivity(3, sizes, 60).plain.holds(1.0)
        control = measure_selectivity(3, sizes, 60, ball=True).plain
        assert control.high < 0.9


class TestGaussianPasts:
    def test_the_error_is_the_predicted_one_and_not_without_its_factor(self):
        ratio = gaussian.measure_deviation(1600, 0.5, pasts=2000).ratio
        assert abs(ratio.value - 1) < ratio.high - ratio.low
        assert math.exp(0.5) * 1.5 - 1 > 2 * (ratio.high - ratio.low)  # a prediction of V / n would be seen

    def test_symmetric_pasts_have_the_second_moment_and_the_bias_of_the_closed_form(self):
        v, n, b = 1 / 3, 400, 1.2
        generator = torch.Generator().manual_seed(3)
        half = math.sqrt(v) * torch.randn(20_000, n // 2, generator=generator, dtype=torch.float64)
        exact = (half * (b * half).sinh()).sum(-1) / (b * half).cosh().sum(-1) - b * v
        grown, shrunk = math.exp(b * b * v), math.exp(-b * b * v)
        square = grown * (v + (b * v) ** 2) - shrunk * (v - (b * v) ** 2)
        assert float(exact.square().mean()) * n == pytest.approx(square, rel=0.05)
        noise = float(exact.std()) / math.sqrt(20_000) * n
        assert abs(float(exact.mean()) * n + b * v * (grown - shrunk)) < 4 * noise

    def test_the_excess_is_that_of_quadrature(self):
        v = 0.3
        points, weights = np.polynomial.hermite_e.hermegauss(120)
        u, weights = math.sqrt(v) * points, weights / weights.sum()
        grown, shrunk = np.exp(u * u * v), np.exp(-u * u * v)
        bias = -u * v * (grown - shrunk)
        square = grown * (v + (u * v) ** 2) - shrunk * (v - (u * v) ** 2)
        gain = 1 / (1 - v)
        expected = 2 * gain * (weights * u * bias).sum() + gain**2 * (weights * u * u * square).sum() / v
        assert gaussian._excess(v) == pytest.approx(expected, rel=1e-6)

    def test_the_boundary_tends_to_its_limit_from_below(self):
        found = [gaussian.boundary_at(n) for n in (50, 500, 5000)]
        assert found == sorted(found)
        assert 0 < 4 / 27 - found[-1] < 1e-4
        with pytest.raises(InputError, match="length"):
            gaussian.boundary_at(3)


class TestSensitivity:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_it_is_the_norm_of_the_softmax(self, dtype):
        weights = torch.rand(40, 8, generator=torch.Generator().manual_seed(0), dtype=dtype) ** 3
        weights = weights / weights.sum(-1, keepdim=True)
        torch.testing.assert_close(theta(weights), softmax_norm(weights))

    def test_tiny_weights_keep_their_digits(self):
        weights = torch.tensor([1 - 1e-30, 1e-30], dtype=torch.float64)
        assert float(theta(weights)) == pytest.approx(4e-30, rel=1e-12)

    @pytest.mark.parametrize("strength", [0.1, 1.0, 3.0])
    def test_the_bound_holds_and_a_wrong_one_does_not(self, strength):
        for dim, clusters in ((1, True), (1, False), (4, False)):
            found = measure_local_bound(strength, dim=dim, clusters=clusters, sequences=60)
            assert found.largest <= 1 + 1e-9
            assert found.sharper >= 1
        wrong = measure_local_bound(strength, dim=1, clusters=True, sequences=60)
        assert wrong.control > 1.1
        assert wrong.largest > 0.8  # nearly attained

    def test_two_tokens_attain_it(self):
        assert measure_local_bound(1.0, length=2, dim=1).largest == pytest.approx(1.0, abs=1e-9)

    def test_too_many_weights_are_refused(self):
        with pytest.raises(InputError, match="17 weights"):
            theta(torch.full((17,), 1 / 17))


@pytest.fixture(scope="module")
def model():
    return tiny("llama")


@pytest.fixture(scope="module")
def ids(model):
    return torch.randint(model.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))


class TestGrowth:
    def test_norms_are_those_of_dense_jacobians(self, model, ids):
        layer = attention_layer(model, 0).detach()
        u = torch.randn(6, layer.dim, generator=torch.Generator().manual_seed(1), dtype=layer.dtype)
        with torch.no_grad():
            dense = torch.func.jacrev(layer.mean)(u).flatten(2).flatten(0, 1)
            assert lengths.jacobian_norm(layer.mean, u) == pytest.approx(
                float(torch.linalg.matrix_norm(dense, 2)), rel=0.02
            )
            expected = torch.linalg.matrix_norm(layer.mean_jacobian(u), 2)
            torch.testing.assert_close(lengths.block_norms(layer, u, rounds=200), expected, rtol=0.01, atol=1e-6)
            inner = lengths.without_norm(layer)
            torch.testing.assert_close(inner.mean(layer.sublayer.norm(u)), layer.mean(u))

    def test_a_longer_text_has_no_smaller_norm_and_comes_back_from_json(self, model, ids):
        (found,) = lengths.measure_growth(model, ids, [1], [3, 6, 12])
        for name in ("normed", "held", "stream"):
            values = getattr(found, name)
            assert (values[:, 1:] >= 0.98 * values[:, :-1]).all()
        # Fewer columns, and rows that go with them.
        assert (found.held <= 1.02 * found.normed).all()
        again = GrowthResults.from_dict(GrowthResults([found], {"a": 1}).as_dict()).layers[0]
        assert again.exponent("blocks") == found.exponent("blocks")

    def test_texts_that_are_too_few_or_too_short_are_refused(self, model, ids):
        with pytest.raises(InputError, match="texts is 1"):
            lengths.measure_growth(model, ids[:1], [0], [2, 4])
        with pytest.raises(InputError, match="12 tokens"):
            lengths.measure_growth(model, ids, [0], [4, 16])

    def test_a_map_without_a_slope_has_norm_zero(self):
        assert lengths.jacobian_norm(lambda x: 0 * x, torch.ones(3)) == 0.0


class TestComparisons:
    """Each rule accepts what is right and refuses what is not."""

    def test_exact_places(self):
        found = measure_transition(16)
        assert all(one.agrees for one in compare_critical([found]))
        assert not any(one.agrees for one in compare_critical([found._replace(sign_at=found.sign_at + 1e-3)]))

    def test_exponents(self):
        sizes = [64, 128, 256, 512]
        right = measure_selectivity(5, sizes, 40)
        assert compare_selectivity([right])[0].agrees
        wrong = right._replace(plain=Estimate(0.7, 0.65, 0.75))
        assert not compare_selectivity([wrong])[0].agrees

    def test_ratios_and_the_boundary(self):
        good = gaussian.Deviation(100, 1.0, Estimate(1.05, 0.95, 1.15))
        bad = good._replace(ratio=Estimate(1.5, 1.4, 1.6))
        boundary = Estimate(0.148, 0.146, 0.150)
        assert [one.agrees for one in compare_gaussian([good, bad], boundary)] == [True, False, True]
        assert not compare_gaussian([], Estimate(0.155, 0.154, 0.156))[0].agrees

    def test_the_bound(self):
        fine = LocalBound(0.9, 1.0, 2.0, 1.5)
        assert [one.agrees for one in compare_sensitivity([fine])] == [True, True]
        assert [one.agrees for one in compare_sensitivity([fine._replace(largest=1.01)])] == [True, False]

    @pytest.mark.parametrize(("power", "agrees"), [(0.25, True), (0.05, False), (0.5, False), (0.7, False)])
    def test_growth(self, power, agrees):
        sizes = np.array([16.0, 64.0, 256.0])
        values = np.stack([sizes**power, 2 * sizes ** (power + 0.01)])
        found = compare_growth([lengths.Growth(0, sizes, values, values, values, values)])[0]
        assert found.agrees == agrees
        assert found.ours.value == pytest.approx(power + 0.005)


def test_intervals_and_fits():
    draws = np.random.default_rng(0).normal(2.0, 1.0, 400)
    found = estimate(draws)
    assert found.holds(2.0)
    assert not found.holds(math.nan)
    with pytest.raises(InputError, match="two draws"):
        estimate([1.0])
    n = np.array([8.0, 16, 32, 64, 128])
    curved = 3 * n**0.4 * np.exp(2 / n)
    assert float(power_fit(n, curved, 1.0)) == pytest.approx(0.4)
    assert abs(float(power_fit(n, curved)) - 0.4) > 0.02
    assert Comparison("x", "", 1.0, Estimate.exact(2.0), "", True).measured() == {"x": 2.0, "x_theirs": 1.0}
