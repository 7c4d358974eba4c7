"""The page of support tokens: margins that are the library's, text that stays text, nothing fetched."""

import base64
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import xarray

from probattn.errors import InputError
from probattn.hf import attention_layer
from probattn.hf.margins import margins, residual_streams
from probattn.inference.reports.support import nearest_tokens, read_margins, support_page
from probattn.inference.reports.support.measure import MAPS, variable
from probattn.inference.reports.support.words import sensitivity_words
from probattn.inference.studies.language.prediction import DECISIVE
from probattn.models.causal_lm import CharacterTokeniser
from probattn.models.checkpoint import Checkpoint

transformers = pytest.importorskip("transformers")

KINDS = ("sigma_min", "logabsdet", "spectral", "complex")
CONTEXT = 16
HOSTILE = "a</script><script>alert('x')</script><!-- &amp; \u202e\u2028\x07\t\n\n  <b>é"
CHARACTERS = (*sorted(set(HOSTILE) | set("the cat sat on")), "\ufffd")


def gpt2(vocabulary, context=CONTEXT, dtype=torch.float64):
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=context, n_embd=12, n_layer=2, n_head=3, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval().to(dtype)


@pytest.fixture(scope="module")
def checkpoint():
    model = gpt2(len(CHARACTERS))
    return Checkpoint(model, CharacterTokeniser(CHARACTERS), "<i>mine</i>", torch.bfloat16)


@pytest.fixture(scope="module")
def reading(checkpoint):
    return read_margins(HOSTILE, checkpoint, KINDS)


@pytest.fixture(scope="module")
def page(reading, checkpoint):
    return support_page(reading, checkpoint, count=4)


class Page(HTMLParser):
    """Collects what would be fetched, units, rows, lists and scripts; fails where tags do not close."""

    void = ("meta", "input")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.sources, self.units, self.scripts, self.options, self.ids = [], [], [], [], {}, []
        self.lists, self.shown, self.words = {}, [], ""
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
        if "data-list" in attributes:
            self.list = attributes["data-list"]
            self.lists[self.list] = []
            if "hidden" not in attributes:
                self.shown.append(self.list)
        if "data-token" in attributes:
            self.lists[self.list].append((int(attributes["data-token"]), int(attributes["data-layer"])))
        if "data-unit" in attributes:
            self.units.append("")
        if tag not in self.void:
            self.open.append((tag, "data-unit" in attributes))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1][1]:
            self.units[-1] += data
        else:
            self.words += data


class TestReading:
    def test_margins_are_those_of_the_library_in_each_window(self, reading, checkpoint):
        ids = checkpoint.tokeniser.encode(HOSTILE)
        assert reading.tokens.equal(ids)
        assert list(reading.windows) == [(0, 16), (16, 32), (32, 48), (48, len(HOSTILE))]
        for number, (first, last) in enumerate(reading.windows):
            expected = margins(checkpoint.model, ids[first:last], KINDS)
            found = reading.margins.sel(token=slice(first, last - 1))
            assert (found.window == number).all()
            assert found.position.values.tolist() == list(range(last - first))
            for which in MAPS:
                for kind in KINDS:
                    name = variable(kind, which)
                    np.testing.assert_array_equal(found[name], expected[name][0])
        assert "".join(reading.margins.text.values) == HOSTILE

    def test_a_limit_ends_at_a_whole_character(self, checkpoint):
        short = read_margins(HOSTILE, checkpoint, ("logabsdet",), limit=5, layers=[1])
        assert short.text == HOSTILE[:5]
        assert (short.total, len(short.tokens)) == (len(HOSTILE), 5)
        assert short.margins.layer.values.tolist() == [1]
        page = support_page(short, checkpoint)
        assert f"The text has {len(HOSTILE)} tokens; the first 5 were read." in page.html
        assert len(page.record["nearest"]["generator"]["logabsdet"]) == 5

    def test_a_limit_inside_a_character_drops_it(self, checkpoint):
        class Bytes(CharacterTokeniser):
            def split(self, text):
                split = super().split(text)
                return split._replace(
                    tokens=split.tokens.repeat_interleave(2), spans=[s for s in split.spans for _ in "ab"]
                )

        twice = checkpoint._replace(tokeniser=Bytes(CHARACTERS))
        assert read_margins("cat", twice, ("logabsdet",), limit=5).text == "ca"
        assert read_margins("cat", twice, ("logabsdet",), limit=6).text == "cat"

    def test_groups_of_layers_change_nothing_and_are_told(self, reading, checkpoint, monkeypatch, caplog):
        monkeypatch.setattr("probattn.inference.reports.support.measure._STEP", 1)
        with caplog.at_level("INFO", "probattn"):
            found = read_margins(HOSTILE, checkpoint, KINDS).margins
        xarray.testing.assert_identical(found, reading.margins)
        steps = [(record.step, record.total) for record in caplog.records if hasattr(record, "total")]
        assert steps == [(k, 8) for k in range(9)]  # two layers in four windows, and the beginning

    def test_bad_arguments(self, checkpoint, monkeypatch):
        for kinds, options, words in (
            (("logdet",), {}, "kinds is 'logdet'"),
            ((), {}, "kinds is empty"),
            (KINDS, {"limit": 1}, "limit is 1"),
            (KINDS, {"layers": [2]}, "layers is"),
        ):
            with pytest.raises(InputError, match=words):
                read_margins("the cat", checkpoint, kinds, **options)
        with pytest.raises(InputError, match="is one token"):
            read_margins("a", checkpoint, KINDS)
        with pytest.raises(InputError, match="another model"):
            read_margins("the cat", checkpoint._replace(model=gpt2(3)), KINDS)
        monkeypatch.setattr("probattn.inference.reports.support.measure._NUMBERS", 2 * 4 * 2 * 20)
        with pytest.raises(InputError, match="--limit 20"):
            read_margins("the cat sat on the cat", checkpoint, KINDS)

    def test_nan_is_no_margin(self, checkpoint):
        broken = gpt2(len(CHARACTERS))
        broken.transformer.h[0].mlp.c_proj.weight.data[0, 0] = 1e308  # finite, and overflows in the stream
        broken.transformer.h[0].mlp.c_fc.bias.data[0] = 1e10
        with pytest.raises(InputError, match="NaN in layer 1"):
            read_margins("the cat", checkpoint._replace(model=broken), KINDS)

    def test_a_model_that_is_not_covered_is_named(self, checkpoint):
        config = transformers.OpenAIGPTConfig(vocab_size=60, n_positions=16, n_embd=8, n_layer=1, n_head=2)
        model = transformers.OpenAIGPTLMHeadModel(config).eval()
        with pytest.raises(InputError, match="openai-gpt"):
            read_margins("the cat", checkpoint._replace(model=model), KINDS)


class TestNearest:
    def test_they_are_nearest_by_size_whatever_the_sign(self, reading, checkpoint):
        found = nearest_tokens(reading, checkpoint.model, 4)
        for which in MAPS:
            for kind in KINDS:
                values = reading.margins[variable(kind, which)].values
                distance = values if kind == "logabsdet" else np.abs(values)
                expected = np.argsort(distance.min(0), kind="stable")[:4]
                assert [one.token for one in found[which][kind]] == expected.tolist()
                for one in found[which][kind]:
                    assert one.layer == distance[:, one.token].argmin()
                    assert one.margin == values[one.layer, one.token]

    def test_control_the_ranking_by_the_signed_determinant_is_another(self, reading, checkpoint):
        """A large negative determinant is far from zero; a list by sign would begin with it."""
        signed = reading.margins.update_sign.values * np.exp(reading.margins.update_logabsdet.values)
        first = int(signed.min(0).argmin())
        assert signed.min() < -1
        assert first not in [one.token for one in nearest_tokens(reading, checkpoint.model, 4)["update"]["logabsdet"]]

    def test_a_head_pulls_by_its_gain(self, reading, checkpoint):
        """Turned up by a little, the named head lowers the margin most, by its part of what all of them do."""
        for one in nearest_tokens(reading, checkpoint.model, 3)["generator"]["sigma_min"]:
            first, last = next(window for window in reading.windows if window[0] <= one.token < window[1])
            streams, _ = residual_streams(checkpoint.model, reading.tokens[None, first:last])
            layer, u = attention_layer(checkpoint.model, one.layer).detach(), streams[one.layer][0]
            row = torch.tensor([one.token - first])
            slopes = []
            for head in range(3):
                output = layer.sublayer.output
                turned = []
                for gain in (1 - 1e-6, 1 + 1e-6):
                    scaled = output.clone()
                    scaled[:, head] *= gain
                    whole = torch.eye(12, dtype=u.dtype) - with_output(layer, scaled).mean_jacobian(u, row)[0]
                    turned.append(float(torch.linalg.svdvals(whole)[-1]))
                slopes.append((turned[1] - turned[0]) / 2e-6)
            pulls = -torch.tensor(slopes)
            assert one.head == int(pulls.argmax())
            assert one.head_share == pytest.approx(float(pulls.max() / pulls.clamp(min=0).sum()), abs=1e-5)
            assert one.own + sum(share for _, share in one.past) <= 1 + 1e-9
            assert all(first <= token <= one.token for token, _ in one.past)

    def test_an_infinite_margin_has_no_reason(self, reading, checkpoint):
        changed = reading.margins.copy(deep=True)
        changed["spectral"][:] = np.inf
        nearest = nearest_tokens(replaced(reading, changed), checkpoint.model, 2)["generator"]["spectral"]
        assert [one.head for one in nearest] == [None, None]


def with_output(layer, output):
    from dataclasses import replace

    own = layer.sublayer
    return replace(layer, read=lambda: own._replace(output=output))


def replaced(reading, changed):
    from dataclasses import replace

    return replace(reading, margins=changed)


class TestPage:
    def test_text_stays_text(self, page):
        found = Page(page.html)
        assert len(found.scripts) == 2
        expected = HOSTILE.replace("\n", "↵").replace("\t", "⇥").replace("\x07", "␇").replace("\u202e", "[U+202E]")
        assert "".join(found.units) == expected
        assert "<i>mine" not in page.html
        assert "alert(" not in found.scripts[1]
        assert len(json.loads(found.scripts[0])["labels"]) == len(HOSTILE)

    def test_nothing_is_fetched(self, page):
        assert Page(page.html).sources == []
        shell = page.html.replace(Page(page.html).scripts[0], "")
        assert len(shell) > 5000
        assert not re.search(r"https?:|//[a-z]|url\(|@import|\bimport\b|fetch\(|XMLHttp", shell)

    def test_selectors_and_lists(self, page):
        found = Page(page.html)
        assert found.options == {"kind": list(KINDS), "map": list(MAPS), "layer": ["nearest", "0", "1"]}
        assert len(found.ids) == len(set(found.ids))
        assert set(found.lists) == {f"{which}-{kind}" for which in MAPS for kind in KINDS}
        assert found.shown == ["generator-sigma_min"]
        for which in MAPS:
            for kind in KINDS:
                nearest = page.record["nearest"][which][kind]
                assert found.lists[f"{which}-{kind}"] == [(one["token"], one["layer"]) for one in nearest]

    def test_the_page_holds_the_numbers(self, page, reading):
        data = json.loads(Page(page.html).scripts[0])
        for which in MAPS:
            for kind in KINDS:
                packed = np.frombuffer(base64.b64decode(data["margins"][which][kind]), "<f4")
                values = reading.margins[variable(kind, which)].values
                np.testing.assert_array_equal(packed, values.astype("<f4").ravel())
                beyond = np.frombuffer(base64.b64decode(data["beyond"][which][kind]), "u1")
                assert beyond.sum() == page.record["beyond"][which][kind]
        signs = reading.margins.update_sign.values
        assert page.record["beyond"]["update"]["logabsdet"] == (signs < 0).sum() > 0

    def test_what_is_said(self, page, checkpoint):
        words = Page(page.html).words
        assert f"longer than the {CONTEXT} tokens" in words
        assert "stored in bfloat16; everything was computed in float64" in words
        assert "A large margin is not good by itself." in words
        assert sensitivity_words() in words
        short = support_page(read_margins("the cat", checkpoint, ("logabsdet",)), checkpoint).html
        assert "longer than" not in short
        assert "were read" not in short

    def test_the_measured_correlation_is_that_of_the_results(self, monkeypatch):
        place = "probattn.inference.studies.language.results.committed_results"
        monkeypatch.setattr(place, lambda: None)
        assert "0.36, 0.17 and −0.13" in sensitivity_words()
        band = {"estimate": [0.5, 0.125], "low": [0.4, -0.25], "high": [0.6, 0.375]}
        prediction = SimpleNamespace(
            predictors=["generator_logabsdet_mean", "generator_sigma_min_mean"],
            bands={DECISIVE: {"alone": band, "given position and entropy": band}},
        )
        results = SimpleNamespace(prediction=prediction, record={"model": {"name": "a model"}})
        monkeypatch.setattr(place, lambda: results)
        assert sensitivity_words().count("0.12 [−0.25, 0.38]") == 2
        assert "Measured on a model" in sensitivity_words()

    def test_the_record_is_strict_json(self, page, reading):
        assert json.loads(json.dumps(page.record, allow_nan=False)) == page.record
        assert page.record["schema"] == 2
        assert page.record["tokens"] == list(HOSTILE)
        assert page.record["surprisal"][0] is None
        values = reading.margins.sigma_min.values
        assert page.record["smallest"]["generator"]["sigma_min"]["margin"] == values.min(0).tolist()
