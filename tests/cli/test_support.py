"""``probattn support``: files, texts and models in, a page and its numbers out; refusals in one line with status 2."""

import json

import numpy as np
import pytest
import torch
import xarray

from probattn.cli.app import main
from probattn.inference.support import SupportOptions, read_source, support
from probattn.models.causal_lm import CharacterTokeniser, build_causal_lm

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

CHARACTERS = (*sorted(set("the cat sat on\n")), "\ufffd")


def small(vocabulary, context=16):
    torch.manual_seed(3)
    return build_causal_lm("llama", vocabulary, layers=2, dim=8, heads=2, context=context)


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """A checkpoint of characters, stored in half precision."""
    folder = tmp_path_factory.mktemp("characters")
    small(len(CHARACTERS)).to(torch.bfloat16).save_pretrained(folder)
    CharacterTokeniser(CHARACTERS).save(folder)
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A checkpoint with a byte-level tokeniser."""
    folder = tmp_path_factory.mktemp("pieces")
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    words.train_from_iterator(["the cat sat on the cat"] * 9, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.save_pretrained(folder)
    small(len(tokenizer), 64).save_pretrained(folder)
    return folder


def test_a_file(here, characters, tmp_path):
    (tmp_path / "story.txt").write_text("the cat sat on\nthe cat\n")
    done = here("support", "story.txt", "--model", characters, "--tokens", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "runs" / "support"
    assert sorted(path.name for path in out.iterdir()) == ["margins.nc", "support.html", "support.json"]
    record = json.loads((out / "support.json").read_text())
    assert "".join(record["tokens"]) == "the cat sat on\nthe cat\n"
    assert record["environment"]["dtype"] == record["model"]["computed"] == "float32"
    assert record["model"]["stored"] == "bfloat16"
    with xarray.open_dataset(out / "margins.nc", engine="h5netcdf") as kept:
        assert dict(kept.sizes) == {"layer": 2, "token": 23}
        assert "".join(kept.text.values) == "the cat sat on\nthe cat\n"
        assert kept.window.values.tolist() == [0] * 16 + [1] * 7
        least = np.abs(kept.sigma_min.values).min(0)
        np.testing.assert_allclose(record["smallest"]["generator"]["sigma_min"]["margin"], least, rtol=1e-6)
        assert json.loads(kept.attrs["environment"])["seed"] == 0
    printed = done.stdout.splitlines()
    assert "weights stored in bfloat16, computed in float32" in printed
    assert "story.txt: 23 tokens in 2 windows" in printed
    nearest = record["nearest"]["generator"]["sigma_min"]
    assert len(nearest) == 3
    assert any(
        line.startswith(f"sigma_min {nearest[0]['margin']:.4f} at token {nearest[0]['token']}:") for line in printed
    )
    assert printed[-1].startswith("page: ")


def test_a_text_in_part(here, pieces, tmp_path):
    done = here(
        *("support", "the cat 🙂 </script>", "--model", pieces, "--out", tmp_path, "--kinds", "logabsdet,sigma_min"),
        *("--layers", "1", "--limit", "4", "--dtype", "float64"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "support.json").read_text())
    assert record["kinds"] == ["logabsdet", "sigma_min"]
    assert record["model"]["layers"] == [1]
    assert len(record["ids"]) <= 4 < record["total"]


def test_the_same_call_gives_the_same_numbers(characters, tmp_path):
    records = []
    for name in ("one", "two"):
        options = SupportOptions("the cat sat", str(characters), kinds=("logabsdet",), out=tmp_path / name)
        records.append(support(options))
        records[-1].pop("environment")
    assert records[0] == records[1]


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """A checkpoint without a tokeniser."""
    folder = tmp_path_factory.mktemp("silent")
    small(5).save_pretrained(folder)
    return folder


def test_bad_input_is_one_line(here, characters, silent, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"a\0b")
    (tmp_path / "latin").write_bytes(b"the c\xe4t")
    (tmp_path / "file.gguf").write_bytes(b"GGML")
    (tmp_path / "bare").mkdir()
    for source, model, options, words in (
        ("the cat", tmp_path / "none", (), "no such folder"),
        ("the cat", tmp_path / "bare", (), "config.json"),
        ("the cat", silent, (), "tokeniser"),
        ("the cat", tmp_path / "file.gguf", (), "no GGUF file"),
        ("the cat", tmp_path / "latin", (), "not a GGUF file"),
        ("a", characters, (), "give a longer text"),
        (" ", characters, (), "the text is empty"),
        ("a\0b", characters, (), "NUL"),
        ("a\udc80b", characters, (), "not UTF-8"),
        (tmp_path, characters, (), "a folder"),
        (tmp_path / "empty.txt", characters, (), "the file is empty"),
        (tmp_path / "binary", characters, (), "a binary file"),
        (tmp_path / "latin", characters, (), "not UTF-8"),
        ("the cat", characters, ("--kinds", "logdet"), "logdet"),
        ("the cat", characters, ("--kinds", ","), "kinds is empty"),
        ("the cat", characters, ("--layers", "2"), "layers is"),
        ("the cat", characters, ("--limit", "1"), "limit"),
        ("the cat", characters, ("--dtype", "bf16"), "bf16"),
        ("the cat", characters, ("--device", "tpu"), "tpu"),
    ):
        done = here("support", source, "--model", model, "--out", tmp_path / "out", *options, cwd=tmp_path)
        assert done.returncode == 2, (source, options, done.stderr)
        assert len(done.stderr.splitlines()) == 1
        assert words in done.stderr
    assert list(tmp_path.glob("out/*")) == []


def test_weights_that_are_pickled_are_not_read(here, characters, tmp_path):
    for name in ("config.json", "vocabulary.json"):
        (tmp_path / name).write_bytes((characters / name).read_bytes())
    torch.save(small(len(CHARACTERS)).state_dict(), tmp_path / "pytorch_model.bin")
    done = here("support", "the cat", "--model", tmp_path, "--out", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be loaded" in done.stderr


def test_a_long_text_is_no_path():
    assert read_source("x" * 5000) == ("text", "x" * 5000)


def test_an_interrupted_command_that_cannot_resume_does_not_name_the_option(monkeypatch, capsys):
    class Interrupted(dict):
        def __call__(self, *_, **__):
            raise KeyboardInterrupt

    monkeypatch.setattr("probattn.cli.app.app", Interrupted())
    for words, remedy in (
        (["support", "a text"], "run it again."),
        (["fit", "--data", "u.npz"], "with --resume to go"),
    ):
        with pytest.raises(SystemExit, match="130"):
            main(words)
        assert remedy in capsys.readouterr().err
