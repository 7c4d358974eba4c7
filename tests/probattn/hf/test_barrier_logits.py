"""Attaching a barrier changes no logit: architectures are covered and run as before, or refused by name."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from barrier_models import ARCHITECTURES, WEIGHT, batch, build, zoo  # noqa: E402
from layer_zoo import FAMILIES, WORDS  # noqa: E402

import probattn.hf.barrier as barrier_module  # noqa: E402
from probattn.errors import InputError  # noqa: E402
from probattn.hf.barrier import attach_barrier  # noqa: E402
from probattn.hf.layers import covered  # noqa: E402


def logits(model, training):
    model.train(training)
    ids = torch.randint(WORDS, (2, 6), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)  # for experts that draw
    return model(ids, use_cache=False).logits.detach()


def state(model):
    """Everything that attaching could leave behind."""
    return (
        model.config.to_dict(),
        [(name, sorted(module.__dict__)) for name, module in model.named_modules()],
        [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        list(model.state_dict()),
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_of_no_architecture(name):
    model = zoo(name)
    expected = {training: logits(model, training) for training in (True, False)}
    assert expected[True].std() > 1e-3
    before = state(model)
    if model.config.model_type in covered():
        handle = attach_barrier(model, WEIGHT, positions=0.5)
    else:
        with pytest.raises(InputError, match=f"model type {model.config.model_type!r} is not covered"):
            attach_barrier(model, WEIGHT)
        assert state(model) == before
    for training, values in expected.items():
        assert torch.equal(logits(model, training), values)
    assert model.config.model_type not in covered() or handle.statistics()  # and it was watched in training


def test_thirty_architectures_are_tried():
    assert len(ARCHITECTURES) >= 30
    assert sum(zoo(name).config.model_type in covered() for name in ARCHITECTURES) >= 9


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_of_no_family_with_padding(name, side):
    model, data = build(name), batch(side)
    expected = model(**data)
    attach_barrier(model, WEIGHT)
    found = model(**data)
    for one, other in ((found.logits, expected.logits), (found.loss, expected.loss)):
        # In float64 a row that sees nothing is NaN in the eager attention of transformers itself, with or without us.
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_with_a_cache_in_generation():
    model, ids = build().eval(), batch()["input_ids"]
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    handle = attach_barrier(model, WEIGHT)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert handle.statistics() == []


def test_a_barrier_that_changed_one_would_be_refused(monkeypatch):
    model = build()
    before = state(model)
    monkeypatch.setattr(barrier_module, "attach", lambda output, *others: 1.001 * output)
    with pytest.raises(InputError, match="watching the layers of GPT2LMHeadModel changed its output by"):
        attach_barrier(model, WEIGHT)
    assert state(model) == before


class TestRefusedByName:
    @pytest.mark.parametrize(
        "head",
        ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "DoubleHeadsModel"],
    )
    @pytest.mark.parametrize("placement", ["residual", "embeddings"])
    def test_another_head(self, head, placement):
        model = getattr(transformers, f"GPT2{head}")(build().config)
        with pytest.raises(InputError, match=f"the loss of GPT2{head} is no mean over predicted tokens"):
            attach_barrier(model, WEIGHT, placement=placement)

    def test_an_encoder_and_a_decoder(self):
        config = transformers.T5Config(
            vocab_size=17, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
        with pytest.raises(InputError, match="T5ForConditionalGeneration has an encoder"):
            attach_barrier(transformers.T5ForConditionalGeneration(config), WEIGHT)

    def test_no_model_of_transformers(self):
        with pytest.raises(InputError, match="Linear is no model of transformers"):
            attach_barrier(torch.nn.Linear(2, 2), WEIGHT)

    def test_attention_whose_masks_cannot_be_read(self):
        model = build("llama")
        model.config._attn_implementation = "flex_attention"
        with pytest.raises(InputError, match="'flex_attention', whose masks cannot be read; load it with attn_impl"):
            attach_barrier(model, WEIGHT)

    def test_tokens_in_a_cache(self):
        model, data = build("llama"), batch()
        attach_barrier(model, WEIGHT)
        output = model.eval()(data["input_ids"][:, :3], use_cache=True)
        name = "cache" if "cache" in output else "past_key_values"  # renamed in transformers 5.24
        with pytest.raises(InputError, match="layer 0 reads 3 tokens from a cache in training"):
            model.train()(data["input_ids"][:, 3:], **{name: output[name]})

    def test_a_mask_that_adds_biases(self):
        model, data = build("llama"), batch()
        attach_barrier(model, WEIGHT)
        future = torch.ones(1, 1, 6, 6, dtype=torch.bool).triu(1)
        mask = torch.zeros(1, 1, 6, 6, dtype=torch.float64).masked_fill(future, torch.finfo(torch.float64).min)
        model(data["input_ids"], attention_mask=mask)
        with pytest.raises(InputError, match="adds biases to the logits"):
            model(data["input_ids"], attention_mask=mask + 0.1 * torch.eye(6))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weight": -1.0}, "weight is -1.0; it must be finite and at least 0"),
            ({"weight": WEIGHT, "kind": "log"}, "kind is 'log'"),
            ({"weight": WEIGHT, "positions": 0.0}, r"positions is 0.0.*\(0, 1\]"),
            ({"weight": WEIGHT, "layers": 1.5}, r"layers is 1.5.*\(0, 1\]"),
            ({"weight": WEIGHT, "placement": "heads"}, "placement is 'heads'; use one of 'residual', 'embeddings'"),
            (
                {"weight": WEIGHT, "probes": 2},
                "non-linear function of an unbiased estimate is biased; use kind='logdet'",
            ),
            ({"weight": WEIGHT, "kind": "logdet", "probes": 0}, "probes is 0"),
            ({"weight": WEIGHT, "placement": "embeddings", "layers": 0.5}, "belong to placement='residual'"),
            ({"weight": WEIGHT, "site": torch.nn.Identity()}, "belong to placement='embeddings'"),
        ],
    )
    def test_options_leave_the_model_as_it_was(self, options, message):
        model = build()
        before = state(model)
        with pytest.raises(InputError, match=message):
            attach_barrier(model, **options)
        assert state(model) == before
