"""Bootstrap over texts, simultaneous intervals and partial rank correlations, against references."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from probattn.errors import InputError
from probattn.inference.studies.language.statistics import (
    partial_correlations,
    rank_correlations,
    resample_texts,
    resampled_means,
    resampled_quantiles,
    simultaneous_band,
)

RNG = np.random.default_rng(0)


def repeated(values, row):
    """The tokens of a resample, written out."""
    return np.concatenate([values[k] for k, times in enumerate(row) for _ in range(int(times))])


class TestResampling:
    def test_counts_of_whole_texts(self):
        weights = resample_texts(7, 200, seed=3)
        assert weights[0].tolist() == [1] * 7
        assert (weights.sum(1) == 7).all()
        assert weights[1:].mean() == pytest.approx(1)
        assert weights[1:].var() == pytest.approx(6 / 7, abs=0.1)  # of Binomial(7, 1/7)
        np.testing.assert_array_equal(weights, resample_texts(7, 200, seed=3))

    @given(seed=st.integers(0, 1000), order=st.sampled_from([0.01, 0.1, 0.5, 0.73, 0.99, 1.0]))
    @settings(max_examples=30)
    def test_quantiles_and_means_are_those_of_the_tokens_written_out(self, seed, order):
        rng = np.random.default_rng(seed)
        values = rng.integers(0, 9, (5, 4)).astype(float)  # with ties
        values[rng.uniform(size=values.shape) < 0.2] = np.nan
        weights = resample_texts(5, 40, seed)
        found, means = resampled_quantiles(values, (order,), weights), resampled_means(values, weights)
        for k, row in enumerate(weights):
            tokens = repeated(values, row)
            tokens = tokens[~np.isnan(tokens)]
            if not len(tokens):
                assert np.isnan(found[k, 0])
                assert np.isnan(means[k])
                continue
            assert found[k, 0] == np.quantile(tokens, order, method="inverted_cdf")
            assert means[k] == pytest.approx(tokens.mean())

    def test_infinity_is_a_value_and_nothing_but_nan_is_none(self):
        weights = np.ones((1, 2))
        assert resampled_quantiles(np.array([[1.0, np.inf], [np.inf, np.inf]]), (0.5,), weights)[0, 0] == np.inf
        assert np.isnan(resampled_quantiles(np.full((2, 2), np.nan), (0.5,), weights)).all()

    @pytest.mark.parametrize(("texts", "resamples"), [(1, 100), (5, 39)])
    def test_too_few(self, texts, resamples):
        with pytest.raises(InputError, match="must be at least"):
            resample_texts(texts, resamples, 0)


class TestBand:
    def test_covers_all_means_at_once(self):
        """A family of intervals seldom misses any of its true means; of single ones, some do in most experiments."""
        missed = single = 0
        for seed in range(150):
            values = np.random.default_rng(seed).normal(size=(24, 20))  # texts by numbers
            samples = (weights := resample_texts(24, 400, seed)) @ values / weights.sum(1, keepdims=True)
            band = simultaneous_band(samples, texts=24)
            missed += bool(((band.low > 0) | (band.high < 0)).any())
            low, high = np.quantile(samples[1:], (0.025, 0.975), axis=0)
            single += bool(((low > 0) | (high < 0)).any())
        assert missed <= 20  # 9 % of 150 are 13.5; more than 20 have a probability of 3 %, and of 0.001 % at 5 %
        assert single > 75  # the control: twenty looks at 5 % each

    def test_width_for_one_number(self):
        draws = np.random.default_rng(1).normal(2.0, 3.0, size=(4000, 1))
        samples = np.vstack([[[2.0]], draws])
        assert simultaneous_band(samples).factor == pytest.approx(1.96, abs=0.08)
        band = simultaneous_band(samples, texts=6)
        widened = stats.t.ppf(0.975, 5) * (6 / 5) ** 0.5 * samples[1:].std()
        assert band.high[0] - band.estimate[0] == pytest.approx(widened, rel=0.05)
        both = simultaneous_band(np.repeat(samples, 2, 1), texts=[6, 1000])
        assert both.high[0] == pytest.approx(band.high[0])
        assert both.high[1] - 2.0 == pytest.approx(1.96 * 3.0, rel=0.05)

    def test_numbers_that_do_not_move_and_that_are_none(self):
        samples = np.column_stack(
            [np.full(101, 3.0), np.r_[0.0, RNG.normal(size=100)], np.r_[np.full(100, 1.0), np.nan]]
        )
        band = simultaneous_band(samples)
        assert (band.low[0], band.high[0]) == (3, 3)
        assert band.low[1] < 0 < band.high[1]
        assert np.isnan([band.low[2], band.high[2]]).all()
        alone = simultaneous_band(samples[:, 1:2])
        assert band.factor == alone.factor
        assert band.as_lists()["low"][1] == band.low[1]

    @pytest.mark.parametrize("level", [0.0, 1.0, float("nan")])
    def test_level(self, level):
        with pytest.raises(InputError, match="level is"):
            simultaneous_band(np.zeros((50, 1)), level)


class TestCorrelations:
    @given(seed=st.integers(0, 1000))
    @settings(max_examples=15)
    def test_are_those_of_scipy_on_the_tokens_written_out(self, seed):
        rng = np.random.default_rng(seed)
        columns = rng.integers(0, 6, (3, 6, 5)).astype(float)
        columns[0, 2, 3] = np.nan  # leaves the token out everywhere
        weights = resample_texts(6, 40, seed)
        found = rank_correlations(columns, weights)
        kept = ~np.isnan(columns).any(0)
        for k in (0, 1, 17):
            own = np.repeat(np.arange(6), 5)[kept.ravel()]
            tokens = [np.repeat(column.ravel()[kept.ravel()], weights[k][own].astype(int)) for column in columns]
            exact = stats.spearmanr(np.stack(tokens, 1)).statistic
            np.testing.assert_allclose(found[k], exact, atol=1e-10)

    def test_a_constant_orders_nothing(self):
        columns = np.stack([np.ones((3, 4)), RNG.normal(size=(3, 4))])
        assert rank_correlations(columns, np.ones((1, 3)))[0].tolist() == [[0, 0], [0, pytest.approx(1)]]

    def test_partial_correlation_removes_what_is_given(self):
        z = RNG.normal(size=(1, 4000))
        x, y = z + 0.5 * RNG.normal(size=(2, 1, 4000))
        correlations = rank_correlations(np.stack([x, y, z]), np.ones((1, 1)))
        plain = partial_correlations(correlations, 1, [])[0, 0]
        given_z = partial_correlations(correlations, 1, [2])[0, 0]
        assert plain > 0.7
        assert abs(given_z) < 0.06
        r = correlations[0]
        formula = (r[0, 1] - r[0, 2] * r[1, 2]) / np.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
        assert given_z == pytest.approx(formula)

    def test_nothing_is_left_of_what_is_given_itself(self):
        columns = RNG.normal(size=(3, 2, 50))
        correlations = rank_correlations(columns, np.ones((1, 2)))
        assert partial_correlations(correlations, 0, [1, 2])[0, 1] == 0
