"""Fine-tuning of small models with random weights: pairs, objectives, attacks, resumption."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from probattn.errors import InputError
from probattn.inference.studies.fine_tuning import run as runs
from probattn.inference.studies.fine_tuning.measure import continuation_bits, measure_margins, measure_model
from probattn.inference.studies.fine_tuning.pairs import corrupt_text, cut_pairs
from probattn.inference.studies.fine_tuning.plan import ARMS, CLEAN, FAMILIES, OTHER, Arm, Sizes
from probattn.inference.studies.fine_tuning.run import Texts, compare, render, run_fine_tuning
from probattn.inference.studies.fine_tuning.tuning import fine_tune, token_batches
from probattn.inference.studies.robustness.corruptions import label
from probattn.models.causal_lm import build_causal_lm

SIZES = Sizes(seeds=(0, 1), steps=4, batch=2, length=12, learning_rate=1e-2, warmup=1, positions=0.5, layers=1.0,
              windows=2, context=8, continuation=6)  # fmt: skip
TEXT = "one two three four five six seven eight nine ten " * 20
LETTERS = sorted(set(TEXT))


def encode(text):
    return [LETTERS.index(character) if character in LETTERS else 0 for character in text]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_causal_lm("llama", len(LETTERS), layers=2, dim=16, heads=2, context=64).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def texts():
    return Texts(TEXT, TEXT[7:], TEXT[::-1])


def same(first, second):
    return all(one.equal(other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


class TestPairs:
    def test_a_context_and_what_follows_it(self):
        pairs = cut_pairs(TEXT, encode, 3, 8, 6)
        assert [len(pair.text) for pair in pairs] == [48] * 3
        for pair in pairs:
            begin = TEXT.find(pair.text + "".join(LETTERS[k] for k in pair.continuation))
            assert begin >= 0
        with pytest.raises(InputError, match="too few"):
            cut_pairs(TEXT[:200], encode, 3, 8, 6)

    @pytest.mark.parametrize("family", ["swaps", "substitutions", "typos", "deletions"])
    def test_texts_are_corrupted_at_about_their_rate(self, family):
        generator = torch.Generator().manual_seed(0)
        found = corrupt_text(TEXT, family, 0.1, TEXT, generator)
        if family == "deletions":
            assert len(found) == pytest.approx(0.9 * len(TEXT), abs=30)
        else:
            changed = sum(a != b for a, b in zip(TEXT, found, strict=True)) / len(TEXT)
            assert 0.04 < changed < 0.25
        assert set(found) <= set(TEXT)
        assert corrupt_text(TEXT, family, 0.0, TEXT, generator) == TEXT

    def test_a_family_that_does_not_exist(self):
        with pytest.raises(InputError, match="family"):
            corrupt_text("a", "cuts", 0.1, "ab", torch.Generator())


class TestTuning:
    def test_batches_depend_on_the_seed_alone(self):
        tokens = torch.tensor(encode(TEXT))
        first, again, other = (torch.stack(list(token_batches(tokens, SIZES, seed))) for seed in (0, 0, 1))
        assert first.shape == (4, 2, 12)
        assert first.equal(again)
        assert not first.equal(other)
        with pytest.raises(InputError, match="window"):
            next(token_batches(tokens[:5], SIZES, 0))

    def test_every_arm_differs_from_plain_and_the_model_stays(self, model):
        tokens, before = torch.tensor(encode(TEXT)), [part.clone() for part in model.parameters()]
        plain, _ = fine_tune(model, ARMS[0], 0, tokens, SIZES)
        assert not same(plain, model)
        for arm in ARMS[1:]:
            tuned, diverged = fine_tune(model, arm, 0, tokens, SIZES)
            assert diverged is None
            assert not same(tuned, plain)
            assert same(tuned, model) == (not arm.tuned)
            assert same(tuned, fine_tune(model, arm, 0, tokens, SIZES)[0])
        assert all(one.equal(other) for one, other in zip(before, model.parameters(), strict=True))

    def test_the_barrier_raises_what_it_guards(self, model):
        tokens = torch.tensor(encode(TEXT))
        long = replace(SIZES, steps=60, positions=1.0)
        plain, barrier = (fine_tune(model, Arm("x", weight=weight), 0, tokens, long)[0] for weight in (0.0, 20.0))
        ids = tokens[:30]
        found = [measure_margins(tuned, ids, positions=20)["logabsdet_0.5"] for tuned in (plain, barrier)]
        assert found[1] > found[0]

    def test_divergence_is_seen(self, model):
        wild = replace(SIZES, learning_rate=1e30, warmup=0)
        assert fine_tune(model, ARMS[0], 0, torch.tensor(encode(TEXT)), wild)[1] is not None


class TestMeasures:
    def test_the_loss_of_a_continuation(self, model):
        ids = torch.tensor(encode("one two three"))
        found = continuation_bits(model, model.get_input_embeddings()(ids[None, :6]), ids[6:])
        scores = model(ids[None]).logits[0]
        wanted = [scores[k - 1].logsumexp(0) - scores[k - 1, ids[k]] for k in range(6, len(ids))]
        assert float(found) == pytest.approx(float(torch.stack(wanted).mean()) / math.log(2), rel=1e-5)

    def test_all_corruptions_are_measured_and_attacks_are_worse_than_nothing(self, model, texts):
        pairs = cut_pairs(texts.heldout, encode, 3, 8, 6)
        found = measure_model(model, pairs, pairs[:2], encode, 8, TEXT, 0)
        levels = {label(family, level) for family, levels in FAMILIES.items() for level in levels}
        assert set(found) == {CLEAN, OTHER, *levels}
        assert all(len(values) == (2 if name == OTHER else 3) for name, values in found.items())
        np.testing.assert_array_equal(found[OTHER], found[CLEAN][:2])
        assert (found["embedding attack 0.1"] > found[CLEAN]).all()
        assert found["embedding attack 0.3"].mean() > found["embedding attack 0.1"].mean()
        noise = np.abs(found["relative noise 0.2"] - found[CLEAN])
        assert noise.max() > 0


class TestRun:
    arms = ARMS[:2]

    def test_it_goes_on_and_compares(self, model, texts, tmp_path, monkeypatch):
        calls = []
        real = runs.fine_tune
        monkeypatch.setattr(
            runs, "fine_tune", lambda m, arm, seed, *rest: calls.append((arm.name, seed)) or real(m, arm, seed, *rest)
        )
        first = run_fine_tuning(model, encode, texts, self.arms, SIZES, folder=tmp_path)
        assert calls == [(arm.name, seed) for seed in (0, 1) for arm in self.arms]
        (tmp_path / "plain-1.json").write_text("{")  # half-written
        calls.clear()
        again = run_fine_tuning(model, encode, texts, self.arms, SIZES, folder=tmp_path)
        assert calls == [("plain", 1)]
        assert [record["losses"] for record in again] == [record["losses"] for record in first]
        found = compare(again, self.arms)
        assert list(found) == [self.arms[1].name]
        one = np.array(again[1]["losses"][CLEAN]) - again[0]["losses"][CLEAN]
        two = np.array(again[3]["losses"][CLEAN]) - again[2]["losses"][CLEAN]
        assert found[self.arms[1].name][CLEAN].mean == pytest.approx(np.mean([one, two]), abs=1e-9)
        page = render(again, self.arms)
        assert "residual one\\_sided 0.05" in page
        assert "nan" not in page
        with pytest.raises(InputError, match="other options"):
            run_fine_tuning(model, encode, texts, self.arms, replace(SIZES, steps=5), folder=tmp_path)

    def test_diverged_runs_are_counted(self, model, texts, tmp_path):
        wild = replace(SIZES, learning_rate=1e30, warmup=0)
        records = run_fine_tuning(model, encode, texts, ARMS[:1], wild, folder=tmp_path)
        assert all(record["diverged"] is not None for record in records)
        assert "2 of 2" in render(records, ARMS[:1])
        assert json.loads((tmp_path / "plain-0.json").read_text())["losses"] == {}

    def test_what_cannot_be(self, model, texts):
        with pytest.raises(InputError, match="same name"):
            run_fine_tuning(model, encode, texts, (ARMS[0], ARMS[0]), SIZES)
        with pytest.raises(InputError, match="seeds"):
            Sizes(seeds=(1,))
        with pytest.raises(InputError, match="neftune"):
            Arm("x", neftune=-1.0)
