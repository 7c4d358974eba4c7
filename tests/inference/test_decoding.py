"""Sensitivity along decoding by independent routes, rank correlations against SciPy, and the verdicts that turn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from probattn.barrier import stability_margin
from probattn.errors import InputError
from probattn.inference.claims import decoding
from probattn.inference.claims.claim import Settings, verdict_in_words
from probattn.inference.claims.decoding import Size, decode_windows, decoding_claim, kl_divergence

SIZE = Size(windows=24, steps=6, draws=8, resamples=200)
QUIET = Settings()


@pytest.fixture(scope="module")
def decoded(subject):
    return decode_windows(subject, SIZE)


@pytest.fixture(scope="module")
def claim(subject):
    return decoding_claim(subject, QUIET, size=SIZE)


def predicting(decoded, score):
    """A margin that is minus a score (N, S) at the positions looked at."""

    def margin(attention, u, kind):
        found = torch.zeros(u.shape[:-1], dtype=u.dtype)
        found[:, decoded.positions] = -score
        return found

    return margin


class TestKL:
    def test_torch_agrees(self):
        torch.manual_seed(0)
        first, second = torch.randn(5, 1, 9).double(), 3 * torch.randn(5, 4, 9).double()
        both = [torch.distributions.Categorical(logits=logits) for logits in (first.expand(5, 4, 9), second)]
        torch.testing.assert_close(kl_divergence(first, second), torch.distributions.kl_divergence(*both))

    def test_never_negative(self):
        logits = torch.randn(1000, 50) * 10
        assert float(kl_divergence(logits, logits + 3).min()) >= 0


class TestDecoding:
    def test_prompts_are_continued_to_the_context(self, subject, decoded):
        assert decoded.tokens.shape == (24, 24)
        assert decoded.tokens[:, :8].equal(subject.inputs[:24, :8])
        assert not decoded.tokens.equal(subject.inputs[:24])
        assert decoded.positions.tolist() == [8, 11, 14, 17, 20, 23]
        assert decoded.u.equal(subject.model.embed(dict(subject.values), decoded.tokens))

    def test_the_same_seed_the_same_noise_and_the_global_state_untouched(self, subject, decoded):
        before = torch.random.get_rng_state()
        again = decode_windows(subject, SIZE)
        assert torch.random.get_rng_state().equal(before)
        assert again.tokens.equal(decoded.tokens)
        assert all(again.sensitivity[key].equal(decoded.sensitivity[key]) for key in decoded.sensitivity)
        assert not decode_windows(replace(subject, seed=1), SIZE).tokens.equal(decoded.tokens)

    def test_tokens_follow_the_distribution_of_the_model(self, subject):
        one = replace(subject, inputs=subject.inputs[:1].expand(600, -1))
        drawn = decode_windows(one, Size(600, 2, 2, 40), prompt=22).tokens[:, 22]
        values = dict(subject.values)
        exact = subject.model.decode(values, subject.model.embed(values, subject.inputs[:1, :22]))[0, -1].softmax(-1)
        seen = torch.bincount(drawn, minlength=len(exact)) / 600
        allowed = 5 * (exact * (1 - exact) / 600).sqrt() + 1e-3
        assert bool(((seen - exact).abs() < allowed).all())
        uniform = torch.full_like(exact, 1 / len(exact))
        assert bool(((seen - uniform).abs() > allowed).any())  # other distributions are told apart

    def test_predictors(self, subject, decoded):
        values, attention = dict(subject.values), subject.attention
        for s, i in enumerate(decoded.positions.tolist()):
            logits = subject.model.decode(values, decoded.u[:, : i + 1])[:, -1]
            torch.testing.assert_close(decoded.entropy[:, s], torch.distributions.Categorical(logits=logits).entropy())
            past, own = decoded.u[:, :i], decoded.u[:, i]
            scores = ((past @ attention.key[0].T) @ (attention.query[0] @ own[..., None])).squeeze(-1) / 3**0.5
            expected = torch.distributions.Categorical(logits=scores).entropy()
            torch.testing.assert_close(decoded.attention_entropy[:, s], expected)
            torch.testing.assert_close(decoded.norm[:, s], own.square().sum(-1).sqrt())

    def test_noise_on_one_embedding_and_on_all(self, subject, decoded):
        """One window at one step, each perturbed sequence by itself, with the draws made again."""
        values, window, s = dict(subject.values), 3, 2
        i, u = int(decoded.positions[2]), decoded.u
        generator = torch.Generator().manual_seed(subject.seed)
        tokens = subject.inputs[:24, :8]
        for _ in range(16):
            following = subject.model.decode(values, subject.model.embed(values, tokens))[:, -1].softmax(-1)
            tokens = torch.cat([tokens, torch.multinomial(following, 1, generator=generator)], dim=1)
        last = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        whole = torch.randn(8, 24, 8, generator=generator, dtype=torch.float64)
        clean = subject.model.decode(values, u[window : window + 1, : i + 1])[0, -1]
        for level in decoding.LEVELS:
            found = {"last": [], "all": []}
            for m in range(8):
                nudge = torch.zeros(i + 1, 8, dtype=torch.float64)
                nudge[-1] = last[m]
                for form, noise in (("last", nudge), ("all", whole[m, : i + 1])):
                    moved = u[window, : i + 1] + level * u.square().mean().sqrt() * noise
                    logits = subject.model.decode(values, moved[None])[0, -1]
                    found[form].append(float(kl_divergence(clean, logits)))
            for form, numbers in found.items():
                assert float(decoded.sensitivity[form, level][window, s]) == pytest.approx(np.mean(numbers), rel=1e-9)

    def test_local_sensitivity_is_the_limit(self, subject, decoded):
        """KL of tiny steps along the axes, and the Fisher form with a Jacobian from reverse mode."""
        values, window, s = dict(subject.values), 5, 4
        own = decoded.u[window, : int(decoded.positions[s]) + 1]
        scale = decoding.LEVELS[0] * decoded.u.square().mean().sqrt()

        def logits(last):
            return subject.model.decode(values, torch.cat([own[:-1], last[None]])[None])[0, -1]

        jacobian = torch.autograd.functional.jacobian(logits, own[-1])
        p = logits(own[-1]).softmax(-1)
        fisher = torch.diag(p) - torch.outer(p, p)
        expected = 0.5 * scale**2 * torch.trace(jacobian.T @ fisher @ jacobian)
        torch.testing.assert_close(decoded.local[window, s], expected)
        steps = [kl_divergence(logits(own[-1]), logits(own[-1] + 1e-4 * axis)) for axis in torch.eye(8).double()]
        torch.testing.assert_close(scale**2 * 1e8 * sum(steps), expected, rtol=1e-3, atol=0)


class TestStatistics:
    def test_scipy_agrees_with_ties_and_in_a_resample(self):
        rng = np.random.default_rng(0)
        columns = {"x": rng.integers(0, 5, (30, 4)).astype(float), "y": rng.normal(size=(30, 4)), "z": np.ones((30, 4))}
        columns["w"] = columns["x"] + columns["y"]
        study = decoding._Study(columns, 40, np.random.default_rng(1))
        draws = np.random.default_rng(1).multinomial(30, np.full(30, 1 / 30), size=40)
        for k, counts in enumerate([np.ones(30, dtype=int), *draws]):
            pair = [np.repeat(columns[name], counts, axis=0).ravel() for name in ("x", "w")]
            assert study.rho("x", "w")[k] == pytest.approx(stats.spearmanr(*pair).statistic, abs=1e-12)
        assert study.rho("x", "z").tolist() == [0.0] * 41  # a constant orders nothing
        assert study.lead("w", "y", "x")[0] == abs(study.rho("w", "x")[0]) - abs(study.rho("y", "x")[0])

    def test_partial_correlation_is_that_of_residuals(self):
        rng = np.random.default_rng(0)
        columns = {name: rng.normal(size=(50, 3)) for name in "abcd"}
        columns["a"] += columns["c"]
        columns["b"] += columns["c"] - columns["d"]
        study = decoding._Study(columns, 40, rng)
        ranks = {name: stats.rankdata(column.ravel()) for name, column in columns.items()}
        design = np.stack([np.ones(150), ranks["c"], ranks["d"]], axis=1)
        left = [ranks[n] - design @ np.linalg.lstsq(design, ranks[n], rcond=None)[0] for n in ("a", "b")]
        assert study.partial("a", "b", ("c", "d"))[0] == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-12)
        assert study.partial("c", "b", ("c", "d")).tolist() == [0.0] * 41

    def test_windows_are_the_units(self):
        """Copies of a step within a window add nothing to what is known."""
        rng = np.random.default_rng(0)
        single = {name: rng.normal(size=(60, 1)) for name in "ab"}
        widths = []
        for copies in (1, 20):
            columns = {name: column.repeat(copies, axis=1) for name, column in single.items()}
            found = decoding._Study(columns, 400, np.random.default_rng(2)).rho("a", "b")
            widths.append(np.subtract(*decoding._interval(found)))
        assert widths[0] == pytest.approx(widths[1], rel=1e-6)


class TestClaim:
    def test_measured(self, claim, decoded):
        assert (claim.id, claim.kind) == ("decoding", "empirical")
        assert not claim.broken
        assert claim.control
        assert "for the entropy of the next-token distribution" in claim.finding
        assert all(isinstance(value, float) and math.isfinite(value) for value in claim.measured.values())
        assert claim.measured["control_positive_rho"] > 0.8
        assert claim.measured["control_negative_holds_zero"] >= 0.75
        expected = stats.spearmanr(decoded.entropy.ravel(), decoded.sensitivity["last", 0.3].ravel()).statistic
        assert claim.measured["rho_entropy_last_0.3"] == pytest.approx(expected)
        intervals = [name.removesuffix("_low") for name in claim.measured if name.endswith("_low")]
        assert len(intervals) > 40
        assert all(claim.measured[f"{name}_low"] <= claim.measured[f"{name}_high"] for name in intervals)
        assert list(claim.figures) == ["decoding"]
        assert len(claim.figures["decoding"].axes) == 2

    def test_signs(self, claim, decoded, subject):
        margin = stability_margin(subject.attention, decoded.u)[:, decoded.positions]
        expected = stats.spearmanr(-margin.ravel(), decoded.sensitivity["all", 0.1].ravel()).statistic
        assert claim.measured["rho_singular_value_margin_all_0.1"] == pytest.approx(expected)

    def test_holds_for_a_perfect_predictor(self, subject, decoded):
        margin = predicting(decoded, decoded.sensitivity["all", 0.1])
        claim = decoding_claim(subject, QUIET, size=SIZE, margin=margin)
        assert (claim.verdict, claim.condition) == ("supported", None)
        assert claim.measured["rho_singular_value_margin_all_0.1"] == pytest.approx(1)

    def test_holds_with_a_condition_if_the_margin_is_the_entropy_itself(self, subject, decoded):
        claim = decoding_claim(subject, QUIET, size=SIZE, margin=predicting(decoded, decoded.entropy))
        words = verdict_in_words(claim)
        assert words.startswith("holds if the margin need not predict better than the entropy of the next-token")
        assert claim.measured["rho_singular_value_margin_all_0.1_low"] > 0
        assert claim.measured["lead_of_singular_value_margin_over_entropy_all_0.1"] == pytest.approx(0)
        assert claim.measured["partial_rho_singular_value_margin_all_0.1"] == 0

    @pytest.mark.parametrize(("name", "limit"), [("_CONTROL", 1.0), ("_HOLDING", 1.1)])
    def test_nothing_is_shown_where_a_control_fails(self, subject, decoded, monkeypatch, name, limit):
        monkeypatch.setattr(decoding, name, limit)
        claim = decoding_claim(subject, QUIET, size=SIZE, margin=predicting(decoded, decoded.sensitivity["all", 0.1]))
        assert claim.verdict == "not_run"
        assert "a control failed" in claim.condition

    @pytest.mark.parametrize("sign", [0, -1], ids=["random", "backwards"])
    def test_does_not_hold_for_other_predictors(self, subject, decoded, sign):
        noise = torch.randn(decoded.entropy.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        score = sign * decoded.sensitivity["all", 0.1] if sign else noise
        claim = decoding_claim(subject, QUIET, size=SIZE, margin=predicting(decoded, score))
        assert (claim.verdict, claim.condition) == ("not_supported", None)

    def test_sizes(self, subject, monkeypatch):
        asked = []

        def stop(subject, size, *, prompt):
            asked.append(size)
            raise InterruptedError

        monkeypatch.setattr(decoding, "decode_windows", stop)
        for settings in (Settings(), Settings(full=True)):
            with pytest.raises(InterruptedError):
                decoding_claim(subject, settings)
        assert asked == [decoding.QUICK, decoding.FULL]


class TestBadInput:
    @pytest.mark.parametrize("prompt", [0, 23, 40])
    def test_prompt(self, subject, prompt):
        with pytest.raises(InputError, match=f"context is 24 .*a prompt of {prompt}.*give a prompt from 1 to 22"):
            decoding_claim(subject, QUIET, prompt=prompt)

    def test_windows_too_narrow(self, subject):
        with pytest.raises(
            InputError, match="inputs are 5 characters wide, fewer than the prompt of 8; give a shorter"
        ):
            decode_windows(replace(subject, inputs=subject.inputs[:, :5]))

    @pytest.mark.parametrize(("name", "least"), [("windows", 2), ("steps", 2), ("draws", 2), ("resamples", 40)])
    def test_size(self, subject, name, least):
        with pytest.raises(InputError, match=rf"^{name} is 1; it must be at least {least}\.$"):
            decode_windows(subject, SIZE._replace(**{name: 1}))

    @pytest.mark.parametrize("wrong", [lambda m: m[:1], lambda m: m * float("nan")])
    def test_margin(self, subject, wrong):
        with pytest.raises(InputError, match=r"margin gave .* for the kind 'determinant'.*\(24, 24\)"):
            decoding_claim(subject, QUIET, size=SIZE, margin=lambda *of: wrong(stability_margin(*of)))
