"""Each claim holds on a fitted model, and each verdict turns when the thing under test is broken."""

from dataclasses import replace

import pytest
import torch

from probattn import blocks
from probattn.barrier import log_barrier, stability_margin
from probattn.folds.mass import scalar_mass
from probattn.inference.claims import CLAIMS, run_claims
from probattn.inference.claims.barrier import barrier_claim
from probattn.inference.claims.claim import Claim, judge, worst
from probattn.inference.claims.jacobian import jacobian_claim
from probattn.inference.claims.margin import margin_claim
from probattn.inference.claims.normalisation import normalisation_claim
from probattn.inference.claims.objective import objective_claim, penalised_cross_entropy

# None: an experiment on the model, whose verdict is what it is.
EXPECTED = {
    "jacobian": "supported",
    "barrier": "supported_within",
    "margin": "supported",
    "normalisation": "supported_within",
    "objective": "supported",
    "consistency": "supported_within",
    "stationarity": "supported_within",
    "recovery": "not_run",
    "calibration": "not_run",
    "robustness": None,
    "decoding": None,
    "tightness": "supported",
}


def test_all_hold_on_real_text(subject):
    seen = []
    claims = run_claims(subject, seen.append)
    found = {claim.id: claim.verdict for claim in claims}
    assert list(found) == list(EXPECTED)
    assert {name: verdict for name, verdict in found.items() if EXPECTED[name]} == {
        name: verdict for name, verdict in EXPECTED.items() if verdict
    }
    assert seen == claims
    assert list(CLAIMS) == list(EXPECTED)
    for claim in claims:
        assert not claim.broken
        assert (claim.condition is not None) == (claim.verdict in ("supported_within", "not_run"))
        assert claim.formula
        assert set(claim.bound) <= set(claim.measured)
        assert set(claim.as_dict()) == {
            "id",
            "statement",
            "formula",
            "control",
            "kind",
            "verdict",
            "condition",
            "measured",
            "bound",
            "seconds",
        }
        assert claim.seconds > 0
        if claim.verdict != "not_run":
            assert claim.control


class TestJacobianTurns:
    def test_with_the_strict_formula_under_an_inclusive_mask(self, subject):
        def strict_formula(attention, u):
            return torch.eye(u.shape[-1]) - blocks.mean_jacobian(
                attention.mean_and_factors(u).factors._replace(own=None)
            )

        claim = jacobian_claim(subject, blocks=strict_formula)
        assert claim.broken
        assert claim.measured["max_abs_error"] > 1e-3

    def test_with_a_dropped_sign(self, subject):
        claim = jacobian_claim(
            subject, logabsdet=lambda attention, u: (torch.ones(u.shape[:-1]), attention.logabsdet(u)[1])
        )
        assert claim.broken
        assert claim.measured["wrong_signs"] > 0

    def test_with_a_power_series(self, subject):
        def series(attention, u):
            core = blocks.sylvester_core(attention.mean_and_factors(u).factors)
            power, total = core, torch.zeros(core.shape[:-2], dtype=core.dtype)
            for k in range(1, 4):
                total = total - power.diagonal(dim1=-2, dim2=-1).sum(-1) / k
                power = power @ core
            return attention.logabsdet(u)[0], total

        assert jacobian_claim(subject, logabsdet=series).broken

    def test_with_not_a_number(self, subject):
        assert jacobian_claim(subject, blocks=lambda attention, u: attention.jacobian(u) * float("nan")).broken


class TestBarrierTurns:
    @pytest.mark.parametrize(
        "broken",
        [
            lambda attention, u: -log_barrier(attention, u),
            lambda attention, u: log_barrier(attention, u, "one_sided"),
            lambda attention, u: log_barrier(attention, u, "smooth"),
            lambda attention, u: 1.01 * log_barrier(attention, u),
        ],
        ids=["sign", "one-sided", "smooth", "1 % too large"],
    )
    def test(self, subject, broken):
        assert barrier_claim(subject, barrier=broken).broken


class TestMarginTurns:
    @pytest.mark.parametrize(
        ("kind", "broken", "number"),
        [
            ("determinant", lambda margin: margin.abs(), "determinant_error"),
            ("spectral", lambda margin: margin + 1e-3, "spectral_error"),
            ("singular_value", lambda margin: 1.001 * margin, "noise_gain_error"),
        ],
        ids=["dropped sign", "shifted spectrum", "scaled distance"],
    )
    def test(self, subject, kind, broken, number):
        def margin(attention, u, asked):
            value = stability_margin(attention, u, asked)
            return broken(value) if asked == kind else value

        claim = margin_claim(subject, margin=margin)
        assert claim.broken
        assert claim.measured[number] > claim.bound[number]

    def test_when_one_margin_is_given_for_another(self, subject):
        assert margin_claim(
            subject, margin=lambda attention, u, _: stability_margin(attention, u, "determinant")
        ).broken


class TestNormalisationTurns:
    def test_without_the_jacobian(self, subject):
        claim = normalisation_claim(subject, mass=lambda past, scale: scalar_mass(past, scale, jacobian=False))
        assert claim.broken
        assert claim.measured["signed_mass_error"] > 0.1

    def test_when_folds_are_overlooked(self, subject):
        def blind(past, scale):
            mass = scalar_mass(past, scale)
            return replace(mass, turning_points=mass.turning_points[:0])

        assert normalisation_claim(subject, mass=blind).broken


class TestObjectiveTurns:
    def test_with_lambda_off_by_one_percent(self, subject):
        def off(config, *arguments):
            return penalised_cross_entropy(replace(config, weight=1.01 * config.weight), *arguments)

        claim = objective_claim(subject, objective=off)
        assert claim.broken
        assert claim.measured["value_error"] > 1e-6

    def test_with_a_prior_forgotten(self, subject):
        def off(config, values, *arguments):
            return penalised_cross_entropy(config, values, *arguments) + 0.5 * values["query"].square().sum()

        assert objective_claim(subject, objective=off).broken

    def test_with_a_gradient_cut(self, subject):
        def off(config, values, *arguments):
            cut = {**values, "key": values["key"].detach() + 0 * values["key"]}
            return penalised_cross_entropy(config, cut, *arguments)

        claim = objective_claim(subject, objective=off)
        assert claim.broken
        assert claim.measured["value_error"] < claim.bound["value_error"]


def test_judging():
    assert judge({"x": 0.0}, {"x": 0.0})
    assert not judge({"x": float("nan")}, {"x": 1.0})
    assert worst(1.0, 3.0, 2.0) == 3.0
    assert worst(float("nan"), 1.0) != worst(float("nan"), 1.0)
    claim = Claim("x", "y", "empirical", "not_supported", {"gain": float("inf")})
    assert not claim.broken
    assert claim.as_dict()["measured"] == {"gain": "inf"}
