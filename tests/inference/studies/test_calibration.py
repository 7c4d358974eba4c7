"""Calibration itself is calibrated: right methods pass, wrong ones fail, whatever the number of workers."""

from dataclasses import replace

import joblib
import numpy as np
import pytest
import torch
from listening import listening

from probattn.errors import InputError
from probattn.inference.claims import recovery
from probattn.inference.claims.calibration import calibration_claim
from probattn.inference.claims.claim import Settings
from probattn.inference.claims.recovery import recovery_claim
from probattn.inference.studies import calibration
from probattn.inference.studies.calibration import (
    METHODS,
    Ranks,
    Study,
    calibrate,
    quantities,
    rank_band,
    rank_truth,
    simulate_study,
)

STUDY = Study(replicates=30, sequences=6, length=10, dim=1, prior_scale=0.1, ranked=39)


@pytest.fixture(scope="module")
def simulated():
    return simulate_study(STUDY)


@pytest.fixture(scope="module")
def remembered():
    """The methods; what those by Laplace find for a set of data is computed once for all tests here."""

    def once(sampler):
        found = {}

        def sample(model, u, count, seed):
            key = (model.prior_scale, count, seed, u.numpy().tobytes())
            if key not in found:
                found[key] = sampler(model, u, count, seed)
            return found[key]

        return sample

    return {name: once(sampler) if name.startswith("laplace") else sampler for name, sampler in METHODS.items()}


@pytest.fixture
def methods(remembered, monkeypatch):
    """Puts methods in the place of those of the study, which begin as they are."""

    def put(**others):
        monkeypatch.setattr(calibration, "METHODS", {**remembered, **others})

    put()
    return put


def test_the_data_sets(simulated):
    assert simulated.u.shape == (30, 6, 10, 1)
    assert simulated.values["qk_matrix"].shape == (30, 1, 1, 1)
    assert simulated.redrawn <= 2
    assert simulated.certified > 0.9
    again = simulate_study(STUDY)
    assert torch.equal(again.u, simulated.u)
    assert not torch.equal(simulate_study(replace(STUDY, seed=1)).u, simulated.u)


def test_a_prior_that_folds_cannot_be_calibrated():
    with pytest.raises(InputError, match="do not fold; a model that defines no distribution cannot be calibrated"):
        simulate_study(replace(STUDY, replicates=8, dim=2, length=16, sequences=2, prior_scale=9.0))


@pytest.mark.slow  # that the claim turns is with the fast tests
@pytest.mark.parametrize("sampler", ["laplace", "nuts"])
def test_a_right_posterior_passes_and_the_one_without_the_jacobian_fails(simulated, sampler, methods):
    right = calibrate(STUDY, sampler, simulated=simulated)
    assert right.calibrated()
    naive = calibrate(STUDY, f"{sampler}_without_jacobian", simulated=simulated)
    assert not naive.calibrated()
    # It is the slope that is wrong, by much: the missing determinant pays for attraction.
    assert naive.excess()["A[0, 0]"] > 0.2
    assert naive.errors["A[0, 0]"].mean() > 3 * abs(right.errors["A[0, 0]"].mean())


@pytest.mark.parametrize("factor", [0.3, 3.0], ids=["too sure", "not sure enough"])
def test_a_posterior_of_the_wrong_width_fails(simulated, factor, methods, remembered):
    def wrong(model, u, count, seed):
        draws = remembered["laplace"](model, u, count, seed)
        return draws.mean(1, keepdim=True) + factor * (draws - draws.mean(1, keepdim=True))

    methods(wrong=wrong)
    ranks = calibrate(STUDY, "wrong", simulated=simulated)
    assert not ranks.calibrated()
    covered = ranks.coverage(0.9)["A[0, 0]"]
    assert covered < 0.6 if factor < 1 else covered > 0.95


def test_workers_and_interruptions_change_nothing(simulated, tmp_path, monkeypatch):
    small = replace(STUDY, replicates=12)
    part = simulated._replace(values={n: v[:12] for n, v in simulated.values.items()}, u=simulated.u[:12])
    one = calibrate(small, "laplace", simulated=part, chunk=6)
    store = tmp_path / "ranks.json"
    seen = []
    with listening(seen.append), joblib.parallel_config(backend="threading"):
        two = calibrate(small, "laplace", simulated=part, jobs=2, chunk=6, store=store)
    steps = [(record.step, record.total) for record in seen if record.name == calibration.__name__]
    assert steps == [(6, 12), (12, 12)]

    def never(*_):
        raise AssertionError("a finished chunk was computed again")

    monkeypatch.setattr(calibration, "_chunk", never)
    resumed = calibrate(small, "laplace", simulated=part, chunk=6, store=store)
    for name in one.ranks:
        np.testing.assert_array_equal(one.ranks[name], two.ranks[name])
        np.testing.assert_array_equal(one.ranks[name], resumed.ranks[name])
    with pytest.raises(InputError, match="ranks of another study"):
        calibrate(replace(small, seed=1), "laplace", simulated=part, store=store)
    store.write_text(store.read_text()[:100])
    with pytest.raises(InputError, match="cannot be read"):
        calibrate(small, "laplace", simulated=part, chunk=6, store=store)


def test_ranks_count_the_draws_below():
    study = Study(replicates=2, sequences=2, length=4, dim=2, ranked=4)
    model = study.model()
    values = {"qk_matrix": torch.zeros(2, 1, 2, 2).double(), "noise_scale": torch.ones(2, 2).double()}
    u = 0.3 * torch.randn(2, 2, 4, 2, dtype=torch.float64)
    draws = torch.zeros(2, 4, 6, dtype=torch.float64)
    draws[0, :, 1] = torch.tensor([-1.0, -2.0, -3.0, 1.0])  # A[0, 1] of the first data set
    draws[1, :, 4] = torch.tensor([0.5, 0.6, 0.7, -0.1])  # log of the first noise scale, of the second
    ranks = rank_truth(model, values, u, draws)
    assert ranks["A[0, 1]"][0][0] == 3.0
    assert ranks["A[0, 1]"][1].tolist() == [-1.25, 0.0]
    assert ranks["noise_scale[0]"][0][1] == 1.0
    ties = {tuple(rank_truth(model, values, u, 0 * draws)[name][0]) for name in ranks}
    assert len(ties) > 1  # all draws equal the truth: any rank is as good, and chance gives one
    found = quantities(model, {name: value.unsqueeze(0) for name, value in values.items()}, u)
    torch.testing.assert_close(
        found["log_likelihood"][0],
        model.likelihood({name: value.unsqueeze(1) for name, value in values.items()}).log_prob(u).sum(-1),
    )
    assert set(found) == set(ranks)


def test_the_band_holds_uniform_numbers_as_often_as_it_says():
    band = rank_band(50, 0.9)
    generator = np.random.default_rng(1)
    outside = np.mean([band.excess(generator.random(50)) > 0 for _ in range(2000)])
    # Three standard errors of a share of 0.1 among 2000.
    assert abs(outside - 0.1) < 3 * (0.1 * 0.9 / 2000) ** 0.5 + 0.01  # the band is itself simulated, to a hundredth
    assert band.excess(generator.random(50) ** 2) > 0


def test_coverage_counts_central_ranks():
    ranks = Ranks("x", 99, {"a": np.array([0.0, 4, 5, 50, 94, 95, 99])}, {})
    assert ranks.coverage(0.9)["a"] == pytest.approx(3 / 7)
    assert ranks.coverage(0.5)["a"] == pytest.approx(1 / 7)


def test_options():
    with pytest.raises(InputError, match="method is 'gibbs'; use one of 'nuts'"):
        calibrate(STUDY, "gibbs")
    with pytest.raises(InputError, match="length is 2"):
        Study(length=2)


def test_the_claims_wait_for_full():
    for claim in (calibration_claim(Settings()), recovery_claim(Settings())):
        assert claim.verdict == "not_run"
        assert "probattn verify --full" in claim.condition


def test_the_claim_holds_and_turns(methods, remembered, monkeypatch, tmp_path, caplog):
    from probattn.inference.claims import calibration as claim

    naive = remembered["laplace_without_jacobian"]
    methods(nuts_without_jacobian=naive)
    monkeypatch.setattr(claim, "_SHORT", ("laplace", "nuts_without_jacobian"))
    with caplog.at_level("INFO", logger="probattn.inference"):
        found = calibration_claim(Settings(full=True, folder=tmp_path), study=STUDY)
    assert found.verdict == "supported"
    assert found.measured["laplace_excess"] <= 0 < found.measured["nuts_without_jacobian_excess"]
    assert "leave the band" in found.control
    assert set(found.figures) == {"calibration"}
    assert "calibration of laplace: 30 of 30" in caplog.messages
    # A control that passed would prove that the test is blind; a method that fails turns the verdict.
    methods(nuts_without_jacobian=naive, laplace=naive)
    turned = calibration_claim(Settings(full=True), study=STUDY)
    assert turned.verdict == "not_supported"
    assert not turned.broken  # a statistical claim, not an identity
    methods(nuts_without_jacobian=remembered["laplace"])
    assert calibration_claim(Settings(full=True), study=STUDY).verdict == "not_supported"


def test_the_ranks_that_ship_with_the_package_are_read_in():
    from probattn.inference.claims import calibration as claim

    ranks, origin = claim._committed(claim.STUDY)
    assert set(ranks) == set(METHODS)
    assert "probattn verify --claims calibration --full" in origin
    for name in ("nuts", "nuts_pyro", "laplace", "svi_full_rank"):
        assert ranks[name].calibrated()
    assert not ranks["nuts_without_jacobian"].calibrated()
    assert claim._committed(replace(claim.STUDY, seed=1)) == ({}, "")


def test_recovery_counts_coverage_and_needs_a_control_that_fails(monkeypatch):
    """Ranks that are given: in even steps where all is right, at the end where the Jacobian is left out."""

    def ranked(study, method, **_):
        naive = method.endswith("without_jacobian")
        names = [f"A[{j}, {k}]" for j in range(2) for k in range(2)]
        ranks = np.zeros(study.replicates) if naive else np.linspace(0, study.ranked, study.replicates).round()
        errors = np.full(study.replicates, 1.0 if naive else study.sequences**-0.5)
        return Ranks(method, study.ranked, dict.fromkeys(names, ranks), dict.fromkeys(names, errors))

    monkeypatch.setattr(recovery, "calibrate", ranked)
    study = Study(replicates=40, sequences=4, length=6, prior_scale=0.5, noise_spread=0.5)
    found = recovery_claim(Settings(full=True), study=study)
    assert found.verdict == "supported_within"
    assert found.measured["error_ratio"] == pytest.approx(2.0)
    assert found.measured["naive_coverage_90_N16_highest"] == 0.0
    monkeypatch.setattr(recovery, "calibrate", lambda study, method, **_: ranked(study, "without_jacobian"))
    assert recovery_claim(Settings(full=True), study=study).verdict == "not_supported"
    monkeypatch.setattr(recovery, "calibrate", lambda study, method, **_: ranked(study, "right"))
    assert recovery_claim(Settings(full=True), study=study).verdict == "not_supported"


@pytest.mark.slow
def test_recovery_holds_and_turns(methods, remembered):
    study = Study(replicates=20, sequences=4, length=12, prior_scale=0.5, noise_spread=0.5)
    found = recovery_claim(Settings(full=True), study=study)
    assert found.verdict == "supported_within"
    assert found.measured["naive_coverage_90_N16_lowest"] < 0.5
    assert set(found.figures) == {"recovery"}
    methods(laplace=remembered["laplace_without_jacobian"])
    assert recovery_claim(Settings(full=True), study=study).verdict == "not_supported"
