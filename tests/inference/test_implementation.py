"""A correct implementation passes every check in every dtype, and each kind of fault is seen by its own check."""

import builtins
import math

import pytest
import torch

from probattn.errors import InputError
from probattn.inference.claims import implementation
from probattn.inference.claims.claim import judge
from probattn.inference.claims.implementation import (
    check_language_model,
    implementation_claim,
    implementation_numbers,
    rounding_bounds,
)
from probattn.models.discrete import OwnModel

CHECKS = {"steps", "batch", "padding", "causality", "normalisation", "chain"}


@pytest.fixture(scope="module")
def tokens(subject):
    return subject.inputs[:4, :10]


def found_and_bound(model, tokens):
    found = check_language_model(model, tokens)
    return found, rounding_bounds(found, model.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_dtype(subject, tokens, dtype):
    found, bound = found_and_bound(OwnModel(subject.model, subject.values, dtype=dtype), tokens)
    assert set(bound) == CHECKS
    assert set(found) == CHECKS | {"scale", "chain_length"}
    assert judge(found, bound)
    assert found["chain_length"] == 9


def test_fewer_digits_give_larger_errors(subject, tokens):
    double, single, half = (
        found_and_bound(OwnModel(subject.model, subject.values, dtype=dtype), tokens)[0]["steps"]
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    assert double < 1e-13
    assert double < single < 1e-4
    assert single < half < 0.3


class Altered(OwnModel):
    """The fitted model with one fault."""

    def logits(self, tokens, mask=None):
        return self.fault(tokens, super().logits(tokens, mask), mask)

    def steps(self, tokens, mask=None):
        return self.fault_of_steps(super().steps(tokens, mask))

    def fault_of_steps(self, logits):
        return logits


class SeesTheFuture(Altered):
    def fault(self, tokens, logits, mask):
        return logits + 1e-6 * torch.nn.functional.one_hot(tokens[:, -1:], self.vocabulary)


class MixesRows(Altered):
    def fault(self, tokens, logits, mask):
        return logits + 1e-6 * (logits.mean(0) - logits)


class SeesPadding(Altered):
    def fault(self, tokens, logits, mask):
        if mask is None:
            return logits
        return logits + 1e-6 * ((~mask).sum(1)[:, None, None] * torch.arange(self.vocabulary))


class StepsDrift(Altered):
    def fault(self, tokens, logits, mask):
        return logits

    def fault_of_steps(self, logits):
        return logits + 1e-6 * torch.arange(logits.shape[1])[:, None] * torch.arange(self.vocabulary)


class CountsLength(Altered):
    """Its next-token distribution depends on how long the whole text is: no process has such conditionals."""

    def fault(self, tokens, logits, mask):
        return logits * (1 + 1e-6 * tokens.shape[1])


class NotANumber(Altered):
    def fault(self, tokens, logits, mask):
        return logits * float("nan")


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        (SeesTheFuture, "causality"),
        (MixesRows, "batch"),
        (SeesPadding, "padding"),
        (StepsDrift, "steps"),
        (CountsLength, "chain"),
    ],
)
def test_each_fault_is_seen(subject, tokens, fault, seen):
    found, bound = found_and_bound(fault(subject.model, subject.values), tokens)
    assert not judge(found, bound)
    assert found[seen] > 100 * bound[seen]


def test_not_a_number_is_seen(subject, tokens):
    found, bound = found_and_bound(NotANumber(subject.model, subject.values), tokens)
    assert not judge(found, bound)
    assert all(math.isnan(found[check]) for check in CHECKS)


class TestClaim:
    def test_holds(self, subject):
        claim = implementation_claim(subject)
        assert (claim.id, claim.kind, claim.verdict) == ("implementation", "identity", "supported")
        assert claim.measured["control_over_bound"] > 1e6
        assert "is detected" in claim.control

    def test_turns_with_a_faulty_model(self, subject, monkeypatch):
        monkeypatch.setattr(implementation, "OwnModel", StepsDrift)
        claim = implementation_claim(subject)
        assert claim.broken
        assert claim.measured["own_steps"] > claim.bound["own_steps"]

    def test_turns_with_a_control_that_passes(self, subject, monkeypatch):
        monkeypatch.setattr(implementation, "_ForgetsFirst", OwnModel)
        claim = implementation_claim(subject)
        assert judge(claim.measured, claim.bound)
        assert claim.broken


class TestNumbers:
    def test_all_within_bounds(self, subject):
        pytest.importorskip("transformers")
        measured, bound, control, sentence = implementation_numbers(subject)
        assert judge(measured, bound)
        assert set(bound) < set(measured)
        for name in ("own", "gpt2"):
            assert {f"{name}_{check}" for check in CHECKS} <= set(bound)
            assert {f"{name}_float32_share_of_bound", f"{name}_bfloat16_share_of_bound"} <= set(bound)
        assert control > 1e6
        assert "first token" in sentence
        assert "one too large" in sentence

    def test_without_transformers(self, subject, monkeypatch):
        real = builtins.__import__

        def missing(name, *arguments, **more):
            if name.split(".")[0] == "transformers":
                raise ImportError(name)
            return real(name, *arguments, **more)

        monkeypatch.setattr(builtins, "__import__", missing)
        measured, bound, control, sentence = implementation_numbers(subject)
        assert judge(measured, bound)
        assert all(name.startswith("own_") for name in measured)
        assert control > 1e6
        assert "one too large" not in sentence


class TestBadInput:
    @pytest.mark.parametrize("shape", [(1, 5), (5, 1), (5,)])
    def test_nothing_to_compare(self, subject, shape):
        with pytest.raises(InputError, match=r"N and T at least 2.*nothing to compare"):
            check_language_model(OwnModel(subject.model, subject.values), torch.zeros(shape, dtype=torch.long))

    def test_a_dtype_without_a_bound(self):
        with pytest.raises(InputError, match=r"dtype is torch\.float16; bounds are stated for torch\.float64"):
            rounding_bounds({"scale": 1.0, "chain_length": 1.0}, torch.float16)
