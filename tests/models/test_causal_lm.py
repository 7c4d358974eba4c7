"""Causal language models from scratch and from folders, whole and damaged."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from probattn.errors import InputError
from probattn.models.causal_lm import CharacterTokeniser, build_causal_lm, load_causal_lm
from probattn.models.corpus import UNKNOWN

transformers = pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = build_causal_lm("gpt2", 4, layers=1, dim=8, heads=2, context=8)
    model.save_pretrained(tmp_path)
    CharacterTokeniser(("a", "b", "c", UNKNOWN)).save(tmp_path)
    return tmp_path


def test_what_was_saved_is_what_is_loaded(folder):
    torch.manual_seed(0)
    saved = build_causal_lm("gpt2", 4, layers=1, dim=8, heads=2, context=8)
    model, tokeniser = load_causal_lm(folder)
    tokens = tokeniser.encode("abz")
    assert tokens.tolist() == [0, 1, 3]
    assert tokeniser.pieces(tokens) == ["a", "b", UNKNOWN]
    torch.testing.assert_close(model(tokens[None]).logits, saved.eval()(tokens[None]).logits)


def test_a_weight_that_is_missing_is_not_made_up(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.0.attn.c_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 weights of its architecture, such as .*c_proj\.weight"):
        load_causal_lm(folder)


def test_weights_cut_short_are_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_causal_lm(folder)


def test_a_folder_without_a_tokeniser_is_refused(folder):
    (folder / "vocabulary.json").unlink()
    with pytest.raises(InputError, match="tokeniser"):
        load_causal_lm(folder)


@pytest.mark.parametrize(
    "content", ["[1", '{"schema": 1}', '{"characters": ["ab", "\ufffd"]}', '{"characters": ["a"]}']
)
def test_a_vocabulary_that_is_none_is_refused(folder, content):
    (folder / "vocabulary.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match="tokeniser that can be read"):
        load_causal_lm(folder)


def test_pieces_of_a_tokeniser_join_to_the_text(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = {"▁the": 0, "▁fox": 1, "es": 2, "▁": 3}
    inner = Tokenizer(models.BPE(words, [], unk_token="▁"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(folder)
    (folder / "vocabulary.json").unlink()
    _, tokeniser = load_causal_lm(folder)
    assert tokeniser.pieces(torch.tensor([0, 1, 2, 1])) == ["the", " fox", "es", " fox"]
    many = torch.tensor([0, 1, 2] * 20)
    assert "".join(tokeniser.pieces(many)) == "the foxes" + " the foxes" * 19


def test_an_architecture_that_does_not_exist():
    with pytest.raises(InputError, match="'gpt2', 'llama'"):
        build_causal_lm("gpt5", 4)
