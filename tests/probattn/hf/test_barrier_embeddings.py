"""The barrier of an attention stage of its own on the input embeddings."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from barrier_models import (  # noqa: E402
    WEIGHT,
    batch,
    build,
    checkpointing,
    distance,
    gradients,
    predicted,
    step,
    watched,
)

from probattn.embedding_prior import AttentionStage  # noqa: E402
from probattn.errors import InputError  # noqa: E402
from probattn.hf.barrier import attach_barrier  # noqa: E402


def reference(model, stage, data, kind="one_sided"):
    """Gradients by autograd, of the model and of the stage, with u as the first layer finds it."""
    output, streams = watched(model, data)
    mask = data.get("attention_mask")
    total = stage.penalty(streams[0], kind, padding=None if mask is None else mask.bool()).total()
    model.zero_grad()
    (output.loss + WEIGHT * total / predicted(data)).backward()
    grads = gradients(model) | {f"attention_stage.{name}": part.grad for name, part in stage.named_parameters()}
    return grads, float(total.detach() / predicted(data))


@pytest.mark.parametrize(
    ("name", "side"),
    [("gpt2", None), ("gpt2", "left"), ("llama", "right"), ("mistral", "left"), ("gemma2", "right"), ("qwen3", "left")],
)
def test_gradients_equal_those_of_autograd(name, side):
    model, data = build(name), batch(side)
    plain = step(model, data)
    torch.manual_seed(0)
    stage = AttentionStage(16, heads=2, rank=3).double()
    with torch.no_grad():
        stage.query *= 8
    expected, value = reference(model, copy.deepcopy(stage), data)
    handle = attach_barrier(model, WEIGHT, positions=1.0, placement="embeddings", stage=stage)
    found = step(model, data)
    assert distance(found, expected) < 1e-8
    assert handle.penalty == pytest.approx(value, rel=1e-9)
    assert value > 1e-3
    assert distance(plain, {part: expected[part] for part in plain}) > 1e-4
    assert all(found[f"attention_stage.{part}"].abs().max() > 0 for part in ("query", "key"))
    if side is not None:  # without the padding it would be another penalty
        blind, _ = reference(model, copy.deepcopy(stage), {k: v for k, v in data.items() if k != "attention_mask"})
        assert distance(found, blind) > 1e-6


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant):
    model, data = build(), batch("left")
    attach_barrier(model, WEIGHT, positions=1.0, placement="embeddings")
    expected = step(model, data)
    checkpointing(model, reentrant)
    assert distance(step(model, data), expected) < 1e-12


def test_the_stage_belongs_to_the_model_until_it_is_detached():
    model = build()
    names = set(model.state_dict())
    handle = attach_barrier(model, WEIGHT, placement="embeddings")
    assert set(model.state_dict()) - names == {"attention_stage.query", "attention_stage.key"}
    assert handle.stage.query.dtype == torch.float64
    assert {id(handle.stage.query), id(handle.stage.key)} <= {id(part) for part in model.parameters()}
    assert handle.statistics() == []
    step(model, batch())
    assert [layer.layer for layer in handle.statistics()] == [-1]
    handle.detach()
    assert set(model.state_dict()) == names


@pytest.mark.parametrize("given", [False, True])
def test_a_model_that_is_not_covered_has_embeddings_too(given):
    config = transformers.FalconConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=17, bos_token_id=0, eos_token_id=0
    )
    model = transformers.FalconForCausalLM(config).train()
    site = model.transformer.h[0] if given else None
    handle = attach_barrier(model, WEIGHT, placement="embeddings", site=site)
    found = step(model, batch())
    assert handle.penalty >= 0
    assert "attention_stage.query" in found


def test_a_model_without_a_list_of_layers_needs_its_site():
    model = build()
    model.config.n_layer = 7
    with pytest.raises(InputError, match=r"no list of 7 decoder layers.*site=module"):
        attach_barrier(model, WEIGHT, placement="embeddings")
