"""The claims on the infinite process, and how each turns when the thing under test is broken."""

import dataclasses
import functools
import math

import numpy as np
import pytest
import torch

from probattn.folds.mass import scalar_mass
from probattn.inference.claims import consistency, stationarity, stationary_distribution
from probattn.inference.claims.claim import Settings, judge, verdict_in_words
from probattn.inference.claims.consistency import consistency_claim, draw_prefixes, three_token_excess
from probattn.inference.claims.normalisation import normalisation_claim
from probattn.inference.claims.stationarity import Balance, balanced_noise, stationarity_claim
from probattn.inference.claims.stationary_distribution import stationary_distribution_claim
from probattn.mean_field import CRITICAL, critical_noise, stationary_covariance
from probattn.models.long_run import LongRun, long_run
from probattn.models.scalar import scalar_attention
from probattn.next_token import NextToken
from probattn.solve.context import Context

QUICK = Settings()
critical_once = functools.cache(lambda attention: critical_noise(attention, torch.eye(2, dtype=torch.float64)))
# What the tests of two claims compute again and again and none of them breaks.
ONCE = {
    "consistency._raw_density_test": functools.cache(consistency._raw_density_test),
    "consistency._lazy_and_eager": functools.cache(consistency._lazy_and_eager),
    "stationarity._rotation": functools.cache(stationarity._rotation),  # one object an angle, for the next
    "stationarity.critical_noise": lambda attention, noise: critical_once(attention),
}


@pytest.fixture(autouse=True)
def _parts_that_are_not_under_test_are_computed_once(monkeypatch):
    for name, part in ONCE.items():
        monkeypatch.setattr(f"probattn.inference.claims.{name}", part)


class TestConsistency:
    def test_holds_without_folds(self):
        claim = consistency_claim(QUICK)
        assert verdict_in_words(claim) == "holds if no fold can occur (in one dimension: a ≤ 0)"
        assert claim.measured["control_raw_density_p"] <= 0.01

    def test_turns_where_long_runs_have_other_prefixes(self):
        def drifting(attention, length, draws, seed):
            return draw_prefixes(attention, length, draws, seed) * (1.3 if length > 4 else 1.0)

        claim = consistency_claim(QUICK, prefixes=drifting)
        assert claim.verdict == "not_supported"
        assert claim.measured["rejections_short_against_long"] > 0

    def test_turns_where_the_control_is_not_noticed(self, monkeypatch):
        tests = consistency._raw_density_test()
        monkeypatch.setattr(consistency, "_raw_density_test", lambda: (tests[1], tests[1]))
        claim = consistency_claim(QUICK)
        assert judge(claim.measured, claim.bound)
        assert claim.verdict == "not_supported"

    @pytest.mark.parametrize("slope", [3.0, 8.0])
    def test_the_excess_is_the_mean_mass(self, slope):
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(400, 2, generator=generator, dtype=torch.float64).cumsum(-1).unsqueeze(-1)
        masses = torch.tensor([scalar_mass(Context.of(scalar_attention(slope), pair), 1.0).absolute - 1 for pair in u])
        error = float(masses.std()) / 400**0.5
        assert abs(float(masses.mean()) - three_token_excess(slope)) < 4 * error  # four standard errors
        assert abs(float(masses.mean()) - 2 * three_token_excess(slope)) > 4 * error


class TestNormalisation:
    def test_turns_in_several_dimensions_without_the_modulus(self, subject):
        def signed(next_token, draws):
            _, with_sign = NextToken.importance_weights(next_token, draws)
            return with_sign, with_sign

        claim = normalisation_claim(subject, weights=signed)
        assert claim.broken
        assert claim.measured["largest_z"] > claim.bound["largest_z"]


def exact_balance(attention, length, pasts, seed, *, factor=1.0):
    """A balance without noise, 1 / n below mean field, as the measured one is."""
    critical = factor * (CRITICAL - 0.4 / length + 1e-5 * (-1) ** (length // 25))
    return Balance(length, np.full((20, 7), critical), critical, 1e-4)


class TestStationarity:
    def test_short_pasts_fall_short_of_the_boundary(self):
        short, longer = (balanced_noise(scalar_attention(1.0), length, 400) for length in (16, 64))
        assert short.critical < longer.critical < CRITICAL
        assert short.critical < CRITICAL - 1.5 * short.error

    @pytest.mark.slow
    def test_the_boundary_tends_to_four_over_twenty_seven(self):
        found = balanced_noise(scalar_attention(1.0), 400, 1000)
        assert abs(found.critical - CRITICAL) < 3 * found.error + 0.002  # 0.002: the bias of 400 tokens, of order 1 / n

    def test_is_judged_by_the_limit_of_long_pasts(self):
        claim = stationarity_claim(QUICK, balance=exact_balance)
        assert claim.verdict == "supported"
        assert claim.measured["critical_p1_strict"] == pytest.approx(CRITICAL, abs=1e-4)
        assert set(claim.figures) == {"boundary", "rotation"}

    @pytest.mark.parametrize("factor", [0.97, 1.03])
    def test_turns_with_another_limit(self, factor):
        claim = stationarity_claim(QUICK, balance=lambda *of: exact_balance(*of, factor=factor))
        assert claim.verdict == "not_supported"
        assert claim.measured["critical_z"] > claim.bound["critical_z"]

    @pytest.mark.slow
    def test_holds_and_turns_as_measured(self):
        claim = stationarity_claim(QUICK)
        assert claim.verdict == "supported"
        assert claim.measured["critical_p1_strict_low"] < CRITICAL < claim.measured["critical_p1_strict_high"]

        def off(attention, length, pasts, seed):
            found = balanced_noise(attention, length, pasts, seed)
            return dataclasses.replace(found, critical=1.15 * found.critical)

        assert stationarity_claim(QUICK, balance=off).verdict == "not_supported"


def drifting_run(attention, noise_scale, lengths, sequences, *, symmetric=False, limit=torch.inf, power=None):
    """A run as mean field has it: a stationary spread, and a small mean that grows with its power of n."""
    slopes = attention.qk_matrix.flatten()
    mean = torch.linspace(-1e-3, 1e-3, 8, dtype=torch.float64)  # (N,), of no weight in the spread
    means, covariances = [], []
    for slope in slopes:
        one = torch.ones(1, 1, dtype=torch.float64)
        spread = float(stationary_covariance(scalar_attention(float(slope)), one).covariance)
        exponent = float(slope) * spread / (1 - float(slope) * spread) if power is None else power
        growth = torch.tensor([(n / lengths[0]) ** exponent for n in lengths], dtype=torch.float64)
        means.append(growth[:, None] * mean)
        covariances.append(torch.full((len(lengths), 8), spread, dtype=torch.float64))
    return LongRun(
        lengths=torch.tensor(lengths),
        mean=torch.stack(means, dim=1).unsqueeze(-1),
        covariance=torch.stack(covariances, dim=1).unsqueeze(-1).unsqueeze(-1),
        escape=torch.full((len(slopes), 8), torch.inf),
        unsolved=0.0,
        several=0.0,
    )


class TestStationaryDistribution:
    def test_does_not_exist_if_the_mean_grows(self):
        claim = stationary_distribution_claim(QUICK, run=drifting_run)
        assert claim.verdict == "not_supported"
        spread = float(stationary_covariance(scalar_attention(0.1), torch.ones(1, 1).double()).covariance)
        exponent = 0.1 * spread / (1 - 0.1 * spread)
        assert claim.measured["growth_0.1"] == pytest.approx(8**exponent)  # lengths 25 to 200
        assert set(claim.figures) == {"growth"}

    def test_exists_if_the_mean_falls(self):
        claim = stationary_distribution_claim(QUICK, run=lambda *of, **more: drifting_run(*of, **more, power=-0.5))
        assert claim.verdict == "supported"
        assert claim.measured["growth_0.13"] == pytest.approx(8**-0.5)

    @pytest.mark.parametrize("fault", ["growing repulsion", "another spread", "escape of repulsion"])
    def test_is_not_judged_if_a_control_fails(self, fault):
        def run(attention, *of, **more):
            found = drifting_run(attention, *of, **more)
            if "symmetric" in more:  # attraction
                return found._replace(
                    covariance=found.covariance * (1 + (fault == "another spread") * found_trend(found))
                )
            if fault == "growing repulsion":
                return drifting_run(attention, *of, **more, power=0.3)
            return (
                found._replace(escape=torch.full_like(found.escape, 3.0)) if fault == "escape of repulsion" else found
            )

        def found_trend(found):
            return torch.linspace(0, 1, len(found.lengths), dtype=torch.float64).view(-1, 1, 1, 1, 1)

        claim = stationary_distribution_claim(QUICK, run=run)
        assert claim.verdict == "not_run"
        assert "a control failed" in claim.condition

    def test_the_interval_of_the_growth_has_its_error(self):
        """Of 80 samples of a mean that does not grow, about 10 % have an interval that lies above one."""
        rng = np.random.default_rng(0)
        above = 0
        for _ in range(80):
            size = np.exp(rng.normal(size=(2, 40)))
            _, low, high = stationary_distribution._growth(torch.as_tensor(size), 0.1)
            above += low > 1
            assert low < high
        assert 1 <= above <= 16  # Binomial(80, 0.1) leaves this range once in two hundred times
        grown = torch.as_tensor(np.exp(rng.normal(size=(1, 40))) * np.array([[1.0], [1.5]]))
        assert stationary_distribution._growth(grown, 0.01)[1:] == pytest.approx((1.5, 1.5), rel=0.5)

    def test_an_escaped_run_has_grown_without_end(self):
        mean = torch.ones(2, 9, dtype=torch.float64)
        mean[1, :7] = torch.inf
        growth, low, high = stationary_distribution._growth(mean, 0.01)
        assert math.isinf(growth)
        assert math.isinf(high)
        assert low == 1

    @pytest.mark.slow
    def test_as_measured(self):
        claim = stationary_distribution_claim(QUICK)
        assert claim.verdict == "not_supported"
        assert claim.measured["growth_0.13_low"] > 1

        def held(attention, *of, **more):
            return long_run(attention, *of, **{**more, "symmetric": "symmetric" in more})

        assert stationary_distribution_claim(QUICK, run=held).verdict == "supported"
