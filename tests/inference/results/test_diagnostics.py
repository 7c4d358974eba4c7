"""Each finding, from a fit made to show it, and its absence from one that is well."""

import json
import warnings

import numpy as np
import pytest
from arviz_stats.base import array_stats

from probattn.inference.results.diagnosis import diagnose
from probattn.inference.results.fit_file import Fit

CHAINS, DRAWS, SEQUENCES = 4, 200, 6


def healthy(method="nuts", **attributes):
    generator = np.random.default_rng(4)

    def normal(*shape):
        return generator.normal(size=(CHAINS, DRAWS, *shape))

    qk_matrix = 0.1 * normal(1, 2, 2)
    # A likelihood that knows the parameters well, so that the prior does not matter.
    likelihood = -0.5 * ((qk_matrix / 0.1) ** 2).sum((-3, -2, -1))[..., None] / SEQUENCES + 0.1 * normal(SEQUENCES)
    groups = {
        "posterior": {
            "qk_matrix": qk_matrix,
            "noise_scale": np.exp(0.1 * normal(2)),
            "smallest_margin": 0.7 + 0.05 * normal(),
            "smallest_abs_det": np.full((CHAINS, DRAWS), 0.5),
        },
        "tokens": {"regime": np.zeros((CHAINS, DRAWS, 2), dtype=np.int8)},
        "sample_stats": {
            "diverging": np.zeros((CHAINS, DRAWS), dtype=bool),
            "energy": normal(),
            "tree_depth": np.full((CHAINS, DRAWS), 3.0),
        },
        "log_likelihood": {"u": likelihood},
        "log_prior": {"qk_matrix": -0.5 * (qk_matrix**2).sum((-3, -2, -1)), "noise_scale": 0.01 * normal()},
    }
    dims = {
        "qk_matrix": ["head", "key_feature", "query_feature"],
        "log_likelihood.u": ["sequence"],
        "log_prior.qk_matrix": [],
    }
    if method != "nuts":
        groups = {name: {k: v.reshape(1, -1, *v.shape[2:]) for k, v in group.items()} for name, group in groups.items()}
    return Fit(method, groups, dims, {}, {"max_depth": 10, "power": 1.0, "jacobian": 1, **attributes})


def finding(diagnosis, about):
    (found,) = [found for found in diagnosis.findings if found.about == about]
    return found


def test_a_margin_that_no_parameter_moves_has_no_r_hat():
    """As under repulsion on a line, where the first token is the nearest; warnings are errors here."""
    fit = healthy()
    fit.groups["posterior"]["smallest_margin"][:] = 1.0
    assert np.isfinite(diagnose(fit).numbers["rhat"])
    fit.groups["posterior"]["noise_scale"][:] = 1.0  # a parameter that does not move is a finding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert diagnose(fit).verdict != "reliable"


def test_a_healthy_fit_is_reliable():
    diagnosis = diagnose(healthy())
    assert diagnosis.verdict == "reliable"
    assert {found.level for found in diagnosis.findings} <= {"good", "note"}
    assert "verdict  reliable" in str(diagnosis)
    assert diagnosis.numbers["rhat"] < 1.01
    assert diagnosis.numbers["ess_bulk"] > 400
    json.dumps(diagnosis.as_dict(), allow_nan=False)


def test_chains_that_disagree():
    fit = healthy()
    fit.groups["posterior"]["qk_matrix"][0] += 0.3
    diagnosis = diagnose(fit)
    found = finding(diagnosis, "R-hat")
    assert found.level == "problem"
    assert "qk_matrix[0" in found.words
    assert "run longer" in found.words
    assert diagnosis.verdict == "not reliable"


class TestThresholds:
    """The boundaries of the verdicts, from both sides; the sources stand beside the numbers in the code."""

    @pytest.mark.parametrize(
        ("rhat", "level"),
        [(1.009, "good"), (1.011, "warning"), (1.049, "warning"), (1.051, "problem"), (np.nan, "problem")],
    )
    def test_rhat(self, monkeypatch, rhat, level):
        monkeypatch.setattr(array_stats, "rhat", lambda ary, **_: rhat)
        diagnosis = diagnose(healthy())
        assert finding(diagnosis, "R-hat").level == level
        assert diagnosis.numbers["rhat"] == pytest.approx(rhat, nan_ok=True)

    @pytest.mark.parametrize(
        ("size", "level"), [(401.0, "good"), (400.0, "good"), (399.0, "warning"), (40.0, "warning"), (39.0, "problem")]
    )
    @pytest.mark.parametrize("kind", ["bulk", "tail"])
    def test_effective_draws_per_chain(self, monkeypatch, kind, size, level):
        monkeypatch.setattr(array_stats, "ess", lambda ary, method, **_: size if method == kind else 800.0)
        found = finding(diagnose(healthy()), f"{kind} ESS")
        assert found.level == level
        # 200 draws a chain gave 399: 100 a chain and a fifth more to be safe takes 240.
        needed = {399.0: 240, 40.0: 2400, 39.0: 2461}.get(size)
        assert ("fewer than 100 per chain" in found.words) == (level != "good")
        assert needed is None or f"raise --draws to about {needed}" in found.words

    @pytest.mark.parametrize(("count", "level"), [(0, "good"), (1, "warning"), (8, "warning"), (9, "problem")])
    def test_a_hundredth_of_divergences(self, count, level):
        fit = healthy()
        fit.groups["sample_stats"]["diverging"].ravel()[:count] = True
        assert fit.groups["sample_stats"]["diverging"].size == 800
        assert finding(diagnose(fit), "divergences").level == level

    @pytest.mark.parametrize(("near", "place"), [(6, "at the fold boundary"), (5, "away from the boundary")])
    @pytest.mark.parametrize(("gap", "counts"), [(0.049, True), (0.051, False)])
    def test_half_of_the_divergences_near_the_boundary(self, near, place, gap, counts):
        fit = healthy()
        fit.groups["sample_stats"]["diverging"].ravel()[:11] = True
        fit.groups["posterior"]["smallest_abs_det"].ravel()[:near] = gap
        assert (place if counts else "away from the boundary") in finding(diagnose(fit), "divergences").words

    @pytest.mark.parametrize(("fraction", "level"), [(0.31, "good"), (0.3, "good"), (0.29, "warning")])
    def test_energies(self, monkeypatch, fraction, level):
        monkeypatch.setattr(array_stats, "bfmi", lambda energy: np.array([0.9, fraction, 1.1]))
        diagnosis = diagnose(healthy())
        assert finding(diagnosis, "E-BFMI").level == level
        assert diagnosis.numbers["ebfmi"] == fraction

    @pytest.mark.parametrize(("count", "seen"), [(8, False), (9, True)])
    def test_a_hundredth_of_saturated_trees(self, count, seen):
        fit = healthy(max_depth=7)
        fit.groups["sample_stats"]["tree_depth"].ravel()[:count] = 7
        assert any(found.about == "trees" for found in diagnose(fit).findings) == seen

    @pytest.mark.parametrize(
        ("khat", "level"), [(0.5, "good"), (0.51, "warning"), (0.7, "warning"), (0.71, "problem"), (np.nan, "problem")]
    )
    def test_khat(self, khat, level):
        assert finding(diagnose(healthy("svi", khat_guide=khat, corrected=0)), "k-hat").level == level

    @pytest.mark.parametrize(("worth", "level"), [(100.0, "good"), (99.0, "warning")])
    def test_independent_draws_left_by_the_correction(self, worth, level):
        info = {"khat_guide": 0.9, "corrected": 1, "khat": 0.2, "importance_ess": worth}
        assert finding(diagnose(healthy("laplace", **info)), "k-hat").level == level

    @pytest.mark.parametrize(("count", "level"), [(0, "good"), (1, "warning"), (80, "warning"), (81, "problem")])
    def test_a_twentieth_of_folded_draws(self, count, level):
        fit = healthy()
        assert fit.groups["tokens"]["regime"].size == 1600
        fit.groups["tokens"]["regime"].ravel()[:count] = 2
        assert finding(diagnose(fit), "regime at the data").level == level


def test_one_chain_cannot_be_compared():
    fit = healthy()
    fit = Fit(
        "nuts", {g: {k: v[:1] for k, v in vs.items()} for g, vs in fit.groups.items()}, fit.dims, {}, fit.attributes
    )
    found = finding(diagnose(fit), "R-hat")
    assert found.level == "warning"
    assert "--chains 4" in found.words


def test_sticky_chains_have_few_effective_draws():
    fit = healthy()
    fit.groups["posterior"]["noise_scale"][:] = np.repeat(fit.groups["posterior"]["noise_scale"][:, ::50], 50, axis=1)
    found = finding(diagnose(fit), "bulk ESS")
    assert found.level == "problem"  # 16 of 800
    assert "raise --draws to about" in found.words


@pytest.mark.parametrize(("gap", "place"), [(0.01, "at the fold boundary"), (0.5, "away from the boundary")])
def test_divergences_are_located(gap, place):
    fit = healthy()
    fit.groups["sample_stats"]["diverging"][0, :12] = True
    fit.groups["posterior"]["smallest_abs_det"][0, :9] = gap
    diagnosis = diagnose(fit)
    found = finding(diagnosis, "divergences")
    assert found.words.startswith(f"12 {place}: {9 if gap < 0.05 else 0} of them end within 0.05 of det J = 0;")
    assert found.level == "problem"
    assert diagnosis.numbers["divergences_near_boundary"] == (9 if gap < 0.05 else 0)
    assert ("tighten the prior" in found.words) == (gap < 0.05)


def test_energies_that_are_explored_slowly():
    fit = healthy()
    fit.groups["sample_stats"]["energy"][:] = np.cumsum(fit.groups["sample_stats"]["energy"], axis=1)
    assert finding(diagnose(fit), "E-BFMI").level == "warning"


def test_trees_that_end_by_their_depth():
    fit = healthy()
    fit.groups["sample_stats"]["tree_depth"][:, :20] = 10
    found = finding(diagnose(fit), "trees")
    assert found.words.startswith("10 % of the trajectories")
    assert "--max-depth" in found.words


@pytest.mark.parametrize(
    ("notes", "level", "words"),
    [
        ({"khat_guide": 0.3, "corrected": 0}, "good", "0.30: the approximation is close"),
        ({"khat_guide": 0.6, "corrected": 0}, "warning", "usable for means, not for tails"),
        ({"khat_guide": 1.2, "corrected": 0}, "problem", "use --guide full_rank or flow, or --method nuts"),
        ({"khat_guide": 1.2, "corrected": 0, "guide": "full_rank"}, "problem", "use --guide flow, or --method nuts"),
        ({"khat_guide": 1.2, "corrected": 0, "guide": "flow"}, "problem", "posterior; use --method nuts"),
        (
            {"khat_guide": 1.2, "corrected": 1, "khat": 0.2, "importance_ess": 300.0},
            "good",
            "1.20 for the approximation",
        ),
        ({"khat_guide": 1.2, "corrected": 1, "khat": 0.2, "importance_ess": 30.0}, "warning", "Raise --draws"),
    ],
)
def test_khat_of_an_approximation(notes, level, words):
    found = finding(diagnose(healthy("svi", **notes)), "k-hat")
    assert found.level == level
    assert words in found.words


def test_laplace_is_not_told_to_use_the_options_of_svi():
    words = finding(diagnose(healthy("laplace", khat_guide=1.2, corrected=0)), "k-hat").words
    assert "use --method svi or nuts" in words
    assert "--guide" not in words


def test_how_an_optimisation_ended():
    assert finding(diagnose(healthy("svi", stopped="steps", steps=9)), "convergence").level == "warning"
    assert finding(diagnose(healthy("svi", stopped="converged", steps=9)), "convergence").level == "good"
    assert finding(diagnose(healthy("laplace", flat_directions=4)), "flat directions").words.startswith("4 directions")
    assert finding(diagnose(healthy("map")), "uncertainty").level == "warning"


@pytest.mark.parametrize(("share", "level"), [(0.02, "warning"), (0.5, "problem")])
def test_draws_that_fold(share, level):
    fit = healthy()
    fit.groups["tokens"]["regime"][:, : int(share * DRAWS)] = 2
    found = finding(diagnose(fit), "regime at the data")
    assert found.level == level
    assert "tighten the prior" in found.words


def test_heads_that_were_matched_and_likelihoods_that_cannot_be_compared():
    assert "25 % of the draws" in finding(diagnose(healthy(heads_reordered=0.25)), "heads").words
    assert "raised to a power" in finding(diagnose(healthy(power=0.1)), "leave-one-out").words
    naive = diagnose(healthy(jacobian=0))
    assert finding(naive, "likelihood").level == "problem"
    assert naive.verdict == "not reliable"


def test_one_sequence_cannot_be_left_out():
    fit = healthy()
    fit.groups["log_likelihood"]["u"] = fit.groups["log_likelihood"]["u"][..., :1]
    assert "one sequence only" in finding(diagnose(fit), "leave-one-out").words


def test_a_sequence_that_decides_everything():
    fit = healthy()
    fit.groups["log_likelihood"]["u"][..., 0] = 12 * np.random.default_rng(1).standard_t(2, size=(CHAINS, DRAWS))
    diagnosis = diagnose(fit)
    assert diagnosis.numbers["loo_khat_bad"] == 1
    assert "refit without them" in finding(diagnosis, "leave-one-sequence-out").words


def test_a_prior_that_decides():
    fit = healthy()
    fit.groups["log_prior"]["qk_matrix"][:] = -50 * (fit.groups["posterior"]["qk_matrix"] ** 2).sum((-3, -2, -1))
    fit.groups["log_likelihood"]["u"] *= 0.01
    found = finding(diagnose(fit), "prior")
    assert found.level == "warning"
    assert "the data say little of them" in found.words


def test_where_every_sequence_decides_no_refit_without_them_is_advised():
    fit = healthy()
    fit.groups["log_likelihood"]["u"][:] = 3 * np.random.default_rng(1).standard_t(3, size=(CHAINS, DRAWS, SEQUENCES))
    words = finding(diagnose(fit), "leave-one-sequence-out").words
    assert "every one decides too much" in words
    assert "refit without them" not in words


class TestWhatWasLearned:
    """Posterior beside prior, parameter by parameter."""

    @staticmethod
    def fit(scales, *, shift=0.0, data=1.0, **attributes):
        fit = healthy(**attributes)
        generator = np.random.default_rng(7)
        prior = 0.7 * generator.normal(size=(1, 500, 1, 2, 2))
        values = 0.7 * np.asarray(scales) * generator.normal(size=(CHAINS, DRAWS, 1, 2, 2)) + shift
        u = data * generator.normal(size=(SEQUENCES, 8, 2))
        groups = {**fit.groups, "prior": {"qk_matrix": prior}, "observed_data": {"u": u}}
        groups["posterior"] = {**fit.groups["posterior"], "qk_matrix": values}
        return Fit(fit.method, groups, fit.dims, {}, fit.attributes)

    def test_nothing(self):
        diagnosis = diagnose(self.fit(1.0))
        found = finding(diagnosis, "learned of qk_matrix")
        assert found.level == "problem"
        assert "nothing: the posterior is the prior in 4 of 4 entries (mean contraction" in found.words
        assert abs(diagnosis.numbers["contraction_qk_matrix"]) < 0.1
        assert diagnosis.verdict == "not reliable"

    def test_everything_and_a_shift_alone(self):
        for fit in (self.fit(0.2), self.fit(1.0, shift=0.5)):
            assert finding(diagnose(fit), "learned of qk_matrix").level == "good"

    def test_some_entries_are_named(self):
        found = finding(diagnose(self.fit([[1.0, 0.2], [0.2, 0.2]])), "learned of qk_matrix")
        assert (found.level, "1 of 4 entries are as the prior has them: [0, 0, 0] (" in found.words) == ("note", True)
        found = finding(diagnose(self.fit([[1.0, 0.2], [1.0, 0.2]])), "learned of qk_matrix")
        assert found.level == "warning"

    @pytest.mark.parametrize(
        ("scale", "attributes", "words"),
        [
            (0.03, {}, "attention is uniform; use --standardise"),
            (0.03, {"standardised": 1}, "attention is uniform; raise the scale of the prior (--prior-scale)"),
            (30.0, {}, "attention is a choice of one token; use --standardise"),
            (1.0, {}, None),
        ],
    )
    def test_the_scale_of_the_data(self, scale, attributes, words):
        diagnosis = diagnose(self.fit(0.2, data=scale, **attributes))
        assert diagnosis.numbers["data_rms"] == pytest.approx(scale, rel=0.2)
        if words is None:
            assert not [found for found in diagnosis.findings if found.about == "scale of the data"]
        else:
            found = finding(diagnosis, "scale of the data")
            assert (found.level, words in found.words) == ("warning", True)

    def test_a_text_is_not_told_to_use_the_options_of_a_file(self):
        fit = self.fit(0.2, source="text")
        fit.groups["tokens"]["regime"][:] = 2
        fit.groups["sample_stats"]["diverging"][:] = True
        fit.groups["posterior"]["smallest_abs_det"][:] = 0.0
        words = str(diagnose(fit))
        assert "--prior-scale" not in words
        assert "--standardise" not in words


def test_few_draws_are_said_to_judge_nothing():
    fit = healthy()
    groups = {group: {name: values[:1, :4] for name, values in found.items()} for group, found in fit.groups.items()}
    groups["prior"] = {"qk_matrix": np.random.default_rng(0).normal(size=(1, 500, 1, 2, 2))}
    diagnosis = diagnose(Fit("nuts", groups, fit.dims, {}, fit.attributes))
    assert "4 draws are too few to fit the tail" in finding(diagnosis, "leave-one-out").words
    assert "4 draws are too few to compare with the prior" in finding(diagnosis, "learned of qk_matrix").words
    json.dumps(diagnosis.as_dict(), allow_nan=False)
