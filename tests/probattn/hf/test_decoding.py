"""Margins along decoding equal those of one pass, whatever the model, the cache and the way of choosing tokens."""

import math

import pytest
import torch

from probattn import stability_margin
from probattn.errors import InputError
from probattn.hf.decoding import MarginMonitor
from probattn.hf.layers import attention_layer

transformers = pytest.importorskip("transformers")

VOCABULARY, END, PAD = 19, 1, 0
SMALL = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.4,
    "bos_token_id": 2, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.4,
    "bos_token_id": 2, "eos_token_id": END, "pad_token_id": PAD,
}  # fmt: skip
MODELS = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=5)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, head_dim=4)),
}
KINDS = ("determinant", "spectral", "complex", "singular_value")


def build(name, seed=0):
    torch.manual_seed(seed)
    return MODELS[name]().eval().to(torch.float64)


@pytest.fixture(scope="module")
def models():
    return {name: build(name) for name in MODELS}


@pytest.fixture(params=MODELS)
def model(request, models):
    return models[request.param]


@pytest.fixture
def llama(models):
    return models["llama"]


@pytest.fixture(scope="module")
def batch():
    """Three prompts of eight tokens, of which two are padded on the left."""
    ids = torch.randint(3, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(4))
    shown = torch.arange(8) >= torch.tensor([0, 3, 6])[:, None]
    return {"input_ids": ids.where(shown, torch.tensor(PAD)), "attention_mask": shown.long()}


def one_pass(model, ids, kind="singular_value"):
    """The margins of a single sequence without padding or cache, (L, T)."""
    streams, found = [], []

    def see(module, args, kwargs):
        streams.append(args[0] if args else kwargs["hidden_states"])

    body = model.base_model
    layers = body.h if hasattr(body, "h") else body.layers
    hooks = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    with torch.no_grad():
        model(ids[None], use_cache=False)
    for number, hook in enumerate(hooks):
        hook.remove()
        found.append(stability_margin(attention_layer(model, number).detach(), streams[number][0], kind))
    return torch.stack(found)


def generate(model, batch, kind="singular_value", **options):
    torch.manual_seed(1)
    plain = model.generate(**batch, **{"max_new_tokens": 9, "do_sample": False, **options})
    torch.manual_seed(1)
    with MarginMonitor(model, kind, prompt=True) as monitor:
        output = model.generate(
            **batch, **{"max_new_tokens": 9, "do_sample": False, **options}, logits_processor=[monitor.processor()]
        )
    assert output.equal(plain)
    return output, monitor


def require_equal(model, batch, output, record, kind="singular_value"):
    """Compare what was recorded with one pass over each finished sequence."""
    length = batch["input_ids"].shape[1]
    repeat = len(output) // len(batch["input_ids"])
    shown = batch["attention_mask"].bool().repeat_interleave(repeat, 0)
    assert record.prompt_valid.equal(shown)
    assert torch.isfinite(record.prompt).all() or kind == "spectral"
    assert (record.prompt.masked_select(~shown) == 1).all()
    assert (record.steps.masked_select(~record.steps_valid) == 1).all()
    for n, sequence in enumerate(output):
        steps = int(record.steps_valid[n].sum())
        assert record.steps_valid[n, :steps].all()
        tokens = torch.cat([sequence[:length][shown[n]], sequence[length : length + steps]])
        expected = one_pass(model, tokens, kind)
        found = torch.cat([record.prompt[:, n, shown[n]], record.steps[:, n, :steps]], -1)
        # A whole sequence and a token with its cache go through products of other sizes; norms through float32.
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_in_a_padded_batch(model, batch, kind):
    output, monitor = generate(model, batch, kind)
    record = monitor.record(output)
    assert record.steps.shape == (2, 3, output.shape[1] - 9)
    assert record.layers == (0, 1)
    assert record.kind == kind
    require_equal(model, batch, output, record, kind)
    assert record.steps.equal(monitor.record().steps)


def test_only_new_tokens_are_read_unless_the_prompt_is_asked_for(llama, batch):
    whole = generate(llama, batch)[1].record()
    with MarginMonitor(llama, layers=[1]) as monitor:
        llama.generate(**batch, max_new_tokens=9, do_sample=False, logits_processor=[monitor.processor()])
    record = monitor.record()
    assert record.prompt is None
    assert record.layers == (1,)
    torch.testing.assert_close(record.steps[0], whole.steps[1])
    assert record.steps_valid.equal(whole.steps_valid)


def test_they_are_not_those_of_another_past(llama, batch):
    """Control: the margins depend on the past that is kept, and on the layer."""
    output, monitor = generate(llama, batch)
    record = monitor.record(output)
    tokens = output[0].clone()
    tokens[0] = 18
    assert (one_pass(llama, tokens)[:, 8:-1] - record.steps[:, 0]).abs().max() > 1e-3
    assert (record.steps[0] - record.steps[1]).abs().max() > 1e-2
    assert (record.steps < 0.95).any()


def test_a_prompt_of_one_token(model):
    batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    for options in ({}, {"cache_implementation": "static"}):
        output, monitor = generate(model, batch, **options)
        require_equal(model, batch, output, monitor.record(output))


def test_sampling_several_sequences(model, batch):
    output, monitor = generate(model, batch, do_sample=True, num_return_sequences=2, temperature=2.0)
    assert len(output) == 6
    require_equal(model, batch, output, monitor.record(output))


@pytest.mark.parametrize("sampled", [False, True])
def test_beams(model, batch, sampled):
    output, monitor = generate(model, batch, num_beams=4, num_return_sequences=3, max_new_tokens=12, do_sample=sampled)
    assert len(output) == 9
    require_equal(model, batch, output, monitor.record(output))


def test_beams_are_reordered_and_end_early_somewhere(models, batch):
    """Or the test above would show nothing."""
    watched = {name: models[name] for name in ("gpt2", "llama")}
    outputs = {name: generate(model, batch, num_beams=4, max_new_tokens=12) for name, model in watched.items()}
    moved = [not step.parent.equal(torch.arange(12)) for _, monitor in outputs.values() for step in monitor._steps]
    assert sum(moved) > len(moved) / 2
    valid = torch.cat([monitor.record(output).steps_valid.flatten() for output, monitor in outputs.values()])
    assert 0 < int((~valid).sum()) < len(valid)


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}]
)
def test_other_ways_through_the_prompt(model, batch, options):
    output, monitor = generate(model, batch, **options)
    require_equal(model, batch, output, monitor.record(output))
    single = {name: part[:1] for name, part in batch.items()}  # no padding: transformers then leaves out the mask
    output, monitor = generate(model, single, **options)
    require_equal(model, single, output, monitor.record(output))


def test_a_sequence_is_over_after_its_last_token(llama, batch):
    token = int(generate(llama, batch)[0][0, 10])
    with MarginMonitor(llama, end=[token]) as monitor:
        output = llama.generate(
            **batch, max_new_tokens=9, do_sample=False, eos_token_id=token, logits_processor=[monitor.processor()]
        )
    first = (output[0, 8:] == token).nonzero()[0, 0]
    assert monitor.record().steps_valid[0].sum() == first + 1
    assert monitor.record(output).steps_valid[:, 0].all()


def test_one_new_token_has_no_steps(llama, batch):
    output, monitor = generate(llama, batch, max_new_tokens=1)
    record = monitor.record(output)
    assert record.steps.shape == (2, 3, 0)
    assert record.steps_valid.shape == (3, 0)
    assert record.flags(math.inf) == []


def test_flags_name_every_low_margin_once(llama, batch):
    with MarginMonitor(llama, threshold=0.9) as monitor:
        output = llama.generate(**batch, max_new_tokens=9, do_sample=False, logits_processor=[monitor.processor()])
    record, flags = monitor.record(output), monitor.flags(output)
    low = (record.steps < 0.9) & record.steps_valid
    assert 0 < len(flags) == int(low.sum()) < low.numel()
    assert len({flag[:3] for flag in flags}) == len(flags)
    for flag in flags:
        assert flag.margin == float(record.steps[flag.layer, flag.sequence, flag.step]) < 0.9
    assert [flag[:2] for flag in flags] == sorted(flag[:2] for flag in flags)


def test_nan_is_flagged(llama, batch):
    output, monitor = generate(llama, batch)
    record = monitor.record(output)
    record.steps[1, 0, 0] = math.nan
    assert [flag[:3] for flag in record.flags(-100.0)] == [(0, 0, 1)]


def test_one_monitor_serves_several_calls(llama, batch):
    with MarginMonitor(llama, prompt=True) as monitor:
        for stop in (8, 5):
            part = {name: value[:, :stop] for name, value in batch.items()}
            part = {name: value[:2] for name, value in part.items()}
            output = llama.generate(**part, max_new_tokens=4, do_sample=False, logits_processor=[monitor.processor()])
            assert monitor.record(output).prompt.shape == (2, 2, stop)


def test_the_model_is_left_as_it_was(batch):
    model = build("gpt2")

    def state():
        hooks = [len(part._forward_pre_hooks) for part in model.modules()]
        return (
            model.config._attn_implementation,
            {name: set(part.__dict__) for name, part in model.named_modules()},
            hooks,
        )

    before = state()

    def broken(ids, scores):
        raise RuntimeError("broken")

    monitor = MarginMonitor(model)
    with pytest.raises(RuntimeError, match="broken"), monitor:
        model.generate(**batch, max_new_tokens=2, logits_processor=[monitor.processor(), broken])
    assert state() == before
    generate(model, batch)


def test_two_monitors_watch_at_once(llama, batch):
    with MarginMonitor(llama) as first, MarginMonitor(llama, "determinant") as second:
        processors = [first.processor(), second.processor()]
        llama.generate(**batch, max_new_tokens=3, do_sample=False, logits_processor=processors)
    assert first.record().steps.shape == second.record().steps.shape
    assert (first.record().steps - second.record().steps).abs().max() > 1e-3


@pytest.mark.slow  # the compiler alone takes 8 to 20 seconds
def test_a_compiled_model_is_watched_too(batch):
    model = build("llama")
    output, monitor = generate(model, batch, max_new_tokens=2)
    expected = monitor.record(output)
    model.forward = torch.compile(model.forward, backend="eager")
    with MarginMonitor(model) as monitor:
        again = model.generate(**batch, max_new_tokens=2, do_sample=False, logits_processor=[monitor.processor()])
    assert again.equal(output)
    torch.testing.assert_close(monitor.record(again).steps, expected.steps)


class TestRefusals:
    def test_options(self, llama):
        with pytest.raises(InputError, match="kind is 'logdet'; use one of 'determinant'"):
            MarginMonitor(llama, "logdet")
        with (
            pytest.raises(InputError, match=r"layers is \[2\]; the model has 0 to 1"),
            MarginMonitor(llama, layers=[2]),
        ):
            pass
        with pytest.raises(InputError, match="threshold is nan"):
            MarginMonitor(llama, threshold=math.nan)
        with pytest.raises(InputError, match="has no threshold"):
            MarginMonitor(llama).flags()
        with pytest.raises(InputError, match="no step was recorded"):
            MarginMonitor(llama).record()

    def test_not_entered_or_entered_twice(self, llama, batch):
        monitor = MarginMonitor(llama)
        with pytest.raises(InputError, match="no pass of the observed model"):
            llama.generate(**batch, max_new_tokens=2, logits_processor=[monitor.processor()])
        with monitor, pytest.raises(InputError, match="entered already"):
            monitor.__enter__()

    def test_sequences_of_another_call(self, llama, batch):
        output, monitor = generate(llama, batch)
        with pytest.raises(InputError, match=r"sequences\[1\] does not begin"):
            monitor.record(torch.cat([output[:1], output[1:] + 1]))
        with pytest.raises(InputError, match="must be"):
            monitor.record(output[:, :5])

    def test_a_processor_used_twice(self, llama, batch):
        with MarginMonitor(llama) as monitor:
            processor = [monitor.processor()]
            llama.generate(**batch, max_new_tokens=3, do_sample=False, logits_processor=processor)
            with pytest.raises(InputError, match="make a new monitor"):
                llama.generate(**batch, max_new_tokens=3, do_sample=False, logits_processor=processor)

    def test_a_cache_that_is_filled(self, llama):
        ids = torch.arange(3, 9)[None]
        with torch.no_grad():
            cache = llama(ids[:, :4], use_cache=True)
        name = "cache" if "cache" in cache else "past_key_values"
        with MarginMonitor(llama) as monitor, pytest.raises(InputError, match="filled already"):
            llama.generate(ids, max_new_tokens=2, **{name: cache[name]}, logits_processor=[monitor.processor()])

    def test_an_assistant(self, llama):
        ids = torch.arange(3, 9)[None]
        with MarginMonitor(llama) as monitor, pytest.raises(InputError, match="assist"):
            llama.generate(
                ids, max_new_tokens=6, assistant_model=build("llama", 0), logits_processor=[monitor.processor()]
            )
