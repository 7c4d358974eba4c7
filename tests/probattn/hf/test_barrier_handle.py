"""The handle of a barrier: off in evaluation, detached without trace, no part of copies, statistics, own losses."""

import copy
import io
import json
import math
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")

from barrier_models import (  # noqa: E402
    BATCH,
    LENGTH,
    WEIGHT,
    batch,
    build,
    by_hand,
    distance,
    gradients,
    step,
    sublayer_modules,
    watched,
)
from layer_zoo import Exact  # noqa: E402

import probattn.hf.barrier as barrier_module  # noqa: E402
from probattn.embedding_prior import AttentionStage  # noqa: E402
from probattn.errors import InputError, NonFinitePenaltyError  # noqa: E402
from probattn.hf.barrier import attach_barrier  # noqa: E402

PLACEMENTS = pytest.mark.parametrize("placement", ["residual", "embeddings"])


def state(model):
    """Everything that attaching could leave behind."""
    return (
        model.config._attn_implementation,
        model.config.to_dict(),
        [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        list(model.state_dict()),
    )


class TestOffInEvaluation:
    @pytest.mark.parametrize("way", ["eval", "no_grad"])
    @PLACEMENTS
    def test_nothing_is_computed(self, placement, way, monkeypatch):
        model, data = build(), batch("left")
        expected = model(**data).logits.detach()
        handle = attach_barrier(model, WEIGHT, placement=placement)
        monkeypatch.setattr(barrier_module, "residual_penalty", None)
        monkeypatch.setattr(AttentionStage, "penalty", None)
        model.train(way != "eval")
        with torch.set_grad_enabled(way != "no_grad"):
            output = model(**data)
        assert torch.equal(output.logits, expected)
        assert math.isnan(handle.penalty)
        assert handle.statistics() == []
        if way == "eval":
            output.loss.backward()  # the plain gradient: no barrier, no complaint
        model.train()
        with pytest.raises(TypeError):  # the watch works: in training it is computed
            model(**data)

    def test_the_last_training_pass_stays_the_one_reported(self):
        model, data = build(), batch()
        handle = attach_barrier(model, WEIGHT)
        step(model, data)
        value, seen = handle.penalty, handle.statistics()
        model.eval()(**batch("left"))
        with torch.no_grad():
            model.train()(**batch("left"))
        assert handle.penalty == value
        for mine, other in zip(handle.statistics(), seen, strict=True):
            assert torch.equal(mine.smallest_margin, other.smallest_margin)


class TestDetach:
    @pytest.mark.parametrize("before", ["eager", "sdpa"])
    @PLACEMENTS
    def test_restores_the_model_exactly(self, placement, before):
        model, data = build(), batch("left")
        model.set_attn_implementation(before)
        untouched, expected = state(model), step(model, data)
        random = torch.get_rng_state()
        handle = attach_barrier(model, WEIGHT, placement=placement, stage=None)
        assert model.config._attn_implementation == before
        assert placement == "embeddings" or torch.equal(torch.get_rng_state(), random)
        step(model, data)
        assert state(model) != untouched
        handle.detach()
        handle.detach()
        assert state(model) == untouched
        model.zero_grad()
        found = step(model, data)
        assert all(torch.equal(found[name], part) for name, part in expected.items())

    def test_a_second_barrier_is_refused_until_then(self):
        model, data = build(), batch()
        handle = attach_barrier(model, WEIGHT, positions=1.0)
        with pytest.raises(InputError, match=r"attached to this model already; call its detach\(\) first"):
            attach_barrier(model, WEIGHT)
        expected = step(model, data)
        handle.detach()
        attach_barrier(model, WEIGHT, positions=1.0)
        assert distance(step(model, data), expected) < 1e-12

    def test_models_that_share_a_config_are_apart(self):
        first = build()
        second = transformers.GPT2LMHeadModel(first.config).double().eval()
        data = batch("left")
        plain = second(**data).logits
        handles = [attach_barrier(model, WEIGHT) for model in (first, second)]
        handles[0].detach()
        assert torch.equal(second(**data).logits, plain)
        second.train()(**data)
        assert handles[1].statistics()
        assert handles[0].statistics() == []


class TestCopies:
    @pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
    @PLACEMENTS
    def test_are_free_of_it(self, placement, way):
        model, data = build(), batch("left")
        untouched = state(model)
        handle = attach_barrier(model, WEIGHT, placement=placement)
        step(model, data)
        handle.couple(model(**data).loss)  # a graph in the handle is in nobody's way
        if way == "deepcopy":
            copied = copy.deepcopy(model)
        elif way == "pickle":
            copied = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            copied = torch.load(file, weights_only=False)
        assert state(copied) == untouched
        assert torch.equal(copied(**data).logits, model(**data).logits)
        mine, theirs = dict(model.named_parameters()), dict(copied.named_parameters())
        assert all(part is not mine[name] and torch.equal(part, mine[name]) for name, part in theirs.items())
        attach_barrier(copied, WEIGHT, placement=placement)
        step(model, data)  # the model itself still has it
        assert len(handle.statistics()) == (2 if placement == "residual" else 1)

    def test_saving_does_not_hold_the_weights_twice(self):
        model = build()
        plain = len(pickle.dumps(model))
        attach_barrier(model, WEIGHT)
        assert len(pickle.dumps(model)) == pytest.approx(plain, rel=1e-3)

    def test_hooks_of_others_are_kept(self):
        model, data = build(), batch()
        block, _ = sublayer_modules(model, 0)
        block.register_forward_pre_hook(_count)
        attach_barrier(model, WEIGHT)
        _COUNTED.clear()
        copy.deepcopy(model)(**data)
        pickle.loads(pickle.dumps(model))(**data)
        assert len(_COUNTED) == 2

    def test_a_part_copied_alone_has_hooks_that_do_nothing(self):
        model, data = build(), batch()
        attach_barrier(model, WEIGHT)
        for part in (copy.deepcopy(model.transformer), pickle.loads(pickle.dumps(model.transformer))):
            assert torch.equal(
                part(data["input_ids"]).last_hidden_state, model.transformer(data["input_ids"]).last_hidden_state
            )

    def test_a_saved_model_knows_nothing_of_it(self, tmp_path):
        model, data = build(dtype=torch.float32), batch("left")
        attach_barrier(model, WEIGHT)
        model.save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        assert "probattn" not in text
        assert json.loads(text)["model_type"] == "gpt2"
        loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
        kept = data["attention_mask"].bool()
        torch.testing.assert_close(loaded(**data).logits[kept], model.eval()(**data).logits[kept], rtol=0, atol=1e-5)


_COUNTED = []


def _count(module, args):
    _COUNTED.append(1)


class TestLosses:
    def test_an_own_loss_must_be_coupled(self):
        model, data = build(), batch()
        attach_barrier(model, WEIGHT)
        step(model, data)  # its scale must not stand in for the missing one
        with pytest.raises(RuntimeError, match=r"let the model compute the loss \(labels=...\).*handle.couple\(loss\)"):
            model(data["input_ids"]).logits.square().mean().backward()

    @pytest.mark.parametrize("body", [False, True])
    def test_an_own_loss(self, body):
        model, data = build(), batch("left")
        ids, mask = data["input_ids"], data["attention_mask"]
        with Exact():
            # Divided by the tokens here, and by the labels there.
            other, value, _ = by_hand(model, data)
            plain = step(model, data)
            labels = int((data["labels"][:, 1:] != -100).sum())
            expected = {name: (other[name] - part) * labels / int(mask.sum()) for name, part in plain.items()}
            watched_model = model.transformer if body else model
            handle = attach_barrier(watched_model, WEIGHT, positions=1.0)
            model.zero_grad()
            output = watched_model(ids, attention_mask=mask)[0]
            loss = 0 * output.square().mean()
            coupled = handle.couple(loss)
            assert torch.equal(coupled, loss)
            (2 * coupled).backward()
        found = gradients(model)
        names = [name for name in found if expected[name].abs().max() > 1e-9]
        assert distance({n: found[n] for n in names}, {n: 2 * expected[n] for n in names}) < 1e-6
        assert handle.penalty == pytest.approx(value * labels / int(mask.sum()), rel=1e-8)

    def test_a_tuple_instead_of_an_output(self):
        model, data = build(), batch()
        attach_barrier(model, WEIGHT, positions=1.0)
        expected = step(model, data)
        model.zero_grad()
        model(**data, return_dict=False)[0].backward()
        assert distance(gradients(model), expected) < 1e-12

    def test_coupling_before_any_pass_is_refused(self):
        handle = attach_barrier(build(), WEIGHT)
        with pytest.raises(InputError, match=r"no forward pass in training mode; call model.train\(\)"):
            handle.couple(torch.ones((), requires_grad=True))

    def test_a_pass_in_which_no_layer_was_drawn(self):
        model, data = build(), batch()
        plain = step(model, data)
        handle = attach_barrier(model, WEIGHT, layers=1e-9)
        assert distance(step(model, data), plain) < 1e-12
        assert handle.penalty == 0
        assert handle.statistics() == []

    def test_one_token_alone(self):
        """Its weight is one: what is left of the block is the path through its own value."""
        model = build()
        ids = batch()["input_ids"][:, :1]
        handle = attach_barrier(model, WEIGHT, "logdet", 1.0)
        handle.couple(model(ids).logits.square().mean()).backward()
        assert handle.penalty != 0
        assert all(torch.isfinite(part).all() for part in gradients(model).values())


class TestErrors:
    def test_a_penalty_that_is_not_finite_is_located(self):
        model, data = build(), batch("left")
        handle = attach_barrier(model, WEIGHT, "spectral", 1.0)
        with torch.no_grad():
            for number, size in ((0, 1e-3), (1, 1e3)):
                model.transformer.h[number].attn.c_proj.weight *= size
        with pytest.raises(NonFinitePenaltyError, match=r"the spectral penalty is inf at layer 1, position \d of seq"):
            model(**data)
        seen = handle.statistics()
        assert torch.isfinite(seen[0].penalty)
        assert torch.isinf(seen[1].penalty)

    @PLACEMENTS
    def test_a_batch_of_padding_only(self, placement):
        model, data = build(), batch("left")
        attach_barrier(model, WEIGHT, placement=placement)
        with pytest.raises(InputError, match=r"attention_mask \(3, 6\) has no token in it; drop batches"):
            model(**data | {"attention_mask": torch.zeros(BATCH, LENGTH, dtype=torch.long)})

    def test_a_sequence_of_padding_only_does_not_count(self):
        model, data = build(), batch()
        attach_barrier(model, WEIGHT, positions=1.0)
        expected = step(model, data)
        more = {name: torch.cat([part, part[:1]]) for name, part in data.items()}
        more["labels"] = more["labels"].clone()
        more["labels"][-1] = -100
        more["attention_mask"] = torch.ones(BATCH + 1, LENGTH, dtype=torch.long)
        more["attention_mask"][-1] = 0
        assert distance(step(model, more), expected) < 1e-6  # the loss is in single precision


class TestStatistics:
    @pytest.mark.parametrize("name", ["gpt2", "gemma3"])
    def test_the_support_positions_have_the_smallest_margins(self, name):
        model, data = build(name), batch("right")
        mask = data["attention_mask"].bool()
        with Exact():
            _, _, determinants = by_hand(model, data)  # (layers, B, T)
            handle = attach_barrier(model, WEIGHT, "logdet", 1.0)
            assert handle.statistics() == []
            model(**data)
        seen = handle.statistics(support=3)
        assert [layer.layer for layer in seen] == [0, 1]
        for layer, margins in zip(seen, determinants, strict=True):
            own = margins.masked_fill(~mask, torch.inf)
            torch.testing.assert_close(own[layer.support[:, 0], layer.support[:, 1]], own.flatten().sort().values[:3])
            torch.testing.assert_close(layer.smallest_margin, own.min())
            torch.testing.assert_close(layer.penalty, -margins[mask].abs().log().mean())

    @PLACEMENTS
    def test_padding_is_never_among_them(self, placement):
        model, data = build(), batch("left")
        handle = attach_barrier(model, WEIGHT, positions=1.0, placement=placement)
        model(**data)
        tokens = int(data["attention_mask"].sum())
        for layer in handle.statistics(support=1000):
            assert layer.support.shape == (tokens, 2)
            assert data["attention_mask"][layer.support[:, 0], layer.support[:, 1]].all()
            assert len(layer.support.unique(dim=0)) == tokens

    def test_positions_that_are_all_padding(self):
        model, data = build(), batch("left", size=1)
        data["attention_mask"][:, :5] = 0
        data["labels"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, -100)
        handle = attach_barrier(model, WEIGHT, positions=0.2)
        torch.manual_seed(1)
        model(data["input_ids"], attention_mask=data["attention_mask"])
        for layer in handle.statistics():
            assert layer.support.shape[0] in (0, 1)

    def test_with_probes_they_are_singular_values(self):
        model, data = build("llama"), batch()
        handle = attach_barrier(model, WEIGHT, "singular_value", 1.0)
        model(**data)
        expected = [layer.smallest_margin for layer in handle.statistics()]
        handle.detach()
        handle = attach_barrier(model, WEIGHT, "logdet", 1.0, probes=2)
        model(**data)
        for layer, margin in zip(handle.statistics(), expected, strict=True):
            torch.testing.assert_close(layer.smallest_margin, margin, rtol=1e-6, atol=0)


def test_a_plain_training_loop():
    model = build(dtype=torch.float32)
    handle = attach_barrier(model, weight=0.05, positions=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data, history = batch(), []
    for _ in range(20):
        loss = model(**data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    handle.detach()
    assert history[-1] < 0.7 * history[0]


def test_the_barrier_lowers_what_it_penalises():
    def trained(weight):
        model, data = build(dtype=torch.float32), batch()
        handle = attach_barrier(model, weight, "smooth", 1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(20):
            optimizer.zero_grad()
            model(**data).loss.backward()
            optimizer.step()
        return handle.penalty

    assert trained(1.0) < 0.7 * trained(0.0)


def test_streams_are_what_the_layers_are_given():
    model, data = build("llama"), batch()
    _, streams = watched(model, data)
    hidden = model(**data, output_hidden_states=True).hidden_states
    for stream, own in zip(streams, hidden, strict=False):
        assert torch.equal(stream, own)
