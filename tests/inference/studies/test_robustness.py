"""Runs that are alike in all but what is compared, and corruptions at their rates."""

import json
from dataclasses import replace
from importlib import metadata

import numpy as np
import pytest
import torch
from listening import listening
from small_study import BARRIER, PLAIN, TINY, render

from probattn.errors import InputError
from probattn.inference.claims.claim import Settings
from probattn.inference.claims.robustness import quick_study, robustness_claim
from probattn.inference.studies.robustness import __main__ as command
from probattn.inference.studies.robustness import study as runs
from probattn.inference.studies.robustness.arms import ARMS, VARIANTS, Arm, Study
from probattn.inference.studies.robustness.corruptions import CLEAN
from probattn.inference.studies.robustness.rules import (
    LITERAL,
    LITERAL_AT_PLAIN_SCALE,
    LONGER,
    NEGATIVE,
    POSITIVE,
    POSITIVE_ATTACK,
    SHORTER,
)
from probattn.inference.studies.robustness.study import Record, read_study, run_study, weights_file
from probattn.inference.studies.robustness.summary import summarise
from probattn.inference.studies.robustness.training import batches, forward_with_streams, residual_attention, train
from probattn.models.corpus import UNKNOWN, Corpus
from probattn.models.gpt import CharacterGPT, GPTConfig


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
        assert content["environment"]["versions"]["torch"] == metadata.version("torch")

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
