"""The floor under the probability of the end, two estimators of survival, and the verdicts they turn."""

import math
from dataclasses import replace

import pytest
import torch

from probattn.errors import InputError
from probattn.inference.claims import tightness
from probattn.inference.claims.claim import Settings
from probattn.inference.claims.tightness import (
    TOLERATED,
    Survival,
    direct_lengths,
    log_end_floor,
    simulate_survival,
    tightness_claim,
)
from probattn.models.discrete import OwnModel

SMALL = {"paths": 64, "length": 30}


def rare(step, own):
    return torch.full_like(own, 1 / (step + 1) ** 2)


class Markov:
    """The next character depends on the last one by a table; survival is a product of matrices."""

    context, padding, dtype = 3, ("right",), torch.float64

    def __init__(self, table):
        self.table, self.vocabulary, self.widest = torch.tensor(table, dtype=torch.float64), len(table), 0

    def logits(self, tokens, mask=None):
        self.widest = max(self.widest, tokens.shape[1])
        return self.table[tokens].log()

    def steps(self, tokens, mask=None):
        return self.logits(tokens, mask)

    def survival(self, length):
        left, found = torch.zeros(self.vocabulary, dtype=torch.float64), []
        left[0] = 1
        for _ in range(length):
            left = left @ self.table
            left[0] = 0
            found.append(left.sum())
        return torch.stack(found)


@pytest.fixture
def markov():
    return Markov([[0.1, 0.6, 0.3], [0.3, 0.2, 0.5], [0.02, 0.18, 0.8]])


class TestFloor:
    @pytest.mark.parametrize("end", [0, 11, 40])
    def test_below_every_vector_that_a_layer_norm_can_give(self, subject, end):
        values = subject.values
        z = torch.randn(20000, 8, dtype=torch.float64)
        z = z - z.mean(-1, keepdim=True)
        z = z / z.norm(dim=-1, keepdim=True) * 8**0.5
        h = z * values["decoder.layers.norm.weight"] + values["decoder.layers.norm.bias"]
        logits = h @ values["decoder.readout.weight"].T + values["decoder.readout.bias"]
        smallest = float(logits.log_softmax(-1)[:, end].min())
        assert log_end_floor(values, end) <= smallest < 0.3 * log_end_floor(values, end)  # below, and of that order

    def test_reached_with_two_characters(self):
        torch.manual_seed(3)
        gain, shift, weight, bias = torch.rand(5), torch.randn(5), torch.randn(2, 5), torch.randn(2)
        names = ("norm.weight", "norm.bias")
        values = {f"decoder.layers.{name}": value.double() for name, value in zip(names, (gain, shift), strict=True)}
        values |= {"decoder.readout.weight": weight.double(), "decoder.readout.bias": bias.double()}
        slope = (gain * (weight[1] - weight[0])).double()
        z = (slope - slope.mean()) / (slope - slope.mean()).norm() * 5**0.5
        h = values["decoder.layers.norm.weight"] * z + values["decoder.layers.norm.bias"]
        logits = values["decoder.readout.weight"] @ h + values["decoder.readout.bias"]
        assert log_end_floor(values, 0) == pytest.approx(float(logits.log_softmax(-1)[0]), abs=1e-10)

    def test_does_not_underflow(self, subject):
        values = {**subject.values, "decoder.readout.weight": 1e4 * subject.values["decoder.readout.weight"]}
        assert -math.inf < log_end_floor(values, 0) < -750


class TestSurvival:
    def test_both_estimators_find_the_exact_curve(self, markov):
        exact = markov.survival(20)
        survival = simulate_survival(markov, 0, paths=2000, length=20, seed=1)
        lengths = direct_lengths(markov, 0, paths=4000, length=20, seed=2)
        assert markov.widest == markov.context  # the window slides
        error = survival.error()
        assert error[0] == pytest.approx(0, abs=1e-15)  # every path starts alike
        torch.testing.assert_close(survival.mean()[0], exact[0])
        assert bool(((survival.mean() - exact)[1:].abs() < 4 * error[1:]).all())
        drawn = (lengths[:, None] >= torch.arange(1, 21)).double().mean(0)
        assert bool(((drawn - exact).abs() < 4 * (exact * (1 - exact) / 4000).sqrt()).all())
        # What integrating the end out is for: a smaller error from as many strings.
        assert bool((error < (exact * (1 - exact) / 2000).sqrt()).all())

    def test_no_path_holds_an_end(self, markov):
        seen = []

        def watch(step, own):
            seen.append(step)
            return own

        survival = simulate_survival(markov, 0, paths=50, length=6, end_probability=watch)
        assert seen == [1, 2, 3, 4, 5, 6]
        # The first context is the end itself; it never comes again.
        assert survival.end[:, 0].tolist() == pytest.approx([0.1] * 50)
        assert survival.end[:, 1:].unique().tolist() == pytest.approx([0.02, 0.3])

    def test_the_same_seed_the_same_strings(self, markov):
        first, second, other = (direct_lengths(markov, 0, paths=40, length=9, seed=seed) for seed in (5, 5, 6))
        assert first.equal(second)
        assert not first.equal(other)

    def test_another_end(self, markov):
        length = 16
        exact = torch.tensor([(n + 2) / (2 * (n + 1)) for n in range(1, length + 1)], dtype=torch.float64)
        survival = simulate_survival(markov, 0, paths=5, length=length, end_probability=rare)
        torch.testing.assert_close(survival.mean(), exact, rtol=1e-13, atol=0)
        lengths = direct_lengths(markov, 0, paths=4000, length=length, seed=3, end_probability=rare)
        assert float((lengths >= length).double().mean()) == pytest.approx(float(exact[-1]), abs=0.03)

    @pytest.mark.parametrize(("certain", "reached"), [(1.0, 0), (0.0, 7)])
    def test_certainty(self, markov, certain, reached):
        def fixed(step, own):
            return torch.full_like(own, certain)

        assert direct_lengths(markov, 0, paths=5, length=7, end_probability=fixed).tolist() == [reached] * 5
        survival = simulate_survival(markov, 0, paths=5, length=7, end_probability=fixed)
        assert survival.mean()[-1] == 1 - certain


class TestStatistics:
    def test_false_alarms_are_as_rare_as_stated(self):
        """Weights and strings of one distribution, 400 times; about 1 % may be called different."""
        torch.manual_seed(0)
        alarms = 0
        for _ in range(400):
            end = torch.distributions.Beta(1.0, 9.0).sample((200, 40)).double()
            survival = Survival(end, (1 - end).cumprod(1))
            ended = torch.rand(200, 40) < torch.distributions.Beta(1.0, 9.0).sample((200, 40))
            lengths = torch.where(ended.any(1), ended.double().argmax(1), 40)
            points, scores, critical = tightness._disagreement(survival, lengths)
            assert len(points) >= 4
            alarms += max(map(abs, scores)) > critical
        assert 1 <= alarms <= 10

    def test_a_difference_is_seen(self, markov):
        survival = simulate_survival(markov, 0, paths=400, length=16)
        lengths = direct_lengths(markov, 0, paths=400, length=16, seed=1, end_probability=lambda t, p: 0.5 * p)
        _, scores, critical = tightness._disagreement(survival, lengths)
        assert max(map(abs, scores)) > critical

    def test_upper_limit(self):
        # Where nothing survived, the limit of the exact binomial test: (1 - u)^M = 1 %.
        assert tightness._upper_limit(0.0, 100) == pytest.approx(1 - 0.01 ** (1 / 100), abs=1e-9)
        assert tightness._upper_limit(1.0, 100) == 1.0
        limits = [tightness._upper_limit(0.3, paths) for paths in (10, 100, 10000)]
        assert 0.3 < limits[2] < limits[1] < limits[0] < 1
        torch.manual_seed(0)
        means = torch.bernoulli(torch.full((500, 60), 0.2)).mean(1).tolist()
        missed = [sum(tightness._upper_limit(mean, 60, error) < 0.2 for mean in means) for error in (0.01, 0.5)]
        assert missed[0] <= 5
        assert missed[1] > 20  # a limit for another error is told apart


class TestClaim:
    def test_holds(self, subject):
        claim = tightness_claim(subject, **SMALL)
        assert (claim.id, claim.kind, claim.verdict, claim.condition) == ("tightness", "statistical", "supported", None)
        assert set(claim.bound) <= set(claim.measured)
        assert claim.measured["infinite_mass"] == 0
        assert claim.measured["log10_floor"] < claim.measured["log10_smallest_end_probability"]
        assert claim.measured["end_character"] == int(subject.targets.flatten().mode().values)
        assert claim.measured["control_survival"] == pytest.approx(32 / 62)
        assert "most frequent character" in claim.statement
        assert "two independent estimators" in claim.statement
        assert "exactly 0.5161" in claim.control
        assert list(claim.figures) == ["tightness"]
        assert claim.as_dict()["measured"]["steps"] == 30

    def test_sizes(self, subject, monkeypatch):
        asked = []

        def stop(model, end, *, paths, length, **more):
            asked.append((paths, length))
            raise InterruptedError

        monkeypatch.setattr(tightness, "simulate_survival", stop)
        for settings in (None, Settings(), Settings(full=True)):
            with pytest.raises(InterruptedError):
                tightness_claim(subject, settings)
        assert asked == [(256, 40), (256, 40), (1024, 40)]

    def test_turns_with_an_end_too_rare(self, subject):
        claim = tightness_claim(subject, **SMALL, end_probability=rare)
        assert claim.verdict == "not_supported"
        assert claim.measured["infinite_mass"] > TOLERATED
        assert claim.measured["survival_at_last_step"] == pytest.approx(32 / 62)

    def test_holds_with_a_condition_without_a_proof(self, subject):
        claim = tightness_claim(subject, paths=256, length=30, end_probability=lambda t, own: torch.full_like(own, 0.3))
        assert claim.verdict == "supported_within"
        assert "counts as none, without a proof" in claim.condition
        assert 0 < claim.measured["infinite_mass"] < TOLERATED

    def test_turns_with_a_floor_too_high(self, subject, monkeypatch):
        monkeypatch.setattr(tightness, "log_end_floor", lambda values, end: math.log(0.9))
        claim = tightness_claim(subject, **SMALL)
        assert claim.verdict == "not_supported"
        assert claim.measured["floor_excess"] > 0

    def test_turns_where_the_estimators_disagree(self, subject, monkeypatch):
        real = tightness.direct_lengths
        monkeypatch.setattr(tightness, "direct_lengths", lambda *args, **more: real(*args, **more) // 2)
        claim = tightness_claim(subject, paths=256, length=16)
        assert claim.verdict == "not_supported"
        assert claim.measured["disagreement_excess"] > 0

    def test_says_where_nothing_could_be_compared(self, subject):
        claim = tightness_claim(subject, paths=4, length=3, end=11)
        assert claim.verdict == "supported_within"
        assert "the two estimators need not be compared" in claim.condition
        assert "character 11" in claim.statement
        named = tightness_claim(replace(subject, line_feed=11), paths=4, length=3, end=11)
        assert named.statement.startswith("With the line feed taken as end of sequence")

    def test_an_end_that_the_model_never_says(self, subject):
        bias = subject.values["decoder.readout.bias"].clone()
        bias[5] -= 30
        shunned = replace(subject, values={**subject.values, "decoder.readout.bias": bias})
        claim = tightness_claim(shunned, **SMALL, end=5)
        assert claim.measured["survival_at_last_step"] > 0.999
        assert claim.measured["infinite_mass"] == 0  # so slowly does it end that only the proof can tell
        assert claim.verdict == "supported_within"


class TestBadInput:
    @pytest.mark.parametrize("end", [-1, 10**6])
    def test_end(self, subject, end):
        with pytest.raises(InputError, match=rf"end is {end}; it must be one of the \d+ tokens"):
            tightness_claim(subject, end=end)
        with pytest.raises(InputError, match="end is"):
            log_end_floor(subject.values, end)

    @pytest.mark.parametrize(("name", "value"), [("paths", 1), ("paths", 0), ("length", 0)])
    def test_sizes(self, subject, name, value):
        with pytest.raises(InputError, match=f"{name} is {value}; it must be at least"):
            tightness_claim(subject, **{**SMALL, name: value})
        with pytest.raises(InputError, match=f"{name} is {value}"):
            direct_lengths(OwnModel(subject.model, subject.values), 0, **{**SMALL, name: value})

    @pytest.mark.parametrize("wrong", [lambda t, p: p + 1, lambda t, p: p[:1], lambda t, p: p * float("nan")])
    @pytest.mark.parametrize("way", [simulate_survival, direct_lengths])
    def test_what_replaces_the_end(self, markov, wrong, way):
        with pytest.raises(InputError, match=r"end_probability at step 1 gave .*it must give 7 probabilities"):
            way(markov, 0, paths=7, length=3, end_probability=wrong)
