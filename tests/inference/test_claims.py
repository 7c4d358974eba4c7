"""Each claim holds on a fitted model, and each verdict turns when the thing under test is broken."""

from dataclasses import replace

import pytest
import torch

from probattn import blocks
from probattn.barrier import log_barrier, stability_margin
from probattn.errors import InputError
from probattn.folds.mass import scalar_mass
from probattn.inference.claims import CLAIMS, barrier, jacobian, margin, run_claims
from probattn.inference.claims.barrier import barrier_claim
from probattn.inference.claims.barrier_training import barrier_training_claim
from probattn.inference.claims.claim import Claim, judge, verdict_in_words, worst
from probattn.inference.claims.jacobian import jacobian_claim
from probattn.inference.claims.margin import margin_claim
from probattn.inference.claims.normalisation import normalisation_claim
from probattn.inference.claims.objective import objective_claim, penalised_cross_entropy

# On the small model of these tests, whose verdicts on experiments need not be those of a longer fit.
EXPECTED = {
    "jacobian": "holds",
    "barrier": "holds",
    "barrier-training": "holds",
    "margin": "holds",
    "normalisation": "holds if the map u_i → e_i does not fold (in one dimension: a sup Var ≤ 1)",
    "objective": "holds",
    "consistency": "holds if no fold can occur (in one dimension: a ≤ 0)",
    "implementation": "holds",
    "stationarity": "holds",
    "stationary-distribution": "does not hold",
    "bounded": "holds",
    "published": "holds",
    "recovery": "not run (it takes minutes: run probattn verify --full)",
    "calibration": "not run (it takes minutes: run probattn verify --full)",
    "robustness": "does not hold",
    "trained": "does not hold",
    "decoding": "does not hold",
    "tightness": "holds",
}
FAST = ("jacobian", "barrier", "barrier-training", "margin", "objective", "implementation", "recovery", "calibration")


def check(claims, names):
    """Ids in order, verdicts in words, and fields that belong together."""
    assert {claim.id: verdict_in_words(claim) for claim in claims} == {name: EXPECTED[name] for name in names}
    assert [claim.id for claim in claims] == list(names)
    for claim in claims:
        assert not claim.broken
        assert (claim.condition is not None) == (claim.verdict in ("supported_within", "not_run"))
        assert claim.formula
        assert bool(claim.control) == (claim.verdict != "not_run")
        assert set(claim.bound) <= set(claim.measured)
        assert list(claim.as_dict()) == [
            "id",
            "statement",
            "formula",
            "kind",
            "verdict",
            "condition",
            "measured",
            "bound",
            "control",
            "finding",
            "seconds",
        ]
        assert claim.seconds > 0


def test_named_claims_on_real_text(subject):
    seen = []
    claims = run_claims(subject, seen.append, names=FAST[::-1])  # measured in the order of the ledger
    check(claims, FAST)
    assert seen == claims


@pytest.mark.slow
def test_all_on_real_text(subject):
    assert list(CLAIMS) == list(EXPECTED)
    check(run_claims(subject), EXPECTED)


def test_no_claim_without_an_expectation():
    assert list(CLAIMS) == list(EXPECTED)


def test_an_unknown_claim_is_refused(subject):
    with pytest.raises(InputError, match="claim is 'magic'; use one of 'jacobian'"):
        run_claims(subject, names=("magic",))


@pytest.mark.parametrize(
    ("verdict", "condition", "words"),
    [
        ("supported", None, "holds"),
        ("supported_within", "nothing folds", "holds if nothing folds"),
        ("not_supported", None, "does not hold"),
        ("not_run", "no text was given", "not run (no text was given)"),
    ],
)
def test_verdicts_in_words(verdict, condition, words):
    claim = Claim("x", "y", "empirical", verdict, {}, condition=condition)
    assert verdict_in_words(claim) == words
    assert verdict_in_words(claim.as_dict()) == words


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

    def test_with_a_control_that_passes(self, subject, monkeypatch):
        monkeypatch.setattr(jacobian, "_strict_formula", lambda attention, u: attention.jacobian(u))
        claim = jacobian_claim(subject)
        assert judge(claim.measured, claim.bound)
        assert claim.broken  # a measurement that does not notice the wrong formula proves nothing


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

    def test_with_a_control_that_passes(self, subject, monkeypatch):
        monkeypatch.setattr(barrier, "log_barrier", lambda attention, u, kind="logdet": log_barrier(attention, u))
        claim = barrier_claim(subject, barrier=log_barrier)
        assert judge(claim.measured, claim.bound)
        assert claim.broken


class TestBarrierTrainingTurns:
    @pytest.fixture
    def start(self, subject):
        return {name: value.double() for name, value in subject.model.initial_values(subject.seed).items()}

    def test_holds_for_a_fit_that_stays_at_its_start(self, subject, start):
        claim = barrier_training_claim(replace(subject, values=start))
        assert claim.verdict == "supported"
        assert claim.measured["margin_lost"] == 0

    def test_holds_for_a_weaker_attention_and_not_for_a_stronger_one(self, subject, start):
        verdicts = [
            barrier_training_claim(replace(subject, values={**start, "query": factor * start["query"]})).verdict
            for factor in (0.5, 2.0)
        ]
        assert verdicts == ["supported", "not_supported"]

    def test_is_not_judged_by_a_distance_that_a_control_refutes(self, subject):
        claim = barrier_training_claim(subject, margin=lambda attention, u: torch.ones(u.shape[:-1]))
        assert claim.verdict == "not_run"
        assert "control failed" in claim.condition

    def test_names_the_penalty(self, subject):
        config = replace(subject.model.config, kind="one_sided")
        other = barrier_training_claim(replace(subject, model=type(subject.model)(config)))
        assert "the one-sided penalty" in other.statement
        assert "b_i" in barrier_training_claim(subject).statement


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
        def faulty(attention, u, asked):
            value = stability_margin(attention, u, asked)
            return broken(value) if asked == kind else value

        claim = margin_claim(subject, margin=faulty)
        assert claim.broken
        assert claim.measured[number] > claim.bound[number]

    def test_when_one_margin_is_given_for_another(self, subject):
        assert margin_claim(
            subject, margin=lambda attention, u, _: stability_margin(attention, u, "determinant")
        ).broken

    def test_with_a_control_that_passes(self, subject, monkeypatch):
        monkeypatch.setattr(margin, "_determinant", stability_margin)
        claim = margin_claim(subject)
        assert judge(claim.measured, claim.bound)
        assert claim.broken


def few_weights(next_token, draws):
    """Importance weights of two draws: the estimates in several dimensions, which take long, are not under test."""
    return torch.tensor([0.5, 1.5]), torch.tensor([0.5, 1.5])


class TestNormalisationTurns:
    def test_without_the_jacobian(self, subject):
        claim = normalisation_claim(
            subject, mass=lambda past, scale: scalar_mass(past, scale, jacobian=False), weights=few_weights
        )
        assert claim.broken
        assert claim.measured["signed_mass_error"] > 0.1

    def test_when_folds_are_overlooked(self, subject):
        def blind(past, scale):
            mass = scalar_mass(past, scale)
            return replace(mass, turning_points=mass.turning_points[:0])

        claim = normalisation_claim(subject, mass=blind, weights=few_weights)
        assert claim.broken
        assert claim.measured["mass_error_without_folds"] > 0.1

    def test_not_in_one_dimension(self, subject):
        claim = normalisation_claim(subject, weights=few_weights)
        one = {name: value for name, value in claim.bound.items() if name != "largest_z"}
        assert judge(claim.measured, one)


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
