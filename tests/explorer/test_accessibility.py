"""Report, page of support tokens and explorer: contrast, names, keys, small screens and print."""

from itertools import pairwise

import pytest
import torch
from accessibility import contrast_faults, keyboard_faults, structure_faults
from reported import HISTORY, RECORD

from probattn.inference.claims import Claim, Subject
from probattn.inference.reports.verify import draw_figures, render_report, save_figures
from probattn.models import LanguageModel, load_corpus
from probattn.models.language import LanguageConfig
from probattn.plotting import plot_training

VERDICTS = (
    ("jacobian", "identity", "supported"),
    ("barrier-training", "empirical", "not_supported"),
    ("normalisation", "identity", "supported_within"),
    ("stationarity", "statistical", "supported"),
    ("calibration", "statistical", "not_run"),
)


def the_claims():
    long = "A statement of some length with a symbol σ_min(J_i), which runs over more than one line on a phone."
    for name, kind, verdict in VERDICTS:
        measured = {} if verdict == "not_run" else {"max_logdet_error": 1.0, "another_number": 0.25}
        figures = {f"{name}-figure": plot_training(HISTORY)} if measured else {}
        yield Claim(
            name, long, kind, verdict, measured, {"max_logdet_error": 2.0} if measured else {}, "u_i < 1",
            formula="b_i = −log |det J_i|", control="A fault is noticed.", finding="It was seen.", figures=figures,
        )  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of a model that was not fitted."""
    folder, corpus = tmp_path_factory.mktemp("report"), load_corpus()
    config = LanguageConfig(len(corpus.vocabulary), context=64, dim=8, layers=1, decoder_heads=2, stage_rank=3)
    model = LanguageModel(config).double()
    values = {name: 3 * value for name, value in model.initial_values(0).items()}
    heldout = corpus.windows(64, heldout=True)
    subject = Subject(model, values, heldout.inputs[:12], heldout.targets[:12], 1, corpus=corpus)
    claims = list(the_claims())
    figures = draw_figures(subject, corpus, HISTORY)
    figures |= {f"claim-{name}": figure for claim in claims for name, figure in claim.figures.items()}
    record = {**RECORD, "model": config.as_dict()}
    path = folder / "report.html"
    html = render_report(subject, corpus, claims, save_figures(figures, folder), record, HISTORY)
    path.write_text(html, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def support(tmp_path_factory):
    """The page of support tokens of a small model."""
    pytest.importorskip("transformers")
    from probattn.inference.reports.support import read_margins, support_page
    from probattn.models.causal_lm import CharacterTokeniser, build_causal_lm
    from probattn.models.checkpoint import Checkpoint

    torch.manual_seed(1)
    text = "the cat sat\non the mat, and the dog"
    characters = (*sorted(set(text)), "\ufffd")
    model = build_causal_lm("llama", len(characters), layers=5, dim=12, heads=3, context=64).eval()
    checkpoint = Checkpoint(model, CharacterTokeniser(characters), "tiny", torch.float32)
    path = tmp_path_factory.mktemp("support") / "support.html"
    page = support_page(read_margins(text, checkpoint), checkpoint, count=3)
    path.write_text(page.html, encoding="utf-8")
    return path


@pytest.fixture
def opened(chromium, request):
    """Opens one of the pages at some width, in light or dark."""
    contexts = []

    def run(name, width=1024, scheme="light", **options):
        path = request.getfixturevalue("saved" if name == "explorer" else name)
        context = chromium.new_context(
            viewport={"width": width, "height": 768}, color_scheme=scheme, reduced_motion="reduce", **options
        )
        contexts.append(context)
        page = context.new_page()
        page.goto(path.as_uri())
        page.wait_for_timeout(200)
        return page

    yield run
    for context in contexts:
        context.close()


def states_of(page, name):
    """The states of a page that show other things: its views, with a story, and everything that is folded."""
    if name == "explorer":
        for view in ("line", "plane", "sequence", "sentence"):
            page.click(f"#tab-{view}")
            page.wait_for_timeout(150)
            if view in ("line", "plane"):
                page.locator(f"#{view}-presets button").nth(1).click()
                page.wait_for_timeout(150)
            yield view
        return
    page.evaluate("for (const part of document.querySelectorAll('details')) part.open = true")
    yield name


PAGES = ("report", "support", "explorer")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_can_be_read_and_everything_has_a_name(opened, name, scheme):
    page = opened(name, scheme=scheme)
    for state in states_of(page, name):
        assert contrast_faults(page) == [], state
        assert structure_faults(page) == [], state


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_reaches_everything_and_the_focus_is_seen(opened, name):
    page = opened(name)
    for state in states_of(page, name):
        assert keyboard_faults(page) == [], state


def test_the_checks_notice_faults(opened):
    page = opened("report")
    page.evaluate(
        """() => {
          const main = document.querySelector("main"), style = document.createElement("style");
          style.textContent = ".lost:focus { outline: none; }";
          document.head.append(style);
          main.insertAdjacentHTML("afterbegin",
            '<p style="color: #999; background: #fff">too pale</p><input id="bare"><h4>too deep</h4>'
            + '<a href="#x" class="lost">lost</a><p id="bare">twice</p>');
        }"""
    )
    assert [fault for fault in contrast_faults(page) if "too pale" in fault]
    assert {fault.split(":")[0] for fault in structure_faults(page)} == {
        "no name",
        "id used twice",
        "heading skips a level",
    }
    assert [fault for fault in keyboard_faults(page) if "lost" in fault]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1024, 1400])
def test_the_report_fits_the_screen(opened, width, scheme):
    page = opened("report", width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    narrow = width == 390
    assert page.locator("figure.columns .whole").first.is_visible() is not narrow
    assert page.locator("figure.columns .parts").first.is_visible() is narrow
    cell = page.locator(".claims").first.locator("tbody tr").first.locator("td").last
    assert (cell.bounding_box()["width"] > 0.8 * width) is narrow  # a card, not a column
    if narrow:  # one panel a row
        boxes = [part.bounding_box() for part in page.locator("figure.columns").first.locator(".parts > svg").all()]
        assert all(low["y"] >= high["y"] + high["height"] - 1 for high, low in pairwise(boxes))
        assert min(box["width"] for box in boxes) > 0.8 * width


def test_the_report_is_told_first_and_prints_light(opened):
    page = opened("report", 1400, "dark")
    assert page.locator(".summary li").count() == 5
    assert page.locator("figure").first.bounding_box()["y"] < 500
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)" != dark
    assert page.locator("figure svg").first.evaluate("picture => getComputedStyle(picture).filter") == "none"
    assert page.locator("nav").is_hidden()
    assert contrast_faults(page) == []


def test_without_a_script_the_report_says_everything(opened):
    page = opened("report", java_script_enabled=False)
    assert "does not hold" in page.inner_text("main")
    assert page.locator("script").count() == 0
