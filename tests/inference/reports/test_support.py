"""The page of support tokens: numbers that are the library's, text that stays text, nothing fetched."""

import base64
import json
import re
from html.parser import HTMLParser

import pytest
import torch
from cyclopts import CycloptsError

from probattn.cli.progress import shown_progress
from probattn.cli.support import app
from probattn.errors import InputError
from probattn.hf.decoding import MarginMonitor, head_margins
from probattn.hf.hooks import observe
from probattn.inference.reports.support import support_page, text_margins
from probattn.inference.support import read_source
from probattn.models.causal_lm import CharacterTokeniser

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

KINDS = ("determinant", "spectral", "singular_value")
CONTEXT = 16
HOSTILE = "a</script><script>alert('x')</script><!-- &amp; \u202e\u2028\x07\t\n\n  <b>é"
CHARACTERS = (*sorted(set(HOSTILE) | set("the cat sat on")), "\ufffd")


def gpt2(vocabulary, context=CONTEXT):
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=12, n_layer=2, n_head=3, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def model():
    return gpt2(len(CHARACTERS)).to(torch.float64)


@pytest.fixture(scope="module")
def tokeniser():
    return CharacterTokeniser(CHARACTERS)


@pytest.fixture(scope="module")
def page(model, tokeniser):
    return support_page(HOSTILE, model, tokeniser, threshold=0.9, support=4, name="<i>mine</i>")


class Page(HTMLParser):
    """Collects what would be fetched, the tokens, the selectors and the scripts; raises where tags do not close."""

    void = ("meta", "input")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.sources, self.tokens, self.scripts, self.options, self.ids = [], [], [], [], {}, []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.sources += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "action")]
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "select":
            self.select = attributes["id"]
        if tag == "option":
            self.options.setdefault(self.select, []).append(attributes["value"])
        if tag == "script":
            self.scripts.append("")
        if tag not in self.void:
            self.open.append((tag, attributes.get("class")))
        if tag == "span" and ("div", "text") in self.open:
            self.tokens.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[-1] += data
        if ("div", "text") in self.open and self.open[-1][0] == "span":
            self.tokens[-1] += data


class TestPage:
    def test_text_stays_text(self, page):
        found = Page(page.html)
        assert len(found.scripts) == 2
        assert "".join(found.tokens) == HOSTILE.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(
            "\x07", "\u2407"
        )
        assert "<i>mine" not in page.html
        assert "alert(" not in found.scripts[1]
        assert json.loads(found.scripts[0])["tokens"] == found.tokens

    def test_nothing_is_fetched(self, page):
        assert Page(page.html).sources == []
        shell = page.html.replace(Page(page.html).scripts[0], "")
        assert len(shell) > 5000
        assert not re.search(r"https?:|//[a-z]|url\(|@import|\bimport\b|fetch\(|XMLHttp", shell)

    def test_selectors(self, page):
        found = Page(page.html)
        assert found.options["kind"] == list(KINDS)
        assert found.options["layer"] == ["all", "0", "1"]
        assert found.options["head"] == ["all", "0", "1", "2"]
        assert {"count", "threshold", "status", "low", "high", "bar", "list"} <= set(found.ids)
        assert len(found.ids) == len(set(found.ids))

    def test_the_page_holds_the_numbers_of_the_record(self, page):
        data = json.loads(Page(page.html).scripts[0])
        for kind in KINDS:
            packed = torch.frombuffer(bytearray(base64.b64decode(data["margins"][kind])), dtype=torch.float32)
            record = [
                [[float("inf") if x is None else x for x in row] for row in rows]
                for rows in page.record["margins"][kind]
            ]
            assert packed.view(2, 3, -1).equal(torch.tensor(record, dtype=torch.float64).float())

    def test_windows_are_told(self, page, model, tokeniser):
        assert f"longer than the {CONTEXT} tokens" in page.html
        assert page.record["windows"] == [[0, 16], [16, 32], [32, 48], [48, len(HOSTILE)]]
        short = support_page("the cat", model, tokeniser)
        assert "longer than" not in short.html
        assert short.record["windows"] == [[0, 7]]
        assert short.record["below"] == []


class TestRecord:
    def test_margins_are_those_of_the_library(self, page, model, tokeniser):
        assert page.record["schema"] == 1
        assert page.record["tokens"] == list(HOSTILE)
        ids = tokeniser.encode(HOSTILE)
        assert page.record["ids"] == ids.tolist()
        for kind in KINDS:
            expected = []
            for part in ids.split(CONTEXT):
                layers = []
                stop = observe(
                    model,
                    lambda call, output, kind=kind, layers=layers: layers.append(head_margins(call, kind)[0]) or output,
                )
                with torch.no_grad():
                    model(part[None])
                stop()
                expected.append(torch.stack(layers))
            expected = torch.cat(expected, -1).tolist()
            assert page.record["margins"][kind] == [
                [[None if x == float("inf") else x for x in row] for row in rows] for rows in expected
            ]
        json.dumps(page.record, allow_nan=False)

    def test_margins_are_those_of_decoding(self, page, model, tokeniser):
        ids = tokeniser.encode(HOSTILE)[None, :CONTEXT]
        forced = iter(ids[0, 4:].tolist())

        def force(seen, scores):
            return torch.full_like(scores, -torch.inf).index_fill(1, torch.tensor([next(forced)]), 0.0)

        with MarginMonitor(model) as monitor:
            output = model.generate(
                ids[:, :4], attention_mask=torch.ones(1, 4, dtype=torch.long), max_new_tokens=CONTEXT - 4,
                do_sample=False, pad_token_id=0, logits_processor=[monitor.processor(), force],
            )  # fmt: skip
        assert output.equal(ids)
        record = monitor.record(output)
        found = torch.cat([record.prompt, record.steps], -1)[:, 0]
        margins = torch.tensor(page.record["margins"]["singular_value"], dtype=torch.float64)
        torch.testing.assert_close(found, margins[..., : CONTEXT - 1], rtol=1e-8, atol=1e-8)

    def test_support_tokens_are_the_smallest(self, page):
        margins = torch.tensor(page.record["margins"]["singular_value"], dtype=torch.float64)
        least = margins.amin((0, 1))
        support = page.record["support"]
        assert [token["position"] for token in support] == least.sort(stable=True).indices[:4].tolist()
        for token in support:
            assert token["text"] == HOSTILE[token["position"]]
            assert token["margin"] == margins[token["layer"], token["head"], token["position"]]
        assert page.record["below"] == (least < 0.9).nonzero().flatten().tolist()
        assert 0 < len(page.record["below"]) < len(HOSTILE)

    def test_infinity_is_null(self, model, tokeniser, monkeypatch):
        seen = text_margins("the cat", model, tokeniser)
        seen.margins["spectral"][0, 0, 3] = torch.inf
        monkeypatch.setattr("probattn.inference.reports.support.text_margins", lambda *_: seen)
        page = support_page("the cat", model, tokeniser, kind="spectral")
        assert page.record["margins"]["spectral"][0][0][3] is None
        json.dumps(page.record, allow_nan=False)


class TestRefusals:
    def test_arguments(self, model, tokeniser):
        for options, words in (
            ({"kind": "logdet"}, "kind is 'logdet'"),
            ({"threshold": float("nan")}, "threshold is nan"),
            ({"support": 0}, "support is 0"),
        ):
            with pytest.raises(InputError, match=words):
                support_page("the cat", model, tokeniser, **options)
        with pytest.raises(InputError, match="is one token"):
            support_page("a", model, tokeniser)

    def test_a_tokeniser_of_another_model(self, tokeniser):
        with pytest.raises(InputError, match="do not belong together"):
            support_page("the cat", gpt2(3), tokeniser)

    def test_a_model_that_cannot_be_observed(self, tokeniser):
        config = transformers.OpenAIGPTConfig(vocab_size=40, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        with pytest.raises(InputError, match="does not use the attention interface"):
            support_page("the cat", transformers.OpenAIGPTLMHeadModel(config).eval(), tokeniser)

    def test_nan_is_no_margin(self, tokeniser):
        broken = gpt2(len(CHARACTERS))
        broken.transformer.h[1].attn.c_attn.weight.data[0, 0] = float("nan")
        with pytest.raises(InputError, match="nan at layer 1, head 0"):
            support_page("the cat", broken, tokeniser)
        assert broken.config._attn_implementation == "sdpa"

    def test_too_much_for_a_page(self, model, tokeniser, monkeypatch):
        monkeypatch.setattr("probattn.inference.reports.support._NUMBERS", 18 * 20)
        with pytest.raises(InputError, match="at most 20 tokens"):
            support_page("the cat sat on the cat", model, tokeniser)


@pytest.fixture(scope="module")
def command():
    def run(*arguments):
        with shown_progress():
            app(list(map(str, arguments)), exit_on_error=False, print_error=False, result_action="return_value")

    return run


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """A checkpoint of characters."""
    folder = tmp_path_factory.mktemp("characters")
    gpt2(len(CHARACTERS)).save_pretrained(folder)
    (folder / "vocabulary.json").write_text(json.dumps({"schema": 1, "characters": CHARACTERS}))
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
    gpt2(len(tokenizer), 64).save_pretrained(folder)
    return folder


class TestCommand:
    def test_a_file(self, command, characters, tmp_path, capsys):
        (tmp_path / "story.txt").write_text("the cat sat on\nthe cat\n")
        command(
            tmp_path / "story.txt",
            "--model",
            characters,
            "--out",
            tmp_path / "out",
            "--threshold",
            "0.9",
            "--tokens",
            3,
        )
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["support.html", "support.json"]
        record = json.loads((tmp_path / "out" / "support.json").read_text())
        assert "".join(record["tokens"]) == "the cat sat on\nthe cat\n"
        assert record["environment"]["versions"]["transformers"] == transformers.__version__
        assert record["environment"]["dtype"] == "float32"
        assert record["model"]["name"] == characters.name
        printed = capsys.readouterr().out.splitlines()
        assert printed[0] == "story.txt: 23 tokens in 2 windows of the model's context"
        assert printed[1].startswith(f"margin {record['support'][0]['margin']:.4f} at position")
        assert printed[4] == f"{len(record['below'])} of 23 tokens have a singular_value margin below 0.9"
        Page((tmp_path / "out" / "support.html").read_text())

    def test_a_text_and_a_tokeniser(self, command, pieces, tmp_path):
        command(
            "the cat </script>", "--model", pieces, "--out", tmp_path, "--kind", "determinant", "--dtype", "float64"
        )
        record = json.loads((tmp_path / "support.json").read_text())
        assert "".join(record["tokens"]) == "the cat </script>"
        assert len(record["tokens"]) < len("the cat </script>")
        assert record["kind"] == "determinant"

    def test_bad_input_is_one_line(self, command, characters, pieces, tmp_path):
        (tmp_path / "empty.txt").write_text(" \n")
        (tmp_path / "binary").write_bytes(b"a\0b")
        (tmp_path / "latin").write_bytes(b"the c\xe4t")
        bare, silent = tmp_path / "bare", tmp_path / "silent"
        bare.mkdir()
        gpt2(5).save_pretrained(silent)
        for source, model, options, words in (
            ("the cat", tmp_path / "none", (), "no such folder"),
            ("the cat", bare, (), "config.json"),
            ("the cat", silent, (), "tokeniser"),
            ("a", characters, (), "give a longer text"),
            (" ", characters, (), "the text is empty"),
            ("a\0b", characters, (), "binary text"),
            ("a\udc80b", characters, (), "not UTF-8"),
            (tmp_path, characters, (), "a folder"),
            (tmp_path / "empty.txt", characters, (), "the file is empty"),
            (tmp_path / "binary", characters, (), "a binary file"),
            (tmp_path / "latin", characters, (), "not UTF-8"),
            ("the cat", characters, ("--kind", "logdet"), 'Invalid value "logdet" for --kind'),
            ("the cat", characters, ("--dtype", "bf16"), 'Invalid value "bf16" for --dtype'),
            ("the cat", characters, ("--device", "tpu"), 'Invalid value "tpu" for --device'),
        ):
            with pytest.raises((InputError, CycloptsError), match=words) as caught:
                command(source, "--model", model, "--out", tmp_path / "out", *options)
            assert "\n" not in str(caught.value)
        assert list(tmp_path.glob("out/support*")) == []

    def test_weights_that_are_pickled_are_not_read(self, command, characters, tmp_path):
        (tmp_path / "config.json").write_bytes((characters / "config.json").read_bytes())
        (tmp_path / "vocabulary.json").write_bytes((characters / "vocabulary.json").read_bytes())
        torch.save(gpt2(len(CHARACTERS)).state_dict(), tmp_path / "pytorch_model.bin")
        with pytest.raises(InputError, match="cannot be loaded"):
            command("the cat", "--model", tmp_path, "--out", tmp_path / "out")

    def test_a_long_text_is_no_path(self):
        assert read_source("x" * 5000) == ("text", "x" * 5000)
