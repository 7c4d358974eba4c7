"""The claim on published numbers: its verdict, what it says where a number does not come out, and its controls."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from probattn.errors import InputError
from probattn.inference.claims import published
from probattn.inference.claims.claim import Settings
from probattn.inference.claims.published import published_claim
from probattn.inference.studies.published.lengths import Growth
from probattn.inference.studies.published.record import Estimate
from probattn.inference.studies.published.results import GrowthResults

SUBJECT = SimpleNamespace(seed=0, corpus=None)
SMALL = published._Size((16, 24), range(5, 9), 60, 400, 400, (100,), 200)


@pytest.fixture
def _small(monkeypatch):
    monkeypatch.setattr(published, "_QUICK", SMALL)
    monkeypatch.setattr(published, "_boundary", lambda size, seed: Estimate(0.148, 0.146, 0.150))


def grown(power):
    sizes = np.array([16.0, 64.0, 256.0])
    values = np.stack([sizes**power, 2 * sizes ** (power + 0.01)])
    return GrowthResults([Growth(3, sizes, values, values, values, values)], {})


@pytest.mark.usefixtures("_small")
class TestVerdict:
    def test_holds(self):
        claim = published_claim(SUBJECT, Settings(), growth=grown(0.25))
        assert claim.verdict == "supported"
        assert claim.measured["growth_normed"] == pytest.approx(0.255)
        assert claim.measured["growth_blocks_layer3"] == pytest.approx(0.255)
        assert set(claim.bound) <= set(claim.measured)
        assert len(claim.figures["published"].axes) == 3

    def test_a_number_that_does_not_come_out_is_named_with_its_reason(self):
        claim = published_claim(SUBJECT, Settings(), growth=grown(0.6))
        assert claim.verdict == "supported_within"
        assert "whole Jacobian" in claim.condition
        assert "first token held fixed" in claim.finding

    def test_a_broken_control_leaves_no_verdict(self, monkeypatch):
        right = published.measure_selectivity
        monkeypatch.setattr(
            published, "measure_selectivity", lambda *args, ball=False, **options: right(*args, **options)
        )
        claim = published_claim(SUBJECT, Settings())
        assert claim.verdict == "not_run"
        assert "control" in claim.condition

    def test_wrong_determinants_are_seen(self, monkeypatch):
        right = published.measure_transition
        monkeypatch.setattr(
            published, "measure_transition", lambda *args: right(*args)._replace(sign_at=0.7, halfway=0.9)
        )
        claim = published_claim(SUBJECT, Settings())
        assert claim.verdict == "not_supported"
        assert claim.measured["finite_size_error"] > 1e-2

    def test_without_the_model_the_statement_says_so(self, monkeypatch):
        def missing(*args):
            raise InputError("the default language model is not installed")

        monkeypatch.setattr(published, "_FULL", SMALL)
        monkeypatch.setattr(published, "measure_on_smollm2", missing)
        corpus = SimpleNamespace(name="text", heldout="words")
        subject, settings = SimpleNamespace(seed=0, corpus=corpus), Settings(full=True, named=True)
        claim = published_claim(subject, settings)
        assert "not installed" in claim.statement
        assert "growth_normed" not in claim.measured
        assert "no text" in published_claim(SUBJECT, settings).statement
        assert "quick" not in published_claim(SUBJECT, replace(settings, named=False), growth=grown(0.2)).statement


@pytest.mark.slow
def test_the_quick_form_holds():
    claim = published_claim(SUBJECT, Settings())
    assert claim.verdict == "supported"
    assert "Quick form" in claim.statement
    assert abs(claim.measured["boundary"] - 4 / 27) < 0.02
