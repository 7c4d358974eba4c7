"""Gradients of the barrier equal those of the penalty added by hand, from blocks of the model's own code."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from barrier_models import (
    BATCH,
    LENGTH,
    WEIGHT,
    batch,
    build,
    by_hand,
    distance,
    gradients,
    predicted,
    step,
    watched,
    without_dropout,
)
from layer_zoo import FAMILIES, Exact

from probattn.errors import InputError
from probattn.hf.barrier import attach_barrier
from probattn.hf.layers import attention_layer
from probattn.hf.stream import padding_of

SIDES = [("gpt2", "left"), ("llama", "left"), ("mistral", "left"), ("qwen3", "right"), ("gemma3", "right")]


@pytest.mark.parametrize(("name", "side"), [*((name, None) for name in FAMILIES), *SIDES])
def test_equal_those_by_hand(name, side):
    model, data = build(name), batch(side, size=2)
    with Exact():
        expected, value, _ = by_hand(model, data)
        handle = attach_barrier(model, 0.0, positions=1.0)
        plain = step(model, data)
        handle.weight = WEIGHT
        found = step(model, data)
    assert value > 0.01
    assert handle.penalty == pytest.approx(value, rel=1e-8)
    assert distance(found, expected) < 1e-8
    assert distance(plain, expected) > 1e-3


def test_in_single_precision():
    double, single, data = build("llama"), build("llama", torch.float32), batch("left")
    with Exact():
        attach_barrier(double, WEIGHT, positions=1.0)
        expected = step(double, data)
    attach_barrier(single, WEIGHT, positions=1.0)
    assert distance(step(single, data), expected) < 1e-4


def test_of_another_kind_or_weight_are_others():
    model, data = build(), batch("left")
    with Exact():
        expected, _, _ = by_hand(model, data, "logdet")
        handle = attach_barrier(model, WEIGHT, "logdet", 1.0)
        assert distance(step(model, data), expected) < 1e-8
        handle.weight = 1.01 * WEIGHT
        assert distance(step(model, data), expected) > 1e-5
        handle.detach()
        attach_barrier(model, WEIGHT, "smooth", 1.0)
        assert distance(step(model, data), expected) > 1e-5


@pytest.mark.parametrize("kind", ["spectral", "singular_value"])
def test_of_the_other_kinds_equal_a_difference_quotient(kind):
    model, data = build("llama"), batch()
    with torch.no_grad():
        for layer in model.model.layers:  # blocks inside the boundary
            layer.self_attn.o_proj.weight *= 0.03
    handle = attach_barrier(model, 0.0, kind, 1.0)
    plain = step(model, data)
    handle.weight = 1.0
    found = {name: part - plain[name] for name, part in step(model, data).items()}
    slope = math.sqrt(sum(float(part.square().sum()) for part in found.values()))
    assert slope > 0.01

    def moved(size):
        with torch.no_grad():
            for name, part in model.named_parameters():
                part += size / slope * found[name]
        model(**data)
        return handle.penalty

    difference = moved(1e-6) - moved(-2e-6)
    assert difference / 2e-6 == pytest.approx(slope, rel=1e-3)  # norms of the library go through float32


def test_follow_the_weight_while_training():
    model, data = build(), batch()
    plain = step(model, data)
    handle = attach_barrier(model, 0.0, positions=1.0)
    assert distance(step(model, data), plain) < 1e-12
    handle.weight = WEIGHT
    one = step(model, data)
    handle.weight = 2 * WEIGHT
    two = step(model, data)
    assert handle.weight == 2 * WEIGHT
    for name, part in plain.items():
        torch.testing.assert_close(two[name] - part, 2 * (one[name] - part), rtol=1e-9, atol=1e-12)
    for bad in (-0.1, math.nan, math.inf):
        with pytest.raises(InputError, match="it must be finite and at least 0"):
            handle.weight = bad
    assert handle.weight == 2 * WEIGHT


@pytest.mark.parametrize("scale", [1024.0, 2.0**-7])
def test_follow_the_scale_of_the_loss_exactly(scale):
    # As a gradient scaler of mixed precision does it: a power of two, so that nothing is rounded.
    model, data = build(dtype=torch.float32), batch("left")
    plain = step(model, data)
    attach_barrier(model, WEIGHT, positions=1.0)
    one, scaled = step(model, data), step(model, data, scale)
    for name, part in one.items():
        assert torch.equal(scaled[name], scale * part)
    assert distance(one, plain) > 1e-3


def test_of_a_sum_of_two_passes_with_scales_of_their_own():
    model, first, second = build(), batch(), batch("left")
    attach_barrier(model, WEIGHT, positions=1.0)
    apart = [step(model, first, 3.0), step(model, second, 0.25)]
    model.zero_grad()
    (3.0 * model(**first).loss + 0.25 * model(**second).loss).backward()
    together = {name: apart[0][name] + apart[1][name] for name in apart[0]}
    assert distance(gradients(model), together) < 1e-7  # the loss itself is in single precision


def test_accumulate_over_parts_of_a_batch():
    model, data = build(), batch("left", size=4)
    attach_barrier(model, WEIGHT, positions=1.0)
    whole = step(model, data)
    halves = [{name: part[rows] for name, part in data.items()} for rows in (slice(2), slice(2, 4))]
    model.zero_grad()
    for half in halves:
        model(**half, num_items_in_batch=predicted(data)).loss.backward()
    assert distance(gradients(model), whole) < 1e-6  # sums in single precision, in another order
    # Halves of unequal numbers of tokens, each with its own mean: another objective.
    model.zero_grad()
    for half in halves:
        (model(**half).loss / 2).backward()
    assert distance(gradients(model), whole) > 1e-3


def test_accumulate_over_equal_parts_with_the_loss_divided():
    model, data = build(), batch(size=4)
    attach_barrier(model, WEIGHT, positions=1.0)
    whole = step(model, data)
    model.zero_grad()
    for rows in (slice(2), slice(2, 4)):
        (model(**{name: part[rows] for name, part in data.items()}).loss / 2).backward()
    assert distance(gradients(model), whole) < 1e-6


def test_labels_by_place_or_shifted_already_are_counted_too():
    model, data = build("llama"), batch("right")
    handle = attach_barrier(model, WEIGHT, positions=1.0)
    expected = step(model, data)
    value = handle.penalty
    shifted = torch.nn.functional.pad(data["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    assert distance(step(model, {**data, "shift_labels": shifted}), expected) < 1e-12
    assert handle.penalty == pytest.approx(value, rel=1e-12)
    model.zero_grad()
    names = ("input_ids", "attention_mask", None, None, None, "labels")
    model(*(data.get(name) for name in names)).loss.backward()
    assert distance(gradients(model), expected) < 1e-12


def test_are_finite_under_autocast():
    model, data = build(dtype=torch.float32), batch("left")
    plain = step(model, data)
    handle = attach_barrier(model, WEIGHT, positions=1.0)
    expected = step(model, data)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**data).loss
    model.zero_grad()
    (1024 * loss).backward()
    found = {name: part / 1024 for name, part in gradients(model).items()}
    assert all(torch.isfinite(part).all() for part in found.values())
    assert math.isfinite(handle.penalty)
    # Eight bits of mantissa; and nearer to the penalised gradient than to the plain one.
    assert distance(found, expected) < 0.1 < distance(plain, expected)


def test_are_unbiased_from_random_positions_layers_and_probes():
    model, data = build("gpt2"), batch("left", size=2)
    name = "transformer.h.0.attn.c_attn.weight"
    plain = step(model, data)[name]
    handle = attach_barrier(model, WEIGHT, "logdet", 1.0)
    expected = step(model, data)[name] - plain
    value = handle.penalty
    handle.detach()
    handle = attach_barrier(model, WEIGHT, "logdet", 0.5, layers=0.7, probes=1)
    torch.manual_seed(0)
    draws, values = [], []
    for _ in range(150):
        draws.append(step(model, data)[name] - plain)
        values.append(handle.penalty)
    along = (torch.stack(draws) * expected).sum((1, 2)) / expected.square().sum()  # 1 on average
    for found, mean in ((along, 1.0), (torch.tensor(values), value)):
        error = float(found.std() / len(found) ** 0.5)
        assert abs(float(found.mean()) - mean) < 4 * error
    error = float(along.std() / len(along) ** 0.5)
    for wrong in (0.5, 0.7, 2.0):  # a share forgotten, or taken twice
        assert abs(wrong * float(along.mean()) - 1) > 2 * error


def test_a_layer_that_stands_in_the_list_twice_counts_twice():
    model, data = build("llama"), batch() | {"use_cache": False}  # which both calls would write into
    model.model.layers[1] = model.model.layers[0]
    with Exact():
        expected, value, _ = by_hand(model, data)
        handle = attach_barrier(model, WEIGHT, positions=1.0)
        found = step(model, data)
    assert handle.penalty == pytest.approx(value, rel=1e-8)
    assert distance(found, expected) < 1e-8
    assert [layer.layer for layer in handle.statistics()] == [0, 0]


def test_attention_to_an_encoder_does_not_count():
    model, data = build("gpt2"), batch()
    handle = attach_barrier(model, WEIGHT, positions=1.0)
    model(**data)
    expected = handle.penalty
    handle.detach()
    transformers = pytest.importorskip("transformers")
    model.config.add_cross_attention = True
    crossed = without_dropout(transformers.GPT2LMHeadModel(model.config).double().train())
    missing = crossed.load_state_dict(model.state_dict(), strict=False)
    assert any("crossattention" in name for name in missing.missing_keys)
    handle = attach_barrier(crossed, WEIGHT, positions=1.0)
    crossed(**data, encoder_hidden_states=torch.ones(BATCH, 2, 16, dtype=torch.float64))
    assert [layer.layer for layer in handle.statistics()] == [0, 1]
    crossed(**data)
    assert handle.penalty == pytest.approx(expected, rel=1e-9)


def test_packed_sequences_are_apart():
    model, ids = build("llama"), batch()["input_ids"]
    handle = attach_barrier(model, WEIGHT, "logdet", 1.0)
    apart = []
    for part in (ids[:1, :3], ids[:1, 3:]):
        model(part, labels=part)
        apart.append(handle.penalty * (part.shape[1] - 1))
    model(ids[:1], labels=ids[:1], use_cache=False, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    assert handle.penalty * (LENGTH - 1) == pytest.approx(sum(apart), rel=1e-6)


def test_padding_is_read_off_every_form_of_mask():
    flat = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    seen = (torch.ones(4, 4, dtype=torch.bool).tril() & flat.bool()[:, None])[:, None]
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (flat, seen, additive):
        assert torch.equal(padding_of(mask, 4), flat.bool())
    assert torch.equal(padding_of(seen[:, :, 2:], 2), flat[:, 2:].bool())  # the rest are cached
    assert padding_of(None, 4) is None


def test_the_determinants_are_those_of_the_layer():
    model, data = build("llama"), batch()
    with Exact():
        _, streams = watched(model, data)
        _, _, determinants = by_hand(model, data)
        for number, stream in enumerate(streams):
            sign, value = attention_layer(model, number).logabsdet(stream.detach())
            torch.testing.assert_close(sign * value.exp(), determinants[number], rtol=1e-8, atol=1e-10)
