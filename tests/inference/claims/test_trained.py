"""Places of blocks: verdicts on simulated tables with known answers, and on small models."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from language_tables import LAYERS, TEXTS, location_tables, table

from probattn.errors import InputError
from probattn.inference.claims import language
from probattn.inference.claims.claim import Settings, verdict_in_words
from probattn.inference.claims.language import language_results
from probattn.inference.claims.trained import judge_location, trained_claim
from probattn.inference.studies.language.location import FIRST, STATISTICS, Location, locate, swapped_apart
from probattn.inference.studies.language.plan import Growth, Plan
from probattn.inference.studies.language.results import Results, summarise

ZERO = np.zeros(LAYERS)
PATTERN = np.array([3.0, -3.0, 2.0, -2.0, 3.0, 0.0])
NEARER = np.array([-0.3, -0.2, -0.3, -0.2, 0.0, 0.0])
RECORD = {
    "environment": {"device": "cpu", "processor": "one", "date": "2026-01-01T00", "command": "study", "seed": 0},
    "model": {"name": "model"},
    "corpus": {"name": "text"},
}


def claim_on(tables, **more):
    results = summarise(tables, RECORD, resamples=200)
    return trained_claim(None, Settings(), load=lambda *_: replace(results, **more))


class TestVerdict:
    @pytest.mark.parametrize(
        ("volume", "nearest", "words"),
        [
            (PATTERN, NEARER, "holds"),
            (PATTERN, ZERO, "holds if only the volume log|det J_i| is claimed, not the smallest singular value"),
            (ZERO, NEARER, "holds if only the smallest singular value is claimed, not the volume log|det J_i|"),
            (ZERO, ZERO, "does not hold"),
            (0.2 * PATTERN, ZERO, "does not hold"),  # a difference below a nat does not count, however certain
            (PATTERN, -NEARER, "holds if only the volume log|det J_i| is claimed, not the smallest singular value"),
        ],
        ids=["both", "volume", "nearest", "neither", "small", "away from the boundary"],
    )
    def test_is_that_of_what_was_put_in(self, volume, nearest, words):
        claim = claim_on(location_tables(volume, nearest))
        assert verdict_in_words(claim) == words
        assert claim.measured["layers_volume_apart"] == (np.abs(volume) >= 1).sum()
        assert claim.measured["layers_nearest_apart"] == (nearest <= -0.05).sum()
        assert "Measured on model on text, 2026-01-01" in claim.finding
        assert sorted(claim.figures) == ["trained-map", "trained-profiles"]

    def test_one_control_that_does_the_same_is_enough_against_it(self):
        tables = location_tables(PATTERN, NEARER)
        for suffix in ("", "-eigenvalues"):
            tables[f"turned_output{suffix}"] = tables[f"text{suffix}"]
        claim = claim_on(tables)
        assert verdict_in_words(claim) == "does not hold"
        assert claim.measured["layers_volume_apart_from_random_weights"] == 5
        assert claim.measured["layers_volume_apart_from_turned_output"] == 0

    def test_shuffled_text_is_no_control_of_the_weights(self):
        location = locate(location_tables(PATTERN, NEARER), resamples=100)
        assert location.apart["volume"]["shuffled_text"] == []
        assert location.holds("volume")

    def test_nothing_is_said_without_controls_or_with_a_control_that_fails(self):
        tables = location_tables(PATTERN, NEARER)
        assert claim_on(tables, swapped=0.5).condition.startswith("a control failed")
        assert claim_on(tables, swapped=float("nan")).verdict == "not_run"
        only = {name: part for name, part in tables.items() if name in ("text", "shuffled_text")}
        assert verdict_in_words(claim_on(only)) == "not run (the margins of the controls were not measured)"

    def test_eigenvalues_are_reported_and_do_not_decide(self):
        tables = location_tables(PATTERN, NEARER)
        without = {name: part for name, part in tables.items() if "eigenvalues" not in name}
        assert verdict_in_words(claim_on(without)) == "holds"
        claim = claim_on(tables)
        assert claim.measured["layers_spectral_apart"] == 4
        assert "layers_spectral_apart_from_random_weights" not in claim_on(without).measured

    def test_by_the_rule_alone(self):
        location = locate(location_tables(PATTERN, NEARER), resamples=100)
        assert judge_location(location, 0.05) == ("supported", None)


class TestLocation:
    def test_profiles_are_quantiles_behind_the_first_tokens(self):
        tables = location_tables(PATTERN, NEARER)
        tables["text"].logabsdet[:, :, :FIRST] = 1e6
        location = locate(tables, resamples=100)
        seen = tables["text"].logabsdet.values[:, :, FIRST:].astype(float)
        for order in (0.01, 0.5, 0.99):
            expected = np.quantile(seen, order, axis=(0, 2), method="inverted_cdf")
            band = location.profiles["text"]["logabsdet"][f"{order:g}"]
            np.testing.assert_allclose(band["estimate"], expected)
        assert location.facts["logabsdet_first_16_q50"] == 1e6
        assert location.facts["tokens"] == TEXTS * tables["text"].sizes["token"]
        assert 0.01 < location.facts["negative_text"] < 0.03
        assert location.facts["negative_text_low"] <= location.facts["negative_text"]

    def test_differences_are_those_of_the_quantiles_of_what_each_has(self):
        tables = location_tables(PATTERN, NEARER)
        tables["turned_output"] = tables["turned_output"].isel(sequence=slice(2, 8), token=slice(0, None, 2))
        location = locate(tables, resamples=100)
        mine = tables["text"].logabsdet.sel(token=slice(FIRST, None)).values
        theirs = tables["turned_output"].logabsdet.sel(token=slice(FIRST, None)).values
        median = {"axis": (0, 2), "method": "inverted_cdf"}
        expected = np.quantile(mine, 0.5, **median) - np.quantile(theirs, 0.5, **median)
        found = location.differences["volume"]
        np.testing.assert_allclose(found["turned_output"]["estimate"], expected, atol=1e-6)
        width = {name: np.subtract(band["high"], band["low"]).mean() for name, band in found.items()}
        assert width["turned_output"] > 1.2 * width["random_weights"]  # fewer texts, wider intervals

    def test_intervals_hold_for_all_layers_at_once(self):
        """Of families of intervals for no difference at all, few may miss zero somewhere."""
        missed = 0
        for seed in range(24):
            tables = location_tables(ZERO, ZERO, seed=seed, texts=12, shared=0.0)
            tables = {name: part for name, part in tables.items() if name in ("text", "turned_output")}
            band = locate(tables, resamples=100).differences["volume"]["turned_output"]
            missed += any(low > 0 or high < 0 for low, high in zip(band["low"], band["high"], strict=True))
        assert missed <= 4  # 2.5 % of 24 are expected; more than 4 have a probability of 0.03 %

    def test_swapping_finds_what_ignores_the_pairs(self):
        tables = location_tables(PATTERN, NEARER)
        assert swapped_apart(tables, "turned_output", permutations=6, resamples=100) <= 1 / 6
        assert np.isnan(swapped_apart(tables, "exchanged_output"))
        one_sided = dict(tables)
        one_sided["turned_output"] = tables["turned_output"].assign(logabsdet=tables["text"].logabsdet - 30)
        found = locate(one_sided, resamples=100).apart["volume"]["turned_output"]
        assert found == list(range(LAYERS))

    def test_the_step_at_which_a_small_model_has_its_shape(self):
        steps, layers = np.array([0, 1, 10, 100]), np.linspace(-1, 1, 3)
        size = np.array([0.1, 0.9, 0.2, 1.0])  # the first rise does not last
        volume = size[:, None, None, None] * layers[None, None, :, None] + np.zeros((4, 2, 3, 5))
        part = table(dict.fromkeys(("logabsdet", "sigma_min", "sign"), volume[0])).expand_dims(run=[0], step=steps)
        part = part.copy(deep=True)
        part["logabsdet"][0] = volume.astype(np.float32)
        part["loss"] = (("run", "step"), np.array([[4.0, 3.0, 2.5, 2.0]]))
        growth = locate({**location_tables(PATTERN, NEARER), "growth": part}, resamples=60).growth
        assert growth["appears"] == [100]
        np.testing.assert_allclose(growth["spread"], [2 * size], rtol=1e-5)
        claim = claim_on({**location_tables(PATTERN, NEARER), "growth": part})
        assert claim.measured["growth_0_loss_then"] == 2.0
        assert "trained-growth" in claim.figures

    def test_survives_json(self):
        location = locate(location_tables(PATTERN, NEARER), resamples=60)
        again = Location.from_dict(json.loads(json.dumps(location.as_dict())))
        assert again.apart == location.apart
        assert again.facts["negative_text"] == pytest.approx(location.facts["negative_text"], rel=1e-4)

    def test_tables_without_text(self):
        with pytest.raises(InputError, match="measure the table 'text' first"):
            locate({})

    def test_every_statistic_has_words(self):
        assert all(statistic.words for statistic in STATISTICS.values())


SHORT = Plan(
    windows=3,
    length=20,
    control_windows=2,
    draws=1,
    chunk=3,
    control_stride=6,
    eigenvalue_stride=6,
    growth=Growth(
        layers=2, dim=8, heads=2, context=20, training_steps=3, batch=2, looks=2, measured_windows=2, stride=9, runs=0
    ),
)


class TestSources:
    def test_the_quick_form_trains_a_model_of_its_own(self, subject, monkeypatch):
        monkeypatch.setattr(language, "quick_tables", lambda corpus, seed: language_quick(corpus, seed))
        claim = trained_claim(subject, Settings())
        assert "(Quick form: a character model" in claim.statement
        assert claim.measured["texts"] == 3
        assert claim.verdict in ("not_supported", "supported", "supported_within", "not_run")

    def test_no_text(self, subject):
        claim = trained_claim(replace(subject, corpus=None), Settings())
        assert verdict_in_words(claim) == "not run (no text was given to measure a language model on)"

    def test_without_transformers(self, subject, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        language.quick_tables.cache_clear()
        claim = trained_claim(replace(subject, seed=7), Settings())
        assert "transformers is not installed" in claim.condition

    def test_full_reads_what_ships(self, subject, monkeypatch):
        results = summarise(location_tables(PATTERN, NEARER), RECORD, resamples=60)
        monkeypatch.setattr(language, "committed_results", lambda: results)
        assert language_results(subject, Settings(full=True)) is results
        claim = trained_claim(subject, Settings(full=True))
        assert "(Quick form" not in claim.statement

    def test_results_survive_json(self):
        results = summarise(location_tables(PATTERN, NEARER), RECORD, resamples=60)
        again = Results.from_dict(json.loads(json.dumps(results.as_dict())))
        assert again.prediction is None
        assert again.origin == results.origin


def language_quick(corpus, seed):
    from probattn.inference.studies.language.quick import quick_tables

    return quick_tables(corpus, seed, SHORT)
