"""Corruptions at their rates, attacks within their budgets, and measures with known values."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from probattn.errors import InputError
from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.attacks import attack_characters, attack_embeddings, window_bits
from probattn.inference.studies.robustness.corruptions import (
    CLEAN,
    FAMILIES,
    delete_characters,
    keyboard_neighbours,
    label,
    mistype_characters,
    substitute_characters,
    swap_characters,
)
from probattn.inference.studies.robustness.evaluation import MEASURES, Text, evaluate
from probattn.inference.studies.robustness.gains import Gains, layer_gains, rank_correlations
from probattn.inference.studies.robustness.obfuscation import ATTACKS, Attacked, attack_harder
from probattn.inference.studies.robustness.regularisers import (
    adversarial_step,
    cap_products,
    product_norms,
    softmax_jacobian_norm,
    softmax_penalty,
    with_noise,
)
from probattn.inference.studies.robustness.sensitivity import noise_terms, replacement_sensitivity
from probattn.inference.studies.robustness.training import forward_with_streams, residual_attention, train
from probattn.models.corpus import UNKNOWN, Corpus, Windows
from probattn.models.gpt import CharacterGPT, GPTConfig

SIZES = Study(
    seeds=(0, 1),
    steps=40,
    batch=8,
    warmup=2,
    context=8,
    dim=8,
    layers=1,
    heads=2,
    rank=2,
    windows=6,
    learning_rate=2e-2,
)


@pytest.fixture(scope="module")
def text():
    words = ["one ", "two ", "three ", "four ", "five ", "six "]
    drawn = "".join(words[k] for k in np.random.default_rng(0).integers(0, 6, 400))
    return Corpus("words", drawn[:1200], drawn[1200:1500], (*sorted(set(drawn)), UNKNOWN))


@pytest.fixture(scope="module")
def windows(text):
    return Windows(*(part[:12] for part in text.windows(8, heldout=True)))


@pytest.fixture(scope="module")
def model(text):
    return train(Arm("plain"), 0, text, SIZES).model.double().requires_grad_(False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class TestCorruptions:
    @pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
    def test_swaps_have_their_rate_and_move_no_character_twice(self, rate):
        tokens = torch.arange(40).repeat(4000, 1)
        found = swap_characters(tokens, rate, generator())
        assert found.sort(1).values.equal(tokens)
        begun = found[:, :-1] == tokens[:, :-1] + 1
        assert int((found - tokens).abs().max()) == 1
        assert not bool((begun[:, :-1] & begun[:, 1:]).any())
        # The same at every place, to four standard errors.
        assert float((begun.double().mean(0) - rate).abs().max()) < 4 * math.sqrt(rate * (1 - rate) / 4000)

    def test_substitutions_have_their_rate_and_their_frequencies(self):
        frequency = torch.tensor([60, 30, 10, 0])
        tokens = torch.zeros(400, 100, dtype=torch.long)
        found = substitute_characters(tokens, 0.1, frequency, generator())
        assert float((found != tokens).double().mean()) == pytest.approx(0.1, abs=0.006)
        counts = torch.bincount(found[found != tokens], minlength=4).double()
        assert counts[0] == counts[3] == 0
        assert float(counts[1] / counts.sum()) == pytest.approx(0.75, abs=0.03)

    def test_neighbours_on_a_keyboard(self):
        letters = tuple("abcdefghijklmnopqrstuvwxyzGH 1")
        table = keyboard_neighbours(letters)
        near = {letters[k]: {letters[j] for j in row if j >= 0} for k, row in enumerate(table.tolist())}
        assert near["g"] == set("fhtyvb")
        assert near["q"] == set("wa")
        assert near["m"] == set("njk")
        assert near["G"] == {"H"}  # of the same case
        assert near[" "] == near["1"] == set()
        assert all(one in near[other] for one, others in near.items() for other in others)  # both ways

    def test_typing_errors_hit_letters_alone_and_have_their_rate(self):
        letters = tuple("asdf ")
        tokens = torch.tensor([[0, 1, 2, 3, 4]]).repeat(20_000, 1)
        found = mistype_characters(tokens, 0.1, keyboard_neighbours(letters), generator())
        assert (found != tokens).double().mean(0).tolist() == pytest.approx([0.1] * 4 + [0.0], abs=0.009)
        assert set(found[:, 1].tolist()) == {0, 1, 2}

    def test_deletions_keep_order_and_true_successors(self):
        tokens = torch.arange(30).repeat(2000, 1)
        found, goals, kept = delete_characters(tokens, tokens + 1, 0.2, generator())
        assert float((~kept[:, -30:]).double().sum(1).mean()) == pytest.approx(29 * 0.2, abs=0.2)
        assert bool((found[:, 0] == 0).all())
        assert goals.equal(found + 1)
        for row, own in zip(found[:50], kept[:50], strict=True):
            left = row[own]
            assert left.equal(left.sort().values)
            assert bool(own[: own.sum()].all())  # the lost ones stand behind

    def test_none_at_rate_zero(self):
        tokens = torch.randint(5, (3, 7))
        assert swap_characters(tokens, 0.0, generator()).equal(tokens)
        assert substitute_characters(tokens, 0.0, torch.ones(5), generator()).equal(tokens)
        assert mistype_characters(tokens, 0.0, torch.zeros(5, 8, dtype=torch.long), generator()).equal(tokens)
        assert delete_characters(tokens, tokens, 0.0, generator())[0].equal(tokens)

    def test_what_cannot_be(self):
        tokens = torch.zeros(1, 4, dtype=torch.long)
        with pytest.raises(InputError, match="rate"):
            swap_characters(tokens, 0.6, generator())
        with pytest.raises(InputError, match="rate"):
            substitute_characters(tokens, 1.1, torch.ones(2), generator())
        with pytest.raises(InputError, match="single"):
            substitute_characters(tokens, 0.1, torch.tensor([1, 0]), generator())
        with pytest.raises(InputError, match="rate"):
            mistype_characters(tokens, -0.1, torch.zeros(1, 8, dtype=torch.long), generator())
        with pytest.raises(InputError, match="rate"):
            delete_characters(tokens, tokens, float("nan"), generator())


class TestEvaluation:
    def test_bits_of_a_model_that_knows_nothing(self, text, windows):
        model = CharacterGPT(SIZES.gpt(len(text.vocabulary)))
        torch.nn.init.zeros_(model.readout.weight)
        torch.nn.init.zeros_(model.readout.bias)
        losses = dict(evaluate(model, windows, Text.of(text), 0))
        assert [losses.pop(name).tolist() for name in MEASURES] == [[0.0] * 12] * 3
        assert set(losses) == {
            CLEAN,
            *(label(family, level) for family, levels in FAMILIES.items() for level in levels),
        }
        for values in losses.values():
            np.testing.assert_allclose(values, math.log2(len(text.vocabulary)), rtol=1e-6)
        assert all(part.requires_grad for part in model.parameters())

    def test_relative_noise_does_not_see_a_scale_that_the_model_undoes(self, text, windows):
        """Ten times the embeddings change absolute noise, not relative noise, where a layer norm comes first."""
        model = CharacterGPT(SIZES.gpt(len(text.vocabulary)))
        for name, part in model.named_parameters():
            if name.startswith("blocks") and ("output" in name or "perceptron.2" in name):
                torch.nn.init.zeros_(part)  # the layer adds nothing: logits depend on LN(u) alone
        before = evaluate(model, windows, Text.of(text), 0)
        with torch.no_grad():
            model.table.mul_(10)
            model.positions.mul_(10)
        after = evaluate(model, windows, Text.of(text), 0)
        for name in ("relative noise 0.4", "embedding attack 0.05"):
            np.testing.assert_allclose(after[name], before[name], rtol=2e-3)
        moved = [np.abs(found["absolute noise 0.3"] - found[CLEAN]).mean() for found in (before, after)]
        assert moved[1] < 0.3 * moved[0]

    def test_no_entry_costs_more_than_ten_passes(self, text, windows, monkeypatch):
        passes = []
        whole = CharacterGPT.forward

        def counted(model, tokens=None, *, u=None):
            passes.append(2 if u is not None and u.requires_grad else 1)  # with its gradient
            return whole(model, tokens, u=u)

        monkeypatch.setattr(CharacterGPT, "forward", counted)
        model = CharacterGPT(SIZES.gpt(len(text.vocabulary))).requires_grad_(False)
        attack_embeddings(model, *windows, 0.1)
        assert sum(passes) <= 10
        passes.clear()
        noise_terms(model, *windows, 0.1, generator())
        assert sum(passes) <= 10
        passes.clear()
        # One search gives the losses of all three counts.
        attack_characters(model, *windows, [1, 2, 4], torch.ones(len(text.vocabulary), dtype=torch.bool))
        assert sum(passes) <= 3 * 10


class TestAttacks:
    def test_no_draw_from_the_ball_beats_the_attack(self, model, windows):
        tokens, targets = windows
        found = attack_embeddings(model, tokens, targets, 0.2)
        clean = model.embed(tokens)
        assert bool((found > window_bits(model, clean, targets)).all())
        noise = torch.randn(50, *clean.shape, generator=generator(), dtype=torch.float64)
        on_sphere = 0.2 * clean.norm(dim=-1, keepdim=True) * torch.nn.functional.normalize(noise, dim=-1)
        drawn = torch.stack([window_bits(model, clean + one, targets) for one in on_sphere])
        assert bool((drawn.amax(0) < found).all())

    def test_it_stays_in_the_ball(self, model, windows, monkeypatch):
        tokens, targets = windows
        seen = []
        whole = CharacterGPT.forward
        monkeypatch.setattr(
            CharacterGPT, "forward", lambda self, t=None, *, u=None: seen.append(u.detach()) or whole(self, t, u=u)
        )
        attack_embeddings(model, tokens, targets, 0.2, steps=6, generator=generator())
        clean = model.embed(tokens)
        lengths = torch.stack([(u - clean).norm(dim=-1) / clean.norm(dim=-1) for u in seen])
        assert float(lengths.max()) <= 0.2 * (1 + 1e-12)
        assert float(lengths[-1].mean()) > 0.19  # and comes to its surface

    def test_a_larger_ball_is_worse(self, model, windows):
        small, large = (attack_embeddings(model, *windows, radius).mean() for radius in (0.02, 0.2))
        assert float(large) > float(small)

    def test_substitutions_are_few_allowed_and_first_order_best(self, model, windows, text):
        tokens, targets = windows
        allowed = torch.ones(len(text.vocabulary), dtype=torch.bool)
        allowed[-1] = False
        found, changed = attack_characters(model, tokens, targets, [1, 2, 4], allowed)
        assert int((changed != tokens).sum(1).max()) <= 4
        assert not bool((changed == len(text.vocabulary) - 1).any())
        assert bool((found[0] <= found[1]).all())
        assert bool((found[1] <= found[2]).all())
        torch.testing.assert_close(found[2], window_bits(model, model.embed(changed), targets))
        assert bool((found[2] > window_bits(model, model.embed(tokens), targets)).all())
        # Against all single substitutions: never above the worst, and on average above a random one.
        every = []
        for place in range(8):
            for character in range(len(text.vocabulary) - 1):
                other = tokens.clone()
                other[:, place] = character
                every.append(window_bits(model, model.embed(other), targets))
        drawn = torch.stack(every)
        assert bool((found[0] <= drawn.amax(0) + 1e-12).all())
        assert float(found[0].mean()) > float(drawn.mean())

    @pytest.mark.parametrize("counts", [[0], [2, 2], [9]])
    def test_counts_that_cannot_be(self, model, windows, counts):
        with pytest.raises(InputError):
            attack_characters(model, *windows, counts, torch.ones(len(model.table), dtype=torch.bool))

    def test_radius_and_steps_that_cannot_be(self, model, windows):
        with pytest.raises(InputError, match="radius"):
            attack_embeddings(model, *windows, 0.0)
        with pytest.raises(InputError, match="steps"):
            attack_embeddings(model, *windows, 0.1, steps=0)


class TestObfuscation:
    def test_harder_attacks_find_more(self, model, text, windows):
        other = train(Arm("plain"), 1, text, SIZES).model.double().requires_grad_(False)
        found = attack_harder("plain", {0: model, 1: other}, windows, torch.ones(len(text.vocabulary)) > 0)
        assert set(found.losses) == {CLEAN, *ATTACKS}
        assert found.losses[CLEAN] < found.losses["from another seed"] < found.losses["character attack"]
        assert found.losses["of more steps"] >= 0.99 * found.losses["embedding attack"]
        assert not found.suspicious
        assert math.isnan(found.left(found))
        assert (
            "from another seed" not in attack_harder("x", {0: model}, windows, torch.ones(len(model.table)) > 0).losses
        )

    def test_hidden_gradients_are_seen(self):
        plain = Attacked("plain", dict(zip((CLEAN, *ATTACKS), (2.0, 4.0, 4.1, 4.0, 3.0, 2.5), strict=True)), (0, 1))
        hiding = Attacked("hiding", dict(zip((CLEAN, *ATTACKS), (2.0, 3.0, 3.9, 4.0, 2.2, 2.6), strict=True)), (0, 1))
        assert hiding.suspicious
        assert hiding.left(plain) == pytest.approx(0.1)

    def test_a_model_that_hides_its_gradients_is_caught(self, model, text, windows):
        """Logits that are hugely scaled and rounded back have no gradient that leads anywhere."""

        class Hidden(CharacterGPT):
            def forward(self, tokens=None, *, u=None):
                return super().forward(tokens, u=u).detach() + 0.0 * super().forward(tokens, u=u)

        hidden = Hidden(model.config).double()
        hidden.load_state_dict(model.state_dict())
        hidden.requires_grad_(False)
        found = attack_harder("hidden", {0: hidden, 1: model}, windows, torch.ones(len(text.vocabulary)) > 0)
        assert found.losses["of random starts"] > found.losses[CLEAN]


class TestSensitivity:
    def test_terms_of_a_loss_whose_derivatives_are_known(self, model, windows):
        """At small noise the bias falls as its square and the first-order term as its size, and both as computed."""
        tokens, targets = windows
        small, large = (noise_terms(model, tokens, targets, size, generator(), pairs=400) for size in (0.01, 0.02))
        assert (large.first_order / small.first_order).numpy() == pytest.approx(2, rel=1e-9)
        assert float(large.bias.mean() / small.bias.mean()) == pytest.approx(4, rel=0.05)

        def loss(u):
            return window_bits(model, u[None], targets[:1])[0]

        u = model.embed(tokens[:1])[0]
        with sdpa_kernel(SDPBackend.MATH):  # the other has no second derivative
            hessian = torch.autograd.functional.hessian(loss, u).reshape(u.numel(), -1)
        # Variance of d' H d / 2 is |H|^2 size^4 / 2.
        error = float(hessian.norm()) * 0.01**2 / math.sqrt(2 * 400)
        assert float(small.bias[0]) == pytest.approx(0.5 * 0.01**2 * float(hessian.trace()), abs=4 * error)
        slope = torch.autograd.functional.jacobian(loss, u)
        assert float(small.first_order[0]) == pytest.approx(0.01 * float(slope.norm()), rel=1e-9)

    def test_the_first_order_term_is_the_spread_of_small_noise(self, model, windows):
        tokens, targets = windows
        found = noise_terms(model, tokens[:2], targets[:2], 1e-3, generator())
        clean = model.embed(tokens[:2])
        bits = window_bits(model, clean, targets[:2])
        noise = 1e-3 * torch.randn(1000, *clean.shape, generator=generator(1), dtype=torch.float64)
        drawn = torch.stack([window_bits(model, clean + one, targets[:2]) - bits for one in noise])
        assert drawn.std(0).numpy() == pytest.approx(found.first_order.numpy(), rel=0.1)

    def test_sensitivity_of_a_model_that_sees_nothing_and_of_one_that_sees_its_token(self, windows):
        tokens = windows.inputs
        frequency = torch.ones(20)
        blind = CharacterGPT(GPTConfig(20, 8, 8, 1, 2))
        torch.nn.init.zeros_(blind.table)
        assert replacement_sensitivity(blind, tokens, frequency, generator()).tolist() == [0.0] * len(tokens)
        copying = CharacterGPT(GPTConfig(20, 8, 20, 1, 2))
        for name, part in copying.named_parameters():
            if name != "norm.weight":
                torch.nn.init.zeros_(part)
        with torch.no_grad():
            copying.table.copy_(torch.eye(20))
            copying.readout.weight.copy_(torch.eye(20))
        found = replacement_sensitivity(copying, tokens, frequency, generator())
        # The replaced token's own prediction alone changes: 1 of the T - i that follow.
        place = torch.randint(8, (len(tokens), 1), generator=generator()).squeeze(1)
        torch.testing.assert_close(found, 1 / (8 - place).float())


class TestRegularisers:
    def test_the_bound_of_the_softmax_jacobian_holds_and_is_met(self):
        logits = 3 * torch.randn(2000, 6, generator=generator(), dtype=torch.float64)
        weights = torch.exp(logits - logits.logsumexp(-1, keepdim=True))
        jacobian = torch.diag_embed(weights) - weights.unsqueeze(-1) * weights.unsqueeze(-2)
        norms = torch.linalg.eigvalsh(jacobian).amax(-1)
        bound = softmax_jacobian_norm(weights)
        assert bool((norms <= bound * (1 + 1e-12)).all())
        assert float((norms / bound).max()) > 0.99
        assert float((norms / bound).min()) > 0.6  # no bound of another order
        assert softmax_jacobian_norm(torch.full((5,), 0.2)).item() == pytest.approx(0.2)

    def test_the_penalty_is_the_bound_of_the_models_own_weights(self, model, windows):
        heads = model.forward_with_heads(model.embed(windows.inputs))[1]
        found = softmax_penalty(heads)
        own = heads[0]
        worst = []
        for n in range(len(windows.inputs)):
            for h in range(2):
                each = []
                for i in range(1, 8):
                    scores = own.key[n, h, : i + 1] @ own.query[n, h, i] / 2  # sqrt(p / H) = 2
                    each.append(softmax_jacobian_norm(torch.exp(scores - scores.logsumexp(0))))
                worst.append(max(each))
        assert float(found) == pytest.approx(float(torch.stack(worst).mean()), rel=1e-9)

    def test_products_are_capped_and_small_ones_stay(self, model):
        own = CharacterGPT(model.config).double()
        own.load_state_dict(model.state_dict())
        own.requires_grad_(False)
        logits, values = product_norms(own)
        block = own.blocks[0]
        query, key, value = block.projections.weight.unflatten(0, (3, 2, 4))
        output = block.output.weight.unflatten(1, (2, 4)).movedim(1, 0)
        torch.testing.assert_close(logits[0], torch.linalg.matrix_norm(key.mT @ query, 2) / 2)
        torch.testing.assert_close(values[0], torch.linalg.matrix_norm(output @ value, 2))
        cap = float(torch.cat([logits, values]).median())
        cap_products(own, cap)
        for before, after in zip((logits, values), product_norms(own), strict=True):
            torch.testing.assert_close(after, before.clamp(max=cap))

    def test_noise_of_an_arm(self):
        u = torch.ones(2, 4, 16)
        first, second = with_noise(u, Arm("x", symmetric_noise=2.0))
        torch.testing.assert_close(first + second, 2 * u)
        torch.testing.assert_close((first - u).abs(), torch.full_like(u, 2 / 8))
        (same,) = with_noise(u, Arm("x"))
        assert same is u

    def test_the_step_has_its_length_and_direction(self):
        u, gradient = torch.randn(2, 3, 5, 4, generator=generator()).unbind()
        gradient[0, 0] = 0
        step = adversarial_step(u, gradient, 0.1) - u
        wanted = 0.1 * u.norm(dim=-1)
        wanted[0, 0] = 0
        torch.testing.assert_close(step.norm(dim=-1), wanted)
        assert bool(((step * gradient).sum(-1)[1:] > 0).all())

    @pytest.mark.parametrize("field", ["adversarial", "cap", "jasmin", "symmetric_noise"])
    def test_each_does_what_it_says(self, text, windows, field):
        """The measure that an arm lowers in training is lower than in plain training."""
        size = {"adversarial": 0.3, "cap": 0.3, "jasmin": 5.0, "symmetric_noise": 5.0}[field]
        plain = train(Arm("plain"), 0, text, SIZES).model
        other = train(replace(Arm("other"), **{field: size}), 0, text, SIZES).model

        def measured(model):
            model.requires_grad_(False)
            if field == "cap":
                return float(torch.cat(product_norms(model)).max())
            if field == "jasmin":
                return float(softmax_penalty(model.forward_with_heads(model.embed(windows.inputs))[1]))
            if field == "adversarial":
                return float(attack_embeddings(model, *windows, 0.3).mean())
            drawn = model.embed(windows.inputs)
            noise = 0.6 * torch.randn(20, *drawn.shape, generator=generator())
            return float(torch.stack([window_bits(model, drawn + one, windows.targets) for one in noise]).mean())

        assert measured(other) < measured(plain)


class TestGains:
    def test_singular_values_of_both_maps(self, model, windows):
        """Against the dense Jacobian of each layer by automatic differentiation."""
        tokens = windows.inputs[:2]
        smallest, inverse, update = [], [], []
        for u, (number, _) in zip(
            forward_with_streams(model, model.embed(tokens))[1], enumerate(model.blocks), strict=True
        ):
            layer = residual_attention(model, number)
            for n in range(2):
                whole = torch.autograd.functional.jacobian(layer.mean, u[n])
                for i in range(8):
                    own = whole[i, :, i]
                    smallest.append(torch.linalg.svdvals(torch.eye(8) - own)[-1])
                    inverse.append(1 / smallest[-1])
                    update.append(torch.linalg.svdvals(torch.eye(8) + own))
        found = layer_gains(model, tokens)
        whole = torch.stack(update).square().mean(-1).sqrt()
        wanted = [torch.stack(values).median() for values in (smallest, inverse, [one[0] for one in update])]
        assert found == pytest.approx([float(value) for value in (*wanted, whole.median())], rel=1e-6)

    def test_ranks_follow_what_costs(self):
        gains = [Gains(str(k), k, -k, 2 * k, k % 2) for k in range(5)]
        found = rank_correlations(gains, {str(k): k**2 for k in range(5)})
        assert found["smallest"] == found["update"] == pytest.approx(1)
        assert found["inverse"] == pytest.approx(-1)
        assert abs(found["whole"]) < 0.5
        assert all(math.isnan(value) for value in rank_correlations(gains[:2], {"0": 1.0, "1": 2.0}).values())
