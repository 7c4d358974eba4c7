"""Runs that are alike in all but what is compared, corruptions at their rates, and verdicts that turn."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from listening import listening

from probattn.errors import InputError
from probattn.inference.claims.claim import Settings
from probattn.inference.claims.robustness import quick_study, robustness_claim
from probattn.inference.studies.robustness import __main__ as command
from probattn.inference.studies.robustness import study as runs
from probattn.inference.studies.robustness.arms import ARMS, VARIANTS, Arm, Study
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
from probattn.inference.studies.robustness.study import (
    QUANTILES,
    Record,
    read_study,
    run_study,
    weights_file,
)
from probattn.inference.studies.robustness.summary import Summary, paired_difference, shared_seeds, summarise
from probattn.inference.studies.robustness.table import escape, render_table
from probattn.inference.studies.robustness.training import batches, forward_with_streams, residual_attention, train
from probattn.inference.studies.robustness.verdict import judge_study
from probattn.models.corpus import UNKNOWN, Corpus
from probattn.models.gpt import CharacterGPT, GPTConfig
from probattn.plotting.style import words

TINY = Study(
    seeds=(0, 1), steps=6, batch=4, warmup=2, context=8, dim=8, layers=1, heads=2, rank=2, windows=6, learning_rate=1e-2
)
PLAIN = Arm("plain")
BARRIER = Arm(LITERAL, "embeddings", "logdet", 0.05)


@pytest.fixture(scope="module")
def text():
    words = ["one ", "two ", "three ", "four ", "five ", "six "]
    drawn = "".join(words[k] for k in np.random.default_rng(0).integers(0, 6, 400))
    return Corpus("words", drawn[:1200], drawn[1200:1500], (*sorted(set(drawn)), UNKNOWN))


def same(first, second):
    return all(one.equal(other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


class TestTraining:
    def test_batches_depend_on_the_seed_alone_and_hold_successors(self, text):
        tokens = text.encode(text.text)
        first, again, other = (list(batches(tokens, TINY, seed)) for seed in (0, 0, 1))
        assert len(first) == TINY.steps
        assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(first, again, strict=True))
        assert not first[0][0].equal(other[0][0])
        assert not first[0][0].equal(first[1][0])
        for inputs, targets in first:
            assert inputs.shape == (4, 8)
            assert inputs[:, 1:].equal(targets[:, :-1])

    def test_all_arms_of_a_seed_see_the_same_batches_from_the_same_start(self, text, monkeypatch):
        seen = {}
        step = CharacterGPT.embed

        def spy(model, tokens):
            seen.setdefault(arm.name, []).append((tokens.clone(), model.table.detach().clone()))
            return step(model, tokens)

        monkeypatch.setattr(CharacterGPT, "embed", spy)
        for arm in ARMS[:10] + ARMS[-1:] + VARIANTS[-1:]:
            train(replace(arm, steer=None), 0, text, TINY)
        plain = seen.pop("plain")
        other = seen.pop(NEGATIVE)
        assert not plain[0][0].equal(other[0][0])
        for found in seen.values():
            assert all(a[0].equal(b[0]) for a, b in zip(plain, found, strict=True))
            assert found[0][1].equal(plain[0][1])

    def test_it_is_reproducible_and_leaves_the_random_state(self, text):
        arm = Arm("all at once", "embeddings", "singular_value", 0.1, positions=0.5, windows=0.5, relative_noise=0.1)
        before = torch.random.get_rng_state()
        first, second = train(arm, 3, text, TINY), train(arm, 3, text, TINY)
        assert torch.random.get_rng_state().equal(before)
        assert same(first.model, second.model)
        assert first.path == second.path
        assert len(first.path) == TINY.steps + 1

    @pytest.mark.parametrize(
        "arm", [arm for arm in (*ARMS[1:], *VARIANTS) if arm.steer is None], ids=lambda arm: arm.name
    )
    def test_each_arm_does_something(self, text, arm):
        # So large a step that the cap is passed.
        short = replace(TINY, steps=3, learning_rate=0.3 if arm.cap else TINY.learning_rate)
        plain, found = train(PLAIN, 0, text, short), train(arm, 0, text, short)
        assert found.diverged is None
        assert not same(plain.model, found.model)

    def test_steering_follows_the_path(self, text):
        leader = train(replace(BARRIER, weight=5.0), 0, text, TINY)
        free = train(PLAIN, 0, text, TINY)
        steered = train(Arm("steered", steer=LITERAL), 0, text, TINY, path=leader.path)
        assert max(abs(a - b) for a, b in zip(free.path, leader.path, strict=True)) > 1e-3
        assert steered.path == pytest.approx(leader.path, rel=1e-6)
        last = list(batches(text.encode(text.text), TINY, 0))[-1][0]
        assert float(steered.model.embed(last).detach().square().mean().sqrt()) == pytest.approx(
            leader.path[-1], rel=1e-5
        )
        # Scale is all that it takes over: steered along its own path, plain training is plain training.
        own = train(Arm("steered", steer="plain"), 0, text, TINY, path=free.path)
        torch.testing.assert_close(own.model(last), free.model(last), atol=1e-4, rtol=1e-4)

    def test_a_contractive_stage_stays_below_its_limit(self, text):
        bounded = train(replace(BARRIER, weight=1.0, contraction=0.5), 0, text, TINY).stage.attention()
        assert float(bounded.contraction.detach()) < 0.5
        assert train(replace(BARRIER, weight=1.0), 0, text, TINY).stage.memory_radius is None

    def test_the_length_of_an_arm_is_a_multiple_of_the_studys(self, text):
        half, twice = (train(Arm("x", length=length), 0, text, TINY) for length in (0.5, 2.0))
        assert (len(half.path), len(twice.path)) == (TINY.steps // 2 + 1, 2 * TINY.steps + 1)

    def test_divergence_is_seen(self, text):
        found = train(replace(BARRIER, weight=1e38), 0, text, replace(TINY, steps=40))
        assert found.diverged is not None
        assert len(found.path) == found.diverged + 1

    @pytest.mark.parametrize(
        ("fields", "word"),
        [
            ({"placement": "nowhere"}, "placement"),
            ({"kind": "cubic"}, "kind"),
            ({"weight": -1.0}, "weight"),
            ({"positions": 0.0}, "positions"),
            ({"windows": 2.0}, "windows"),
            ({"contraction": 1.0}, "contraction"),
            ({"length": 0.0}, "length"),
            ({"adversarial": float("nan")}, "adversarial"),
        ],
    )
    def test_arms_that_cannot_be(self, fields, word):
        with pytest.raises(InputError, match=word):
            Arm("x", **fields)

    @pytest.mark.parametrize(
        ("fields", "word"), [({"seeds": (0, 0)}, "seeds"), ({"steps": 0}, "steps"), ({"learning_rate": 0.0}, "rate")]
    )
    def test_studies_that_cannot_be(self, fields, word):
        with pytest.raises(InputError, match=word):
            Study(**fields)

    def test_what_cannot_be_trained(self, text):
        with pytest.raises(InputError, match="path"):
            train(Arm("steered", steer="plain"), 0, text, TINY)
        with pytest.raises(InputError, match="longer text"):
            train(PLAIN, 0, replace(text, text="one two "), TINY)


class TestStudy:
    arms = (PLAIN, BARRIER, Arm("steered", steer=LITERAL))

    def test_an_interrupted_study_goes_on_and_computes_nothing_twice(self, text, tmp_path, monkeypatch):
        whole = run_study(self.arms, TINY, text)
        real, calls = runs._measure, []

        def counted(arm, seed, *rest):
            if len(calls) == 3:
                raise KeyboardInterrupt
            calls.append((arm.name, seed))
            return real(arm, seed, *rest)

        monkeypatch.setattr(runs, "_measure", counted)
        with pytest.raises(KeyboardInterrupt):
            run_study(self.arms, TINY, text, folder=tmp_path)
        first = calls.copy()
        assert len(list(tmp_path.glob("*-?.json"))) == 3
        calls.clear()
        monkeypatch.setattr(
            runs, "_measure", lambda arm, seed, *rest: calls.append((arm.name, seed)) or real(arm, seed, *rest)
        )
        lines = []
        with listening(lambda record: lines.append(record.getMessage())):
            found = run_study(self.arms, TINY, text, folder=tmp_path)
        assert sorted(first + calls) == sorted((arm.name, seed) for arm in self.arms for seed in TINY.seeds)
        assert len(lines) == 6
        assert sum("read in" in line for line in lines) == 3
        for one, other in zip(whole, found, strict=True):
            assert (one.arm, one.seed, one.path, one.facts) == (other.arm, other.seed, other.path, other.facts)
            np.testing.assert_allclose(one.losses[CLEAN], other.losses[CLEAN], atol=1e-6)
        calls.clear()
        run_study(self.arms, TINY, text, folder=tmp_path)
        assert not calls

        # Another setting of one arm makes it and its follower anew; a damaged file is made anew; nothing else is.
        changed = (PLAIN, replace(BARRIER, weight=0.1), self.arms[2])
        (tmp_path / "plain-1.json").write_text("{")
        run_study(changed, TINY, text, folder=tmp_path)
        assert sorted(calls) == [(LITERAL, 0), (LITERAL, 1), ("plain", 1), ("steered", 0), ("steered", 1)]
        calls.clear()
        # Nothing is overwritten by a study of other sizes or of another text.
        for study, corpus in ((replace(TINY, steps=7), text), (TINY, replace(text, heldout=text.heldout[:-1]))):
            with pytest.raises(InputError, match="another study"):
                run_study(changed, study, corpus, folder=tmp_path)
        assert not calls
        assert read_study(changed, replace(TINY, steps=7), text, tmp_path) == []
        assert len(read_study(changed, TINY, text, tmp_path)) == 6

    def test_finished_runs_are_read_with_their_weights(self, text, tmp_path):
        run_study(self.arms, TINY, text, folder=tmp_path)
        (tmp_path / "steered-1.json").unlink()
        records = read_study(self.arms, TINY, text, tmp_path)
        assert [(record.arm, record.seed) for record in records][-2:] == [(LITERAL, 1), ("steered", 0)]
        summary = summarise(records, self.arms, resamples=20)
        assert [arm.runs for arm in summary.arms.values()] == [2, 2, 1]
        assert not summary.arms["steered"].differences
        assert "fewer seeds so far for steered: 1" in render(summary, records, self.arms)
        (tmp_path / f"{LITERAL.replace(' ', '-')}-1.json").unlink()  # which the follower's run depends on
        assert len(read_study(self.arms, TINY, text, tmp_path)) == 4
        state = torch.load(weights_file(tmp_path, "plain", 1), weights_only=True)
        assert torch.equal(state["table"], train(PLAIN, 1, text, TINY).model.table.detach())

    def test_the_command_goes_on_and_reports_what_is_finished(self, text, tmp_path, monkeypatch):
        monkeypatch.setattr(command, "ARMS", self.arms)
        (tmp_path / "train.txt").write_text(text.text)
        (tmp_path / "test.txt").write_text(text.heldout)
        options = command.StudyOptions(
            str(tmp_path / "train.txt"), str(tmp_path / "test.txt"), "words", tmp_path / "out", jobs=1, sizes=TINY
        )
        with pytest.raises(InputError, match="0 finished runs"):
            command.study(replace(options, report=True))
        with pytest.raises(InputError, match="arms"):
            command.study(replace(options, arms=("missing",)))
        assert command.study(replace(options, arms=("plain",))) == 0
        assert json.loads((tmp_path / "out" / "robustness.json").read_text())["summary"]["arms"][1]["runs"] == 0
        assert command.study(options) == 0
        results = json.loads((tmp_path / "out" / "robustness.json").read_text())
        assert results["summary"]["seeds"] == [0, 1]
        assert [found["arm"] for found in results["attacked"]] == [arm.name for arm in self.arms]
        page = (tmp_path / "out" / "robustness.md").read_text()
        assert "python -m probattn.inference.studies.robustness" in page
        assert " on words; seeds 0, 1" in page
        assert "## Stronger attacks" in page
        (tmp_path / "out" / "studies" / "robustness" / "plain-1.json").unlink()
        with pytest.raises(InputError, match="1 finished runs"):
            command.study(replace(options, report=True))

    @pytest.mark.slow  # each process imports the libraries anew
    def test_processes_share_it(self, text, tmp_path):
        alone = run_study(self.arms[:2], TINY, text)
        shared = run_study(self.arms[:2], TINY, text, folder=tmp_path, jobs=2)
        for one, other in zip(alone, shared, strict=True):
            assert (one.arm, one.seed, one.path) == (other.arm, other.seed, other.path)
            np.testing.assert_array_equal(one.losses[CLEAN], other.losses[CLEAN])

    def test_a_record_survives_its_file(self, text, tmp_path):
        (record,) = (
            r for r in run_study(self.arms[:2], TINY, text, folder=tmp_path) if r.arm == LITERAL and r.seed == 0
        )
        content = json.loads((tmp_path / "embeddings-logdet-0.05-0.json").read_text())
        read = Record.from_dict(content)
        assert read.facts == record.facts
        assert {"rms", "parameter_norm", "residual_determinant_0.5", "stage_determinant_negative"} <= set(read.facts)
        assert set(read.losses) == set(record.losses)
        assert content["environment"]["versions"]["torch"] == torch.__version__

    def test_a_diverged_run_is_reported_and_so_is_its_follower(self, text):
        wild = replace(BARRIER, weight=1e38)
        study, lines = replace(TINY, steps=40), []
        with listening(lambda record: lines.append(record.getMessage())):
            records = run_study((PLAIN, wild, self.arms[2]), study, text)
        assert [record.diverged is None for record in records] == [True] * 2 + [False] * 4
        assert sum("diverged at step" in line for line in lines) == 4
        summary = summarise(records, (PLAIN, wild, self.arms[2]), resamples=50)
        assert set(summary.arms[LITERAL].diverged) == {0, 1}
        assert not summary.arms[LITERAL].holds("relative noise", {})
        table = render(summary, records, (PLAIN, wild, self.arms[2]), study)
        assert f"seed 1 at step {records[3].diverged}" in table

    @pytest.mark.parametrize(
        "arms",
        [
            (PLAIN, PLAIN),
            (PLAIN, Arm("steered", steer="missing")),
            (PLAIN, Arm("first", steer="plain"), Arm("second", steer="first")),
        ],
    )
    def test_arms_that_do_not_fit_together(self, text, arms):
        with pytest.raises(InputError):
            run_study(arms, TINY, text)


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


def render(summary, records, arms, study=TINY):
    environment = {
        "command": "probattn verify",
        "date": "2000-01-01",
        "processor": "a | b",
        "cores": 2,
        "device": "cpu",
        "python": "3",
        "versions": {"torch": "2"},
    }
    return render_table(summary, judge_study(summary), records, arms, study, "a|<b>.txt", environment, ["figure"])


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


class TestClaim:
    @pytest.fixture
    def small(self, subject, text):
        return replace(subject, corpus=text)

    def test_quick_form(self, small):
        claim = robustness_claim(small, Settings(), quick=replace(TINY, seeds=(0, 1, 2)))
        assert "Quick form" in claim.statement
        assert claim.measured["control_permuted_holds_zero"] >= 0.75
        assert claim.measured["seeds"] == 3
        assert (claim.condition is not None) == (claim.verdict in ("supported_within", "not_run"))

    def test_the_quick_form_is_as_small_as_the_subject(self, small):
        study = quick_study(small)
        assert (study.context, study.dim, study.layers, study.heads) == (24, 8, 1, 2)

    def test_full_form_writes_its_results(self, small, tmp_path, monkeypatch):
        arms = (PLAIN, BARRIER)
        settings = Settings(full=True, named=True, folder=tmp_path)
        claim = robustness_claim(small, settings, study=TINY, arms=arms)
        names = {path.name for path in tmp_path.iterdir()}
        assert {"robustness.md", "robustness.json", "robustness", "robustness-questions.png"} <= names
        assert "Of 1 ways" in claim.statement
        # Such a file is read in, where it ships with the package and is of the same study.
        (tmp_path / "results").mkdir()
        (tmp_path / "robustness.json").rename(tmp_path / "results" / "robustness.json")
        monkeypatch.setattr("probattn.inference.claims.robustness.resources.files", lambda name: tmp_path)
        read = robustness_claim(small, Settings(full=True), study=TINY, arms=arms, quick=TINY)
        assert dict(read.measured) == dict(claim.measured)
        assert (read.verdict, read.condition) == (claim.verdict, claim.condition)
        other = robustness_claim(small, Settings(full=True), study=replace(TINY, steps=5), arms=arms, quick=TINY)
        assert "Quick form" in other.statement

    def test_without_a_text(self, subject):
        claim = robustness_claim(replace(subject, corpus=None), Settings())
        assert claim.verdict == "not_run"
        assert "text" in claim.condition

    def test_with_too_short_a_text(self, small, text):
        short = replace(small, corpus=replace(text, heldout=text.heldout[:10]))
        assert robustness_claim(short, Settings(), quick=TINY).verdict == "not_run"


def test_the_declared_arms_fit_together():
    every = (*ARMS, *VARIANTS)
    named = {arm.name: arm for arm in every}
    assert len(named) == len(every)
    assert all(arm.steer is None or named[arm.steer].steer is None for arm in every)
    assert all(arm.reference in named for arm in every)
    assert {"plain", LITERAL, LITERAL_AT_PLAIN_SCALE, POSITIVE, POSITIVE_ATTACK, NEGATIVE, SHORTER, LONGER} <= set(
        named
    )
    assert all(arm.reason for arm in every)
    assert sum(arm.barrier for arm in ARMS) == 11


def test_a_layer_on_the_residual_stream_is_what_the_model_computes():
    model = CharacterGPT(GPTConfig(11, context=6, dim=8, layers=2, heads=2)).double()
    with torch.no_grad():
        for part in model.parameters():
            part += 0.3 * torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel()))
    u = model.embed(torch.arange(6).expand(2, -1))
    logits, streams = forward_with_streams(model, u)
    assert torch.equal(logits, model(u=u))
    for number, tokens in enumerate(streams):
        layer, block, added = residual_attention(model, number), model.blocks[number], []
        hook = block.output.register_forward_hook(lambda module, args, output, added=added: added.append(output))
        block(tokens)
        hook.remove()
        torch.testing.assert_close(layer.mean(tokens), added[0], rtol=1e-10, atol=1e-10)
        whole = torch.autograd.functional.jacobian(layer.mean, tokens[0])
        blocks = torch.stack([whole[i, :, i] for i in range(6)])
        torch.testing.assert_close(layer.mean_jacobian(tokens[0]), blocks, rtol=0, atol=1e-10)
        assert blocks.abs().max() > 0.1
