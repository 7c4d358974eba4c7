"""Training with the barrier: what is logged, what a checkpoint holds, and that going on from one changes nothing."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from listening import listening

from probattn.errors import InputError, NonFinitePenaltyError
from probattn.hf.barrier import attach_barrier
from probattn.inference.training.options import TrainOptions
from probattn.inference.training.run import train
from probattn.inference.training.trainer import LogBarrierTrainer, last_whole_checkpoint
from probattn.models.causal_lm import CharacterTokeniser, build_causal_lm, load_causal_lm

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

OPTIONS = TrainOptions(
    layers=1,
    dim=16,
    heads=2,
    context=24,
    batch=8,
    steps=12,
    save_every=4,
    evaluate_every=6,
    evaluate_windows=16,
    log_every=1,
    warmup=2,
    learning_rate=3e-3,
    weight=0.5,
    kind="smooth",
    positions=0.5,
    dropout=0.1,
    precision="float64",
    device="cpu",
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 120, encoding="utf-8")
    return str(path)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {line["step"]: line["objective"] for line in lines(folder) if "objective" in line}


def logged(seen):
    """Collect the lines that are logged meanwhile."""
    return listening(lambda record: seen.append(record.getMessage()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, text):
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole")
    seen = []
    with logged(seen):
        return out, train(replace(OPTIONS, out=out, corpus=text)), seen


def test_a_run_leaves_a_model_its_alphabet_and_its_figures(whole):
    out, result, seen = whole
    assert {entry.name for entry in out.iterdir()} == {
        "model",
        "metrics.jsonl",
        "config.json",
        "checkpoint-8",
        "checkpoint-12",
    }
    trained = [line for line in lines(out) if "loss" in line]
    assert [line["step"] for line in trained] == list(range(1, 13))
    for line in trained:
        assert line["cross_entropy"] == line["loss"]
        assert line["objective"] == pytest.approx(line["cross_entropy"] + 0.5 * line["penalty"], abs=1e-12)
        assert line["penalty"] > 0
        layer, sequence, position = line["support"]
        assert layer == 0
        assert 0 <= sequence < 8
        assert 0 <= position < 24
    assert trained[-1]["cross_entropy"] < trained[0]["cross_entropy"]
    assert len(seen) >= 12
    assert seen[0].startswith("step 1: loss")
    assert json.loads((out / "config.json").read_text())["identity"]["weight"] == 0.5

    model, tokeniser = load_causal_lm(out / "model")
    assert isinstance(tokeniser, CharacterTokeniser)
    assert [tokeniser.name(token) for token in tokeniser.encode("fox").tolist()] == list("fox")
    assert not any("stage" in name or "probattn" in name for name in model.state_dict())
    assert "probattn" not in (out / "model" / "config.json").read_text()
    assert result["cross_entropy"] == [line for line in lines(out) if "eval_loss" in line][-1]["eval_loss"]


@pytest.mark.filterwarnings("ignore:You are resuming training:UserWarning")
def test_a_run_that_goes_on_is_the_run_that_never_stopped(whole, text, tmp_path):
    out = tmp_path / "run"
    options = replace(OPTIONS, out=out, corpus=text)
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "checkpoint-12")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "torn')  # what a killed process may leave
    result = train(replace(options, resume=True))
    assert losses(out) == losses(whole[0])
    assert result == whole[1]
    # The control: another seed is another run.
    train(replace(options, out=tmp_path / "other", seed=1, steps=1))
    assert losses(tmp_path / "other")[1] != losses(out)[1]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "rng_state.pth"])
def test_a_half_written_checkpoint_is_passed_over_and_said(whole, text, tmp_path, file):
    out = tmp_path / "run"
    options = replace(OPTIONS, out=out, corpus=text)
    shutil.copytree(whole[0], out)
    damaged = out / "checkpoint-12" / file
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    warned = []
    with logged(warned):
        assert last_whole_checkpoint(out) == out / "checkpoint-8"
    assert len(warned) == 1
    assert "checkpoint-12 is not whole" in warned[0]
    if file == "model.safetensors":
        seen = []
        with logged(seen):
            assert train(replace(options, resume=True)) == whole[1]
        assert any("checkpoint-12 is not whole" in line for line in seen)


@pytest.mark.filterwarnings("ignore:You are resuming training:UserWarning")
def test_a_finished_run_is_finished(whole, text, tmp_path):
    """Resumed once more, or killed between the last checkpoint and the model, it trains no step and loses nothing."""
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    before = {path.name: path.read_bytes() for path in (out / "checkpoint-12").iterdir()}
    metrics = (out / "metrics.jsonl").read_bytes()
    weights = (out / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(out / "model")
    for _ in range(2):
        assert train(replace(OPTIONS, out=out, corpus=text, resume=True)) == whole[1]
        assert {path.name: path.read_bytes() for path in (out / "checkpoint-12").iterdir()} == before
        assert (out / "metrics.jsonl").read_bytes() == metrics
        assert (out / "model" / "model.safetensors").read_bytes() == weights
        assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-12"}


def test_a_run_killed_before_its_closing_line_writes_it(whole, text, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "model")
    kept = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert "train_loss" in kept[-1]
    (out / "metrics.jsonl").write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:20], encoding="utf-8")
    assert train(replace(OPTIONS, out=out, corpus=text, resume=True)) == whole[1]
    found, expected = lines(out), lines(whole[0])
    assert found[:-1] == expected[:-1]
    assert found[-1] == {name: value for name, value in expected[-1].items() if name in found[-1]}
    assert {"step", "train_loss", "epoch"} <= found[-1].keys()


@pytest.mark.filterwarnings("ignore:You are resuming training:UserWarning")
def test_the_mean_loss_after_a_resumption_is_that_of_the_whole_run(whole, text, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    shutil.rmtree(out / "checkpoint-12")
    train(replace(OPTIONS, out=out, corpus=text, resume=True))
    found, expected = (
        next(line["train_loss"] for line in reversed(lines(folder)) if "train_loss" in line)
        for folder in (out, whole[0])
    )
    assert found == expected
    assert expected == pytest.approx(np.mean([line["loss"] for line in lines(whole[0]) if "loss" in line]))


@pytest.mark.filterwarnings("ignore:You are resuming training:UserWarning")
def test_a_checkpoint_between_two_lines_of_the_log_changes_no_line(text, tmp_path):
    """The means are over all steps since the last line, also over those before the checkpoint."""
    options = replace(OPTIONS, corpus=text, log_every=3, save_every=2, steps=6, keep=3)
    train(replace(options, out=tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "broken" / f"checkpoint-{step}")
    train(replace(options, out=tmp_path / "broken", resume=True))
    found, expected = (
        [
            {name: value for name, value in line.items() if "runtime" not in name and "second" not in name}
            for line in made
        ]
        for made in (lines(tmp_path / "broken"), lines(tmp_path / "whole"))
    )
    assert found == expected
    # A kill before the checksums leaves a checkpoint that is whole, and has the sums.
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-6")
    (tmp_path / "broken" / "checkpoint-2" / "checksums.json").unlink()
    train(replace(options, out=tmp_path / "broken", resume=True))
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    # The control: without the sums of the checkpoint, at step 2, the line of step 3 is that of the last step alone.
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    shutil.rmtree(tmp_path / "broken" / "checkpoint-6")
    (tmp_path / "broken" / "checkpoint-2" / "sums.json").unlink()
    train(replace(options, out=tmp_path / "broken", resume=True))
    assert losses(tmp_path / "broken")[3] != losses(tmp_path / "whole")[3]
    assert losses(tmp_path / "broken")[6] == losses(tmp_path / "whole")[6]


def test_a_checkpoint_that_cannot_be_written_is_one_line_and_the_ones_before_stay(text, tmp_path, monkeypatch):
    """The libraries' own errors, which name neither the file nor the reason."""
    out, saved, written = tmp_path / "run", torch.save, []

    def save(content, file, *arguments, **options):
        written.append(file)
        if len([name for name in written if str(name).endswith("optimizer.pt")]) == 2:
            raise RuntimeError("basic_ios::clear: iostream error")
        saved(content, file, *arguments, **options)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(InputError, match=r"checkpoint-8: cannot be written: .*; .* What was there before is as it was"):
        train(replace(OPTIONS, out=out, corpus=text))
    monkeypatch.undo()
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4"}
    assert last_whole_checkpoint(out) == out / "checkpoint-4"


def test_fewer_steps_than_between_two_lines_of_the_log(text, tmp_path):
    out = tmp_path / "run"
    result = train(replace(OPTIONS, out=out, corpus=text, steps=3, log_every=20, save_every=0, evaluate_every=0))
    assert all(math.isfinite(value) for value in result.values())
    assert (out / "model" / "model.safetensors").is_file()
    assert [line["step"] for line in lines(out) if "loss" in line] == [3]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json", "scheduler.pt"])
def test_a_flipped_bit_of_a_checkpoint_is_noticed(whole, tmp_path, file):
    out = tmp_path / "run"
    shutil.copytree(whole[0], out)
    assert last_whole_checkpoint(out) == out / "checkpoint-12"
    damaged = out / "checkpoint-12" / file
    content = bytearray(damaged.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    damaged.write_bytes(bytes(content))
    warned = []
    with logged(warned):
        assert last_whole_checkpoint(out) == out / "checkpoint-8"
    assert f"{file} differs from its checksum" in warned[0]


def test_accumulation_does_not_change_the_run(text, tmp_path):
    plain = replace(OPTIONS, corpus=text, steps=5, positions=1.0, dropout=0.0, save_every=0, out=tmp_path / "plain")
    parts = replace(plain, accumulate=4, out=tmp_path / "parts")
    train(plain)
    train(parts)
    expected, found = losses(tmp_path / "plain"), losses(tmp_path / "parts")
    # The Trainer keeps its sum of losses in single precision.
    assert found == pytest.approx(expected, rel=1e-6)
    # The smallest margin is that of all parts, not of the last one.
    margins = [
        {line["step"]: line["smallest_margin"] for line in lines(tmp_path / name) if "smallest_margin" in line}
        for name in ("plain", "parts")
    ]
    assert margins[1] == pytest.approx(margins[0], rel=1e-6)
    assert len(margins[0]) == plain.steps
    unweighted = replace(plain, weight=0.1, out=tmp_path / "weight")
    train(unweighted)
    assert [line["cross_entropy"] for line in lines(tmp_path / "weight") if "loss" in line][-1] != pytest.approx(
        [line["cross_entropy"] for line in lines(tmp_path / "plain") if "loss" in line][-1], rel=1e-6
    )


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "gemma2", "qwen3"])
def test_every_architecture_trains_and_goes_on_from_its_folder(architecture, text, tmp_path):
    first = replace(
        OPTIONS, architecture=architecture, steps=2, log_every=1, save_every=0, corpus=text, out=tmp_path / "first"
    )
    before = train(first)
    again = replace(first, model=tmp_path / "first" / "model", out=tmp_path / "second", placement="embeddings")
    after = train(again)
    assert after["cross_entropy"] < before["cross_entropy"] + 0.1
    assert before["penalty"] > 0
    assert after["penalty"] > 0


def test_with_probes_and_a_part_of_the_layers(text, tmp_path):
    options = replace(OPTIONS, layers=2, kind="logdet", probes=1, barrier_layers=0.5, steps=4, save_every=0)
    train(replace(options, corpus=text, out=tmp_path))
    written = [line for line in lines(tmp_path) if "penalty" in line]
    assert len(written) == 4
    assert all(isinstance(line["penalty"], float) for line in written)
    named = json.loads((tmp_path / "config.json").read_text())["options"]
    assert (named["probes"], named["barrier_layers"]) == (1, 0.5)


def test_without_a_weight_there_is_no_barrier(text, tmp_path):
    train(replace(OPTIONS, weight=0.0, steps=2, save_every=0, corpus=text, out=tmp_path))
    assert all("penalty" not in line for line in lines(tmp_path))


def test_a_penalty_that_is_not_finite_stops_and_keeps_the_checkpoint(text, tmp_path):
    options = replace(OPTIONS, out=tmp_path, corpus=text, save_every=1, warmup=0, learning_rate=1e200)
    with pytest.raises(NonFinitePenaltyError, match=r"layer 0, position \d+ of sequence \d+"):
        train(options)
    assert last_whole_checkpoint(tmp_path) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 9, "accumulate": 2}, "a multiple of 2"),
        ({"dim": 15}, "does not divide"),
        ({"kind": "log"}, "'logdet', 'one_sided'"),
        ({"positions": 0.0}, "above 0 and at most 1"),
        ({"placement": "heads"}, "'residual', 'embeddings'"),
        ({"barrier_layers": 0.0}, "above 0 and at most 1"),
        ({"probes": 1}, "non-linear function of an unbiased estimate is biased"),
        ({"placement": "embeddings", "barrier_layers": 0.5}, "belong to placement residual"),
        ({"weight": -1.0}, "weight is -1.0; it must be at least 0"),
        ({"steps": 0}, "steps is 0"),
        ({"precision": "fp16"}, "needs a CUDA device"),
        ({"steps": 1.5}, "steps is 1.5; it must be an integer"),
        ({"steps": None}, "steps is None; it must be an integer"),
        ({"batch": torch.ones(2)}, r"batch is tensor\(\[1., 1.\]\); it must be an integer"),
        ({"learning_rate": [0.1]}, r"learning_rate is \[0.1\]; it must be a number"),
        ({"resume": 1}, "resume is 1; it must be True or False"),
        ({"out": None}, "out is None; it must be a path"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be above 0"),
    ],
)
def test_options_that_cannot_be_used(change, message):
    if change == {"precision": "fp16"} and torch.cuda.is_available():
        pytest.skip("fp16 can be used here")
    with pytest.raises(InputError, match=message):
        replace(OPTIONS, **change)


def test_what_cannot_be_trained_on(text, tmp_path, whole):
    options = replace(OPTIONS, corpus=text, out=tmp_path / "run")
    with pytest.raises(InputError, match="do not fill one --batch"):
        train(replace(options, batch=4096))
    with pytest.raises(InputError, match="no such folder"):
        train(replace(options, model=tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json"):
        train(replace(options, model=tmp_path / "empty"))
    with pytest.raises(InputError, match="24 positions"):
        train(replace(options, model=whole[0] / "model", context=25))
    with pytest.raises(InputError, match="add --resume"):
        train(replace(options, out=whole[0]))
    with pytest.raises(InputError, match=r"has weight 0\.5, this one 0\.1"):
        train(replace(options, out=whole[0], weight=0.1, resume=True))


def test_a_loss_made_outside_the_model_is_coupled_too(tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(0, 7, (8, 6))
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def gradients(folder, **options):
        torch.manual_seed(1)
        model = build_causal_lm("gpt2", 7, layers=1, dim=8, heads=2, context=6).double()
        arguments = transformers.TrainingArguments(
            str(folder),
            per_device_train_batch_size=8,
            max_steps=1,
            learning_rate=1.0,
            optim="sgd",
            max_grad_norm=0.0,
            lr_scheduler_type="constant",
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **options.pop("arguments", {}),
        )
        barrier = attach_barrier(model, options.pop("weight"), "smooth", 1.0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        LogBarrierTrainer(model, arguments, train_dataset=data, barrier=barrier, **options).train()
        return {name: before[name] - value for name, value in model.state_dict().items()}

    def own(outputs, labels, num_items_in_batch=None):
        flat = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(*flat, reduction="sum") / num_items_in_batch

    inside = gradients(tmp_path / "inside", weight=5.0)
    outside = gradients(tmp_path / "outside", weight=5.0, compute_loss_func=own)
    plain = gradients(tmp_path / "plain", weight=0.0, compute_loss_func=own)
    # Single precision: the library computes its own loss in it.
    torch.testing.assert_close(outside, inside, rtol=1e-5, atol=1e-7)
    assert any((outside[name] - plain[name]).abs().max() > 1e-4 for name in plain)
    smoothed = gradients(tmp_path / "smooth", weight=5.0, arguments={"label_smoothing_factor": 0.1})
    unweighted = gradients(tmp_path / "smooth0", weight=0.0, arguments={"label_smoothing_factor": 0.1})
    for name in plain:  # the penalty adds the same to both losses
        torch.testing.assert_close(smoothed[name] - unweighted[name], outside[name] - plain[name], rtol=1e-4, atol=1e-6)
