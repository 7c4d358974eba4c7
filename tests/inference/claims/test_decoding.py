"""Predictions by margins: verdicts on simulated tables with known answers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from language_tables import TEXTS, TOKENS, prediction_tables
from scipy import stats

from probattn.errors import InputError
from probattn.inference.claims.claim import Settings, verdict_in_words
from probattn.inference.claims.decoding import decoding_claim, draw_prediction, judge_prediction, relevant_predictors
from probattn.inference.studies.language.location import FIRST
from probattn.inference.studies.language.prediction import (
    DECISIVE,
    OTHERS,
    Prediction,
    predict,
    predictor_names,
    scores,
)
from probattn.inference.studies.language.results import Results

GIVEN = "given position and entropy"
OWN = "generator_sigma_min_mean"


def predicted(*arguments, **more):
    return predict(prediction_tables(*arguments, **more), resamples=150)


def claim_on(prediction):
    results = Results(None, prediction, 0.0, {})
    return decoding_claim(None, Settings(), load=lambda *_: results)


class TestVerdict:
    def test_holds_if_the_margin_predicts_better_than_entropy(self):
        claim = claim_on(predicted(4.0))
        assert verdict_in_words(claim) == "holds"
        assert claim.measured[f"partial_rho_{OWN}_{DECISIVE}_low"] > 0.5
        assert claim.measured[f"lead_of_{OWN}_over_entropy"] > 0

    def test_holds_with_a_condition_if_entropy_predicts_better(self):
        claim = claim_on(predicted(0.5))
        words = "holds if a margin is not required to predict better than the entropy of the next-token distribution"
        assert verdict_in_words(claim) == words

    def test_does_not_hold_for_margins_that_know_nothing(self):
        assert verdict_in_words(claim_on(predicted(0.0))) == "does not hold"

    def test_does_not_hold_for_margins_that_know_the_entropy_alone(self):
        prediction = predicted(0.0, through_entropy=3.0)
        alone = prediction.bands[DECISIVE]["alone"]["low"][prediction.predictors.index(OWN)]
        assert alone > 0.3
        assert verdict_in_words(claim_on(prediction)) == "does not hold"

    def test_does_not_hold_backwards(self):
        prediction = predicted(-4.0)
        assert not relevant_predictors(prediction)
        assert judge_prediction(prediction) == ("not_supported", None)
        assert "the most negative −log σ_min" in claim_on(prediction).finding

    @pytest.mark.parametrize(
        ("name", "value"),
        [("control_positive_rho", 0.5), ("control_positive_rho", np.nan), ("control_negative_holds_zero", 0.5)],
    )
    def test_nothing_is_said_where_a_control_fails(self, name, value):
        prediction = predicted(4.0)
        claim = claim_on(replace(prediction, facts={**prediction.facts, name: value}))
        assert claim.verdict == "not_run"
        assert "a control failed" in claim.condition

    def test_without_noise(self):
        assert claim_on(None).condition == "the sensitivity to noise was not measured"

    def test_names_the_quick_form_and_draws(self):
        claim = claim_on(predicted(1.0))
        assert "(Quick form" in claim.statement
        assert "depends on the basis" in " ".join(
            label.get_text() for label in claim.figures["decoding"].axes[2].get_yticklabels()
        )

    def test_nothing_found_by_chance(self):
        """Families of forty predictors that know nothing: few may hold one whose interval misses zero."""
        found = 0
        for seed in range(12):
            tables = prediction_tables(0.0, seed=seed)
            band = predict(tables, resamples=60, seed=seed).bands[DECISIVE][GIVEN]
            found += any(low > 0 or high < 0 for low, high in zip(band["low"], band["high"], strict=True))
        assert found <= 3  # 5 % of 12 are expected; more than 3 have a probability of 0.2 %


class TestPrediction:
    def test_correlations_are_those_of_scipy(self):
        tables = prediction_tables(1.0)
        prediction = predict(tables, resamples=60)
        margin = -np.log(tables["text"].sigma_min.values.astype(float)).mean(1)[:, FIRST:]
        target = tables["noise"][DECISIVE].values[:, FIRST:]
        k = prediction.predictors.index(OWN)
        margin, target = margin[:, :-1], target[:, :-1]  # the last token of a text has no successor
        plain = stats.spearmanr(margin.ravel(), target.ravel()).statistic
        assert prediction.bands[DECISIVE]["alone"]["estimate"][k] == pytest.approx(plain, abs=1e-9)
        # The partial one is the correlation of what linear regressions of the ranks leave.
        position = np.broadcast_to(np.arange(TOKENS, dtype=float), (TEXTS, TOKENS))[:, FIRST:-1]
        entropy = tables["text"].entropy.values[:, FIRST:-1]
        ranks = [stats.rankdata(part.ravel()) for part in (margin, target, position, entropy)]
        design = np.stack([np.ones_like(ranks[0]), *ranks[2:]], 1)
        left = [rank - design @ np.linalg.lstsq(design, rank, rcond=None)[0] for rank in ranks[:2]]
        partial = np.corrcoef(left)[0, 1]
        assert prediction.bands[DECISIVE][GIVEN]["estimate"][k] == pytest.approx(partial, abs=1e-6)
        assert abs(partial - plain) > 0.02

    def test_surprisal_of_the_next_token_is_that_of_the_next(self):
        tables = prediction_tables(0.0)
        values = tables["text"].surprisal.values.astype(float)
        tables["text"]["sigma_min"][:] = np.exp(-np.roll(values, -1, 1))[:, None]
        prediction = predict(tables, resamples=60)
        k = prediction.predictors.index(OWN)
        assert prediction.bands["next_surprisal"]["alone"]["estimate"][k] == pytest.approx(1)
        assert abs(prediction.bands["surprisal"]["alone"]["estimate"][k]) < 0.2

    def test_all_predictors_that_were_listed(self):
        prediction = predicted(1.0)
        assert prediction.predictors == predictor_names()
        assert len(prediction.predictors) == 40
        assert prediction.facts["tokens"] == TEXTS * (TOKENS - FIRST - 1)
        tables = prediction_tables(1.0)
        del tables["text-eigenvalues"]
        assert len(predict(tables, resamples=60).predictors) == 20

    def test_more_predictors_have_wider_intervals(self):
        tables = prediction_tables(1.0)
        few = {**tables, "text": tables["text"][["sigma_min", "surprisal", "entropy"]]}
        del few["text-eigenvalues"]
        widths = []
        for some in (few, tables):
            prediction = predict(some, resamples=200)
            k = prediction.predictors.index(OWN)
            band = prediction.bands[DECISIVE][GIVEN]
            widths.append(band["high"][k] - band["low"][k])
        assert widths[1] > 1.1 * widths[0]

    def test_scores_are_large_where_margins_are_small(self):
        tables = prediction_tables(0.0)
        for kind, score in (("sigma_min", lambda m: -np.log(m)), ("logabsdet", lambda m: -m)):
            found = scores(tables["text"], "generator", kind)
            exact = score(tables["text"][kind].values.astype(float))
            np.testing.assert_allclose(found["mean"], exact.mean(1))
            np.testing.assert_allclose(found["largest"], exact.max(1))
            np.testing.assert_allclose(found["early"], exact[:, :2].mean(1))
            np.testing.assert_allclose(found["late"], exact[:, 4:].mean(1))
        assert scores(tables["text"], "update", "complex") == {}

    def test_other_predictors_and_controls(self):
        prediction = predicted(0.0)
        others = prediction.others[DECISIVE]["alone"]["estimate"]
        assert others[OTHERS.index("local_all")] > 0.9
        assert others[OTHERS.index("entropy")] > 0.5
        assert abs(others[OTHERS.index("head_alone_sigma_min")]) < 0.2
        assert prediction.others[DECISIVE][GIVEN]["estimate"][OTHERS.index("entropy")] == 0

    def test_tables_must_share_texts(self):
        tables = prediction_tables(0.0)
        with pytest.raises(InputError, match="'noise'"):
            predict({"text": tables["text"]})
        apart = tables["noise"].assign_coords(sequence=100 + np.arange(TEXTS))
        with pytest.raises(InputError, match="0 texts have both margins and noise; at least 2"):
            predict({**tables, "noise": apart})
        some = {**tables, "noise": tables["noise"].isel(sequence=slice(0, 5))}
        assert predict(some, resamples=60).facts["texts"] == 5

    def test_survives_json(self):
        prediction = predicted(1.0)
        again = Prediction.from_dict(json.loads(json.dumps(prediction.as_dict())))
        assert judge_prediction(again) == judge_prediction(prediction)
        assert len(draw_prediction(again).axes) == 3

    def test_the_first_tokens_do_not_count(self):
        tables = prediction_tables(1.0)
        before = predict(tables, resamples=60).bands[DECISIVE][GIVEN]["estimate"]
        tables["text"].sigma_min[:, :, :FIRST] = 1e-9
        assert predict(tables, resamples=60).bands[DECISIVE][GIVEN]["estimate"] == before
