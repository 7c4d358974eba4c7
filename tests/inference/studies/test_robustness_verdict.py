"""Intervals that cover, verdicts that turn, and pages and figures that say what was found."""

import json
from dataclasses import replace

import numpy as np
import pytest
from small_study import BARRIER, PLAIN, render

from probattn.inference.studies.robustness.arms import Arm
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES, label
from probattn.inference.studies.robustness.evaluation import MEASURES
from probattn.inference.studies.robustness.figures import draw_study
from probattn.inference.studies.robustness.rules import (
    DECISIVE,
    LITERAL,
    LITERAL_AT_PLAIN_SCALE,
    LONGER,
    NEGATIVE,
    POSITIVE,
    POSITIVE_ATTACK,
    SHORTER,
)
from probattn.inference.studies.robustness.study import QUANTILES, Record
from probattn.inference.studies.robustness.summary import Summary, paired_difference, shared_seeds, summarise
from probattn.inference.studies.robustness.table import escape
from probattn.inference.studies.robustness.verdict import judge_study
from probattn.plotting.style import words


class TestDifference:
    def test_intervals_cover(self):
        """Differences with effects of seeds, of windows and of both: 95 % intervals hold the truth so often, about."""
        generator, held = np.random.default_rng(0), 0
        for k in range(200):
            values = generator.normal(size=(5, 1)) + generator.normal(size=(1, 30)) + generator.normal(size=(5, 30))
            low, high = paired_difference(0.3 + values, resamples=200, seed=k).interval()
            held += low <= 0.3 <= high
        assert 0.91 <= held / 200 <= 1.0

    def test_the_error_of_seeds_alone(self):
        values = np.array([[1.0], [2.0], [3.0], [6.0]]).repeat(50, axis=1)
        found = paired_difference(values, resamples=20_000)
        assert found.mean == 3.0
        assert found.error == pytest.approx(np.std(values[:, 0], ddof=1) / 2, rel=0.02)

    def test_several_at_once_are_wider(self):
        found = paired_difference(np.random.default_rng(0).normal(size=(5, 20)))
        assert found.interval(10)[0] < found.interval()[0] < found.mean < found.interval()[1] < found.interval(10)[1]


JUDGED = (
    PLAIN,
    Arm(NEGATIVE, reseed=1000),
    Arm(POSITIVE, relative_noise=0.2),
    Arm(POSITIVE_ATTACK, adversarial=0.1),
    BARRIER,
    Arm("embeddings one_sided 0.05", "embeddings", "one_sided", 0.05),
    Arm(LITERAL_AT_PLAIN_SCALE, "embeddings", "logdet", 0.05, steer="plain"),
)


def planted(effects, *, arms=JUDGED, seeds=5, windows=40, diverged=()):
    """Records in which arms differ from plain by given amounts, by family, beside noise of seeds and windows."""
    effects = {POSITIVE: {"relative noise": -0.3}, POSITIVE_ATTACK: {"embedding attack": -0.3}, **effects}
    records = []
    for seed in range(seeds):
        shared = np.random.default_rng(seed).normal(2.3, 0.2, windows)
        for k, arm in enumerate(arms):
            generator = np.random.default_rng([seed, k])
            own = effects.get(arm.name, {})
            names = [(CLEAN, CLEAN), *((f, label(f, level)) for f, levels in FAMILIES.items() for level in levels)]
            luck = generator.normal(0, 0.002)
            losses = {
                name: shared
                + 0.5 * (family != CLEAN)
                + own.get(family, 0.0)
                + luck
                + generator.normal(0, 0.01, windows)
                for family, name in names
            }
            losses |= {name: generator.normal(0.1, 0.01, windows) for name in MEASURES}
            facts = {"rms": 0.5, "parameter_norm": 10.0}
            for when in ("residual", "before"):
                facts[f"{when}_determinant_negative"] = 0.0
                facts |= {f"{when}_{kind}_{q:g}": q for kind in ("determinant", "singular_value") for q in QUANTILES}
            stopped = 7 if (arm.name, seed) in diverged else None
            records.append(Record(arm.name, seed, stopped, {} if stopped else losses, facts, [0.5, 0.6]))
    return records


def verdict_of(effects, **options):
    return judge_study(summarise(planted(effects, **options), options.get("arms", JUDGED), resamples=300))


class TestVerdict:
    def test_a_planted_effect_is_found(self):
        found = verdict_of({LITERAL: {"relative noise": -0.05, "absolute noise": -0.05}})
        assert found.overall == "supported"
        assert found.condition is None
        assert LITERAL in found.words["relative noise"]

    def test_a_null_is_not(self):
        found = verdict_of({})
        assert found.overall == "not_supported"
        assert "0 of 2" in found.words["relative noise"]
        assert "differs from plain training in 0 of 9" in found.words["negative control"]

    def test_scale_alone_is_absolute_noise_alone(self):
        found = verdict_of({LITERAL: {"absolute noise": -0.05, "relative noise": 0.02}})
        assert found.overall == "supported_within"
        assert found.condition.startswith(f"only under some corruptions (absolute noise: {LITERAL})")
        assert "not a matter of scale: does not hold" in found.condition
        assert found.corruptions == "noise of a fixed size on the embeddings"

    def test_a_gain_that_stays_at_the_plain_scale(self):
        gain = {"absolute noise": -0.05}
        found = verdict_of({LITERAL: gain, LITERAL_AT_PLAIN_SCALE: gain})
        assert "not a matter of scale: holds" in found.words["scale"]

    def test_the_attack_on_embeddings_decides_if_its_own_control_is_found(self):
        gain = {LITERAL: {"embedding attack": -0.05}}
        assert verdict_of(gain).overall == "supported"
        blind = verdict_of({**gain, POSITIVE_ATTACK: {"embedding attack": 0.0}})
        assert blind.overall == "supported_within"
        assert "not found to help" in blind.words["positive control of attacks"]

    @pytest.mark.parametrize("family", [name for name in FAMILIES if name not in DECISIVE])
    def test_other_corruptions_are_a_condition(self, family):
        found = verdict_of({LITERAL: {family: -0.05}})
        assert found.overall == "supported_within"
        assert family in found.condition

    def test_robustness_that_costs_accuracy_does_not_count(self):
        found = verdict_of({LITERAL: {"relative noise": -0.2, "absolute noise": -0.2, CLEAN: 0.06}})
        assert found.overall == "not_supported"

    def test_a_gain_too_small_to_matter_is_none(self):
        """One that is sure, but less than a twentieth of the half bit that the corruption costs."""
        exact = [record for record in planted({}) if record.arm == "plain"]
        for gain, overall in ((0.02, "not_supported"), (0.03, "supported")):
            records = planted({})
            for k, record in enumerate(records):
                if record.arm == LITERAL:
                    losses = {
                        name: values - gain * (name != CLEAN) for name, values in exact[record.seed].losses.items()
                    }
                    records[k] = replace(record, losses=losses)
            summary = summarise(records, JUDGED, resamples=300)
            assert summary.arms[LITERAL].differences["relative noise"].interval()[1] < 0
            assert judge_study(summary).overall == overall

    def test_two_percent_is_the_limit(self):
        gain = {"relative noise": -0.2}
        assert verdict_of({LITERAL: {**gain, CLEAN: 0.035}}).overall == "supported"
        assert verdict_of({LITERAL: {**gain, CLEAN: 0.05}}).overall == "not_supported"

    def test_a_positive_control_that_fails_leaves_nothing_to_say(self):
        found = verdict_of({POSITIVE: {"relative noise": 0.0}})
        assert found.overall == "not_run"
        assert "positive control" in found.condition

    def test_arms_without_a_run_leave_the_question_open(self):
        """As with ``--arms``: what was run cannot speak for the rest, unless it shows the claim by itself."""
        ran = [record for record in planted({}) if record.arm != LITERAL]
        found = judge_study(summarise(ran, JUDGED, resamples=300))
        assert found.overall == "not_run"
        assert f"1 of 2 have no run ({LITERAL})" in found.condition
        assert "0 of 2 barrier arms (1 of which have no run)" in found.words["relative noise"]
        gain = {"relative noise": -0.05}
        (other,) = {arm.name for arm in JUDGED if arm.barrier} - {LITERAL}
        shown = [record for record in planted({other: gain}) if record.arm != LITERAL]
        assert judge_study(summarise(shown, JUDGED, resamples=300)).overall == "supported"

    def test_a_diverged_run_shows_nothing(self):
        effect = {LITERAL: {"relative noise": -0.05}}
        assert verdict_of(effect, diverged={(LITERAL, 2)}).overall == "not_supported"
        assert verdict_of(effect, diverged={("plain", 2)}).overall == "not_run"

    def test_an_effect_of_other_arms_does_not_speak_for_the_barrier(self):
        gain = {"relative noise": -0.5, "absolute noise": -0.5}
        mixed = Arm("mixed", "residual", "one_sided", 0.05, relative_noise=0.2, reference=POSITIVE)
        effects = {POSITIVE: gain, LITERAL_AT_PLAIN_SCALE: gain, "mixed": gain}
        assert verdict_of(effects, arms=(*JUDGED, mixed)).overall == "not_supported"

    def test_seeds_that_disagree_are_no_evidence(self):
        records = planted({LITERAL: {"relative noise": -0.04}})
        wild = [
            replace(record, losses={name: values + 0.05 * (record.seed - 2) for name, values in record.losses.items()})
            if record.arm == LITERAL
            else record
            for record in records
        ]
        assert judge_study(summarise(wild, JUDGED, resamples=300)).overall == "not_supported"

    def test_many_arms_are_adjusted_for(self):
        """Twenty arms of which one is lucky by what a single interval would take for an effect."""
        arms = (*JUDGED, *(replace(BARRIER, name=f"arm {k}") for k in range(20)))
        records = planted({}, arms=arms)
        summary = summarise(records, arms, resamples=300)
        error = summary.arms["arm 0"].differences["relative noise"].error
        lucky = {"arm 0": {"relative noise": -4 * error - summary.arms["arm 0"].differences["relative noise"].mean}}
        found = judge_study(summarise(planted(lucky, arms=arms), arms, resamples=300))
        assert found.overall == "not_supported"
        assert "arm 0" not in found.words["relative noise"]


@pytest.fixture(scope="module")
def records():
    return planted({LITERAL: {"absolute noise": -0.05}}, diverged={("embeddings one_sided 0.05", 1)})


class TestResults:
    def test_a_summary_survives_json(self, records):
        summary = summarise(records, JUDGED, resamples=50)
        again = Summary.from_dict(json.loads(json.dumps(summary.as_dict())))
        assert judge_study(again) == judge_study(summary)
        assert again == summary

    def test_the_table_has_everything_and_escapes_it(self, records):
        table = render(summarise(records, JUDGED, resamples=50), records, JUDGED)
        assert "**Verdict: holds if the corruption is " in table
        assert "seed 1 at step 7" in table
        assert r"a\|\<b\>.txt" in table
        assert escape(LITERAL) in table
        assert "relative noise 0.4" in table
        assert "![figure](figure.png)" in table
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert all(not line.replace(r"\|", "").endswith("| |") for line in rows)
        for block in table.split("\n\n"):
            widths = {line.replace(r"\|", "").count("|") for line in block.splitlines() if line.startswith("|")}
            assert len(widths) <= 1

    def test_figures(self, records):
        figures = draw_study(summarise(records, JUDGED, resamples=50))
        names = ["questions", "characters", "strength", "margins", "others-1"]
        assert list(figures) == [f"robustness-{name}" for name in names]
        questions, characters, strength, margins, others = figures.values()
        assert [axis.get_title() for axis in questions.axes] == [
            CLEAN,
            "relative noise",
            "embedding attack",
            "character attack",
        ]
        assert [axis.get_title() for axis in characters.axes] == ["swaps", "substitutions", "typos", "deletions"]
        shown = [{label.get_text() for label in figure.axes[0].get_yticklabels()} for figure in (questions, others)]
        assert shown[0] == {LITERAL, POSITIVE, POSITIVE_ATTACK}
        assert shown[0] | shown[1] == {words(arm.name) for arm in JUDGED[1:]}
        assert PLAIN.name in [line.get_label() for line in strength.axes[0].lines]
        assert len(margins.axes[0].lines) == 4
        for figure in figures.values():
            figure.draw_without_rendering()

    def test_no_panel_has_more_than_six_arms(self):
        arms = (*JUDGED, *(replace(BARRIER, name=f"arm {k}") for k in range(20)))
        figures = draw_study(summarise(planted({}, arms=arms), arms, resamples=20))
        seen = set()
        for name, figure in figures.items():
            arms_shown = {label.get_text() for label in figure.axes[0].get_yticklabels()}
            if name in ("robustness-strength", "robustness-margins"):
                arms_shown = {line.get_label() for line in figure.axes[0].lines}
            assert len(arms_shown) <= 6
            seen |= arms_shown
        assert {words(arm.name) for arm in arms} <= seen

    def test_equal_loss_and_equal_compute(self):
        """Runs of half and twice the steps that lie on a line: an arm on it gains nothing at equal clean loss."""
        arms = (*JUDGED, Arm(SHORTER, length=0.5), Arm(LONGER, length=2.0))
        better = {CLEAN: -0.2, "relative noise": -0.4}
        worse = {CLEAN: 0.2, "relative noise": 0.4}
        on_it = {CLEAN: -0.1, "relative noise": -0.2, "swaps": -0.1}
        outside = {CLEAN: 0.5}
        effects = {LONGER: better, SHORTER: worse, LITERAL: on_it, "embeddings one_sided 0.05": outside}
        summary = summarise(planted(effects, arms=arms), arms, resamples=200)
        found = summary.arms[LITERAL]
        assert found.equal_loss["relative noise"].mean == pytest.approx(0, abs=0.01)
        assert found.equal_loss["swaps"].mean == pytest.approx(-0.1, abs=0.01)
        assert found.equal_compute["relative noise"].mean == pytest.approx(0.2, abs=0.01)
        assert found.equal_compute[CLEAN].mean == pytest.approx(0.1, abs=0.01)
        assert summary.arms["embeddings one_sided 0.05"].equal_loss == {}
        page = render(summary, planted(effects, arms=arms), arms)
        assert "## At equal clean loss" in page
        assert "## At equal compute" in page

    def test_seeds_that_some_arms_lack_do_not_take_the_comparisons_away(self):
        """Plain training and one arm have two more seeds than the runs of half and twice the steps."""
        arms = (*JUDGED, Arm(SHORTER, length=0.5), Arm(LONGER, length=2.0))
        effects = {LONGER: {CLEAN: -0.2}, SHORTER: {CLEAN: 0.2}, LITERAL: {CLEAN: -0.1}}
        records = planted(effects, arms=arms)
        seeds = sorted({record.seed for record in records})
        more = [record for record in records if record.arm in (PLAIN.name, LITERAL)]
        more = [replace(record, seed=record.seed + len(seeds)) for record in more]
        found = summarise([*records, *more], arms, resamples=200).arms[LITERAL]
        alone = summarise(records, arms, resamples=200).arms[LITERAL]
        assert found.runs == 2 * alone.runs
        assert found.equal_loss["swaps"] == alone.equal_loss["swaps"]
        assert found.equal_compute[CLEAN] == alone.equal_compute[CLEAN]
        assert shared_seeds([*records, *more]) == tuple(seeds)
        apart = [
            record for record in records if (record.arm, record.seed) in ((PLAIN.name, seeds[0]), (LITERAL, seeds[1]))
        ]
        assert shared_seeds(apart) == tuple(seeds[:2])

    def test_a_summary_of_other_corruptions_is_read_and_shows_what_it_has(self):
        """One that was written before attacks were measured."""
        summary = summarise(planted({LITERAL: {"relative noise": -0.05}}), JUDGED, resamples=50)
        content = json.loads(json.dumps(summary.as_dict()))
        for fields in content["arms"]:
            del fields["equal_loss"], fields["equal_compute"]
            for part in (fields["losses"], fields["differences"]):
                for name in [name for name in part if "attack" in name or "typos" in name]:
                    del part[name]
        found = judge_study(Summary.from_dict(content))
        assert found.overall == "supported"
        assert "0 of 2" in found.words["typos"]
