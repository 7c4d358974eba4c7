"""The claims on the infinite process, and how each turns when the thing under test is broken."""

import dataclasses

import pytest
import torch

from probattn.folds.mass import scalar_mass
from probattn.inference.claims.claim import Settings
from probattn.inference.claims.consistency import consistency_claim, draw_prefixes, three_token_excess
from probattn.inference.claims.normalisation import normalisation_claim
from probattn.inference.claims.stationarity import balanced_noise, stationarity_claim
from probattn.mean_field import CRITICAL
from probattn.models.scalar import scalar_attention
from probattn.next_token import NextToken
from probattn.solve.context import Context


class TestConsistency:
    def test_holds(self, subject):
        claim = consistency_claim(subject, Settings())
        assert claim.verdict == "supported_within"
        assert "a ≤ 0" in claim.condition
        assert claim.measured["control_raw_density_p"] <= 0.01

    def test_turns_where_long_runs_have_other_prefixes(self, subject):
        def drifting(attention, length, draws, seed):
            return draw_prefixes(attention, length, draws, seed) * (1.3 if length > 4 else 1.0)

        claim = consistency_claim(subject, Settings(), prefixes=drifting)
        assert claim.verdict == "not_supported"
        assert claim.measured["rejections_short_against_long"] > 0

    @pytest.mark.parametrize("slope", [1.0, 3.0])
    def test_the_excess_is_the_mean_mass(self, slope):
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(600, 2, generator=generator, dtype=torch.float64).cumsum(-1).unsqueeze(-1)
        masses = torch.tensor([scalar_mass(Context.of(scalar_attention(slope), pair), 1.0).absolute - 1 for pair in u])
        error = float(masses.std()) / 600**0.5
        assert abs(float(masses.mean()) - three_token_excess(slope)) < 4 * error  # four standard errors


class TestNormalisation:
    def test_turns_in_several_dimensions_without_the_modulus(self, subject):
        def signed(law, draws):
            _, with_sign = NextToken.importance_weights(law, draws)
            return with_sign, with_sign

        claim = normalisation_claim(subject, weights=signed)
        assert claim.broken
        assert claim.measured["largest_z"] > claim.bound["largest_z"]


class TestStationarity:
    def test_the_boundary_tends_to_four_over_twenty_seven(self):
        found = balanced_noise(scalar_attention(1.0), 400, 1000)
        assert abs(found.critical - CRITICAL) < 3 * found.error + 0.002  # 0.002: the bias of 400 tokens, of order 1 / n
        assert balanced_noise(scalar_attention(1.0), 20, 1000).critical < CRITICAL - 0.005  # short pasts fall short

    @pytest.mark.slow
    def test_holds_and_turns(self):
        claim = stationarity_claim(Settings())
        assert claim.verdict == "supported_within"
        assert claim.measured["critical_p1_strict_low"] < CRITICAL < claim.measured["critical_p1_strict_high"]
        assert set(claim.figures) == {"boundary", "growth", "rotation"}

        def off(attention, length, pasts, seed):
            found = balanced_noise(attention, length, pasts, seed)
            return dataclasses.replace(found, critical=1.15 * found.critical)

        assert stationarity_claim(Settings(), balance=off).verdict == "not_supported"
