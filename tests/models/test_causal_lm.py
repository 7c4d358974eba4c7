"""Causal language models from scratch and from folders, whole and damaged."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from probattn.errors import InputError
from probattn.models.causal_lm import CharacterTokeniser, PieceTokeniser, build_causal_lm, load_causal_lm
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
    assert [tokeniser.name(token) for token in tokens.tolist()] == ["a", "b", UNKNOWN]
    assert tokeniser.split("abz").spans == [(0, 1), (1, 2), (2, 3)]  # what is not known keeps its place
    assert tokeniser.size == 4
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


TEXT = "the foxes 猫🙂 e\u0301 مر the"


def of_bytes():
    """The library's tokeniser of bytes, with a few words."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["the fox the foxes"] * 9, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner)


class Slow:
    """The same without places, as tokenisers without the compiled library."""

    def __init__(self, tokenizer, text=str):
        self.tokenizer, self.text = tokenizer, text

    def encode(self, text, verbose=True):
        return self.tokenizer.encode(self.text(text))

    def decode(self, tokens):
        return self.tokenizer.decode(tokens)


def test_spans_are_places_in_the_text(folder):
    of_bytes().save_pretrained(folder)
    (folder / "vocabulary.json").unlink()
    _, tokeniser = load_causal_lm(folder)
    split = tokeniser.split(TEXT)
    assert split.tokens.equal(tokeniser.encode(TEXT))
    assert tokeniser.size == len(of_bytes())
    assert tokeniser.name(int(split.tokens[0])) == "the"
    covered = dict.fromkeys(split.spans)  # bytes of a character have the same span
    assert "".join(TEXT[first:last] for first, last in covered) == TEXT
    assert split.spans.count((10, 11)) == 3  # 猫


def test_spans_are_found_by_decoding_where_the_library_has_none():
    tokenizer = of_bytes()
    slow, fast = PieceTokeniser(Slow(tokenizer)), PieceTokeniser(tokenizer)
    assert slow.split(TEXT).spans == fast.split(TEXT).spans
    long = TEXT * 9
    assert slow.split(long).spans == fast.split(long).spans


def test_what_decoding_does_not_find_in_the_text_has_no_span():
    split = PieceTokeniser(Slow(of_bytes(), str.lower)).split("The fox")
    assert split.spans[0] == (1, 1) or split.spans[0][0] == split.spans[0][1]
    assert split.spans[-1] == (3, 7)


def test_an_architecture_that_does_not_exist():
    with pytest.raises(InputError, match="'gpt2', 'llama'"):
        build_causal_lm("gpt5", 4)
