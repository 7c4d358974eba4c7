"""The page of support tokens in headless Chromium: narrow and wide, light and dark, keys, choices, every script."""

import json

import pytest
import torch

from probattn.inference.reports.support import read_margins, support_page
from probattn.models.causal_lm import CharacterTokeniser, build_causal_lm
from probattn.models.checkpoint import Checkpoint

pytest.importorskip("transformers")

TEXT = "the cat 猫🙂 مرحبا <b>\u202e\n" + "x" * 60
CHARACTERS = (*sorted(set(TEXT)), "\ufffd")
KINDS = ("sigma_min", "logabsdet", "spectral", "complex")


class Halves(CharacterTokeniser):
    """Two tokens for each Chinese character and each emoji."""

    def split(self, text):
        split = super().split(text)
        times = torch.tensor([2 if ord(character) > 0x3000 else 1 for character in text])
        spans = [span for span, count in zip(split.spans, times.tolist(), strict=True) for _ in range(count)]
        return split._replace(tokens=split.tokens.repeat_interleave(times), spans=spans)


@pytest.fixture(scope="module")
def record_and_path(tmp_path_factory):
    torch.manual_seed(1)
    model = build_causal_lm("llama", len(CHARACTERS), layers=7, dim=12, heads=3, context=256).eval()
    with torch.no_grad():  # a layer that folds, so that something lies beyond the boundary
        model.model.layers[2].self_attn.o_proj.weight.mul_(200)
        model.model.layers[2].self_attn.v_proj.weight.mul_(20)
    checkpoint = Checkpoint(model, Halves(CHARACTERS), "tiny", torch.float32)
    page = support_page(read_margins(TEXT, checkpoint, KINDS), checkpoint, count=5)
    path = tmp_path_factory.mktemp("support") / "support.html"
    path.write_text(page.html, encoding="utf-8")
    return page.record, path


@pytest.fixture
def opened(chromium, record_and_path):
    """Opens the page; at the end nothing may have been fetched and no error printed."""
    contexts, requests, errors = [], [], []

    def run(width=1280, height=800, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(record_and_path[1].as_uri())
        return page

    yield run
    for context in contexts:
        context.close()
    assert set(requests) <= {record_and_path[1].as_uri()}
    assert errors == []


def status(page):
    return page.locator("#status").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1024, 1920])
def test_nothing_is_cut_off(opened, width, scheme):
    page = opened(width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    page.select_option("#kind", "logabsdet")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") == 0


def test_the_whole_text_is_there(opened):
    shown = opened().locator(".text").evaluate("node => node.textContent")
    assert shown == TEXT.replace("\n", "↵\n").replace("\u202e", "[U+202E]")


def test_a_character_of_two_tokens_is_striped(opened):
    page = opened()
    backgrounds = {
        span.inner_text(): span.evaluate("node => node.style.background") for span in page.locator(".text span").all()
    }
    assert backgrounds["猫"].count("%") >= 4
    assert "gradient" not in backgrounds["t"]


def test_choices_change_lists_colours_and_counts(opened, record_and_path):
    record, page = record_and_path[0], opened()
    for which in ("generator", "update"):
        for kind in record["kinds"]:
            page.select_option("#map", which)
            page.select_option("#kind", kind)
            visible = page.locator(".nearest:visible")
            assert visible.count() == 1
            assert visible.get_attribute("data-list") == f"{which}-{kind}"
            assert page.locator(".map tr.support").count() == 5
            layers = record["smallest"][which][kind]["layer"]
            assert f"layer {layers[0]}" in page.locator(".map .least").first.text_content()
            said = page.locator("#count").inner_text()
            assert said.startswith(f"{record['beyond'][which][kind]} of ") or kind == "sigma_min"
    assert max(record["beyond"]["update"].values()) + max(record["beyond"]["generator"].values()) > 0


def test_keys_move_through_text_and_map(opened):
    page = opened()
    page.locator(".text span").first.focus()
    page.keyboard.press("ArrowRight")
    assert status(page).startswith("h · token 1 ·")
    page.keyboard.press("End")
    assert "token 0" not in status(page)
    page.locator(".map .strip").first.focus()
    page.keyboard.press("Home")
    assert "layer 0" in status(page)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert "token 1 · layer 1" in status(page)
    page.keyboard.press("End")
    assert "token 1 · layer 6" in status(page)


def test_an_entry_leads_to_its_place_in_the_map(opened, record_and_path):
    page = opened()
    entry = record_and_path[0]["nearest"]["generator"]["sigma_min"][2]
    page.locator(".nearest:visible button").nth(2).click()
    assert f"token {entry['token']} · layer {entry['layer']}" in status(page)
    assert "support token 3" in status(page)


def test_the_pointer_tells_the_layer_below_it(opened, record_and_path):
    page = opened()
    box = page.locator(".map .strip").nth(3).bounding_box()
    page.locator(".map .strip").nth(3).scroll_into_view_if_needed()
    box = page.locator(".map .strip").nth(3).bounding_box()
    page.mouse.move(box["x"] + box["width"] * 5.5 / 7, box["y"] + box["height"] / 2)
    assert "token 3 · layer 5" in status(page)


def test_colours_do_not_depend_on_the_text(opened):
    """The same number has the same colour, whatever the others are; a relative scale would fail here."""
    page = opened()
    assert page.evaluate("colour(1, 'sigma_min', false).join()") == "242,242,239"
    assert page.evaluate("colour(0, 'sigma_min', false).join()") == "150,50,0"
    assert page.evaluate("colour(-60, 'logabsdet', false).join()") == "150,50,0"
    assert page.evaluate("colour(0.5, 'spectral', true).join()") == "0,0,0"


def test_dark_and_light_differ_and_print_is_light(opened):
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    strip = ".map .strip div"
    colours = [page.locator(strip).first.evaluate("node => node.style.background") for page in (light, dark)]
    assert colours[0] != colours[1]
    dark.emulate_media(media="print")
    assert dark.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not dark.locator(".screen").first.is_visible()
    dark.emulate_media(media="screen")
    dark.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert dark.locator(strip).first.evaluate("node => node.style.background") == colours[0]
    dark.evaluate("dispatchEvent(new Event('afterprint'))")
    assert dark.locator(strip).first.evaluate("node => node.style.background") == colours[1]


def test_a_screen_reader_is_told(opened):
    page = opened()
    assert page.locator("#status").get_attribute("aria-live") == "polite"
    assert "nearest" in page.locator(".map .strip").first.get_attribute("aria-label")
    assert page.locator("table.map th[scope=row]").count() == len(
        json.loads(page.locator("#data").text_content())["labels"]
    )
    assert page.locator("select").count() == page.locator("label select").count() == 3
