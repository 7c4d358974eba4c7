"""The explorer as a new user meets it: dragging, keys, touch, presets, links, small and dark screens."""

import base64
import json
import re
import threading

import pytest
import torch
from explorer_numbers import differences, line_expected, plane_attention, plane_expected

from probattn import stability_margin
from probattn.teach.explorer import explorer_page, serve_page
from probattn.teach.explorer.page import SCRIPTS

VIEWS = ("line", "plane", "sequence", "sentence")
PRESETS = {
    "line": ("line-boundary", "line-fold", "line-bounded", "line-runaway"),
    "plane": ("plane-boundary", "plane-fold", "plane-two-folds", "plane-runaway"),
    "sequence": ("sequence-below", "sequence-above", "sequence-bounded", "sequence-drift", "sequence-repulsion"),
    "sentence": ("sentence-nearest", "sentence-update"),
}
LEGENDS = {
    "line": {
        *("area: attention weight", "noise ε and its roots", "folded", "no attention, e = u"),
        *("N(e) |J|", "N(e) alone"),
    },
    "sequence": {"mean so far", "mean ± 2√V", "mean field V", "a σ²", "aV of the sample"},
}
BROKEN = re.compile(r"NaN|Infinity|undefined|null|\[object")


def numbers(page):
    return page.evaluate("probattn.numbers()")


def change(page, settle, view, **fields):
    state = page.evaluate("probattn.state")
    state["view"] = view
    state[view] |= fields
    page.evaluate("state => probattn.setState(state)", state)
    settle(page)


def centre(handle):
    box = handle.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def drag(page, handle, dx, dy, steps=12):
    x, y = centre(handle)
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=steps)
    page.mouse.up()


def steps(page, settle, view, preset):
    """Tells a story from its first step to its last; yields at each."""
    page.click(f"#{preset}")
    while True:
        settle(page)
        yield page.inner_text(f"#{view}-words")
        forward = page.locator(f"#{view}-next")
        if forward.is_hidden() or forward.is_disabled():
            return
        forward.click()


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def test_a_token_dragged_across_the_boundary(open_page, settle):
    page = open_page()
    change(page, settle, "line", tokens=[-0.8, 0.8, 0], a=1.2, sigma=0.5, noise=-0.4)
    before = numbers(page)
    assert differences(before, line_expected(page.evaluate("probattn.state.line"))) == []
    assert before["line.regime"]["text"] == "certified"
    assert before["line.count"]["text"] == "1"
    assert before["line.mass"]["text"] == "1"
    assert float(before["line.margin"]["value"]) > 0

    drag(page, page.locator("#line-handles .handle").nth(1), 70, 0)
    settle(page)
    after = numbers(page)
    state = page.evaluate("probattn.state.line")
    assert state["tokens"][1] > 1.5
    assert differences(after, line_expected(state)) == []
    assert after["line.regime"]["text"] == "folded"
    assert after["line.count"]["text"] == "3"
    assert float(after["line.mass"]["value"]) > 1.1
    assert float(after["line.margin"]["value"]) < 0
    page.wait_for_timeout(500)
    assert page.inner_text("#news").startswith("folded: some noise has several solutions")


def test_the_query_dragged_across_the_curve(open_page, settle):
    page = open_page()
    page.click("#tab-plane")
    *_, _ = steps(page, settle, "plane", "plane-boundary")
    before = numbers(page)
    assert 0 < float(before["plane.determinant"]["value"]) < 0.05
    drag(page, page.locator("#plane-handles .handle.query"), -40, 0)
    settle(page)
    after = numbers(page)
    assert float(after["plane.determinant"]["value"]) < 0
    assert differences(after, plane_expected(page.evaluate("probattn.state.plane"))) == []


def test_touch_moves_a_token(open_page, settle):
    page = open_page(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page.tap("#tab-plane")
    settle(page)
    before = page.evaluate("probattn.state.plane.tokens[0]")
    handle = page.locator("#plane-handles .handle").first
    handle.scroll_into_view_if_needed()
    x, y = centre(handle)
    touch = page.context.new_cdp_session(page)
    touch.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [{"x": x, "y": y}]})
    for k in range(1, 6):
        touch.send("Input.dispatchTouchEvent", {"type": "touchMove", "touchPoints": [{"x": x + 8 * k, "y": y - 6 * k}]})
    touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    settle(page)
    after = page.evaluate("probattn.state.plane.tokens[0]")
    assert after[0] > before[0] + 0.2
    assert after[1] > before[1] + 0.2


def test_keys_reach_and_move_everything(open_page, settle):
    page = open_page()
    page.focus("#tab-line")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert page.evaluate("probattn.state.view") == "plane"
    reached = set()
    page.focus("#plane-presets button:last-child")
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate(
                "document.activeElement.id || document.activeElement.className || document.activeElement.tagName"
            )
        )
    assert {"plane-kind", "plane-s1", "plane-right", "plane-add", "SUMMARY"} <= reached
    assert any(name.startswith("handle") for name in reached)
    handle = page.locator("#plane-handles .handle.query")
    handle.focus()
    x, y = page.evaluate("probattn.state.plane.tokens.at(-1)")
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    settle(page)
    assert page.evaluate("probattn.state.plane.tokens.at(-1)") == pytest.approx([x + 0.04 - 0.2, y + 0.02])
    assert handle.get_attribute("aria-valuetext").startswith("x ")
    count = page.evaluate("probattn.state.plane.tokens.length")
    page.locator("#plane-handles .handle").first.focus()
    page.keyboard.press("Delete")
    settle(page)
    assert page.evaluate("probattn.state.plane.tokens.length") == count - 1
    assert page.evaluate("getComputedStyle(document.activeElement, '::before').boxShadow") != "none"


def test_undo_and_redo(open_page, settle):
    page = open_page()
    first = page.evaluate("probattn.state")
    page.locator("#line-a").fill("3")
    page.click("#line-add")
    settle(page)
    second = page.evaluate("probattn.state")
    assert second["line"]["a"] == 3
    assert len(second["line"]["tokens"]) == 4
    page.keyboard.press("Control+z")
    page.keyboard.press("Control+z")
    settle(page)
    assert page.evaluate("probattn.state") == first
    assert page.is_disabled("#undo")
    page.keyboard.press("Control+Shift+z")
    page.click("#redo")
    settle(page)
    assert page.evaluate("probattn.state") == second
    assert page.is_disabled("#redo")
    assert numbers(page)["line.a"]["text"] == "3"


def test_a_link_restores_the_state(open_page, settle, saved):
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    change(page, settle, "plane", tokens=[[0.1234, -1], [1, 1], [-1, 0.5]], s1=2.5, kind="spectral", support=1)
    page.click("#link")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    other = open_page(fragment="#" + link.split("#")[1])
    assert other.evaluate("probattn.state") == page.evaluate("probattn.state")
    assert other.is_hidden("#problem")
    page.click("#reset")
    settle(page)
    page.evaluate("fragment => { location.hash = fragment }", link.split("#")[1])  # pasted into the page's own address
    settle(page)
    assert page.evaluate("probattn.state") == other.evaluate("probattn.state")
    assert {name: entry["value"] for name, entry in numbers(other).items()} == {
        name: entry["value"] for name, entry in numbers(page).items()
    }


def test_the_served_page_is_the_same(open_page, settle):
    server = serve_page(explorer_page(), 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        page = open_page(address=f"http://127.0.0.1:{server.server_port}/")
        page.click("#tab-plane")
        settle(page)
        assert differences(numbers(page), plane_expected(page.evaluate("probattn.state.plane"))) == []
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_links_that_cannot_be_read_are_explained(open_page, settle):
    page = open_page()
    beginning = page.evaluate("probattn.state")
    state = json.dumps(beginning).encode()
    whole = base64.urlsafe_b64encode(state).decode().rstrip("=")
    missing = base64.urlsafe_b64encode(state.replace(b'"sigma"', b'"sigme"')).decode().rstrip("=")
    for fragment, words in (
        (f"#v7.{whole}", "another version of the explorer (state 7, this page reads 1)"),
        (f"#v1.{whole[:-30]}", "damaged"),
        (f"#v1.{missing}", "damaged"),
        ("#anything", "does not hold a state"),
    ):
        page = open_page(fragment=fragment)
        assert words in page.inner_text("#problem")
        assert page.evaluate("probattn.state") == beginning
        page.click("#problem-close")
        assert page.is_hidden("#problem")


def test_a_state_beyond_the_limits_is_brought_within(open_page, settle):
    page = open_page()
    change(page, settle, "line", tokens=[-50, 50], a=1e9, sigma=0, noise=-1e6, radius=99)
    expected = {"tokens": [-3, 3], "a": 10, "sigma": 0.02, "noise": -4, "radius": 4}
    assert page.evaluate("probattn.state.line") == expected
    with pytest.raises(Exception, match="a number is missing"):
        change(page, settle, "line", a="1")
    with pytest.raises(Exception, match="between 2 and 32"):
        change(page, settle, "line", tokens=[0])


def test_sliders_at_their_extremes(open_page, settle):
    page = open_page()
    for view in VIEWS:
        page.click(f"#tab-{view}")
        sliders = page.locator(f"#{view} input[type=range]")
        ends = sliders.evaluate_all("inputs => inputs.map(input => [input.min, input.max])")
        for choice in range(8):
            for k, end in enumerate(ends):
                sliders.nth(k).fill(end[(choice >> (k % 3)) & 1])
            if view == "sequence":
                page.click("#sequence-step")
                page.click("#sequence-step")
            settle(page)
            text = page.inner_text(f"#{view}")
            assert not BROKEN.search(text), (view, choice, BROKEN.search(text))
            assert not any(BROKEN.search(entry["value"]) for entry in numbers(page).values())


def test_tokens_in_one_place(open_page, settle):
    page = open_page()
    change(page, settle, "line", tokens=[1, 1, 1, 1], a=10)
    shown = numbers(page)
    assert differences(shown, {"line.margin": 1, "line.barrier": 0, "line.count": 1, "line.mass": 1}) == []
    assert shown["line.turning"]["text"] == "none"
    change(page, settle, "plane", tokens=[[1, 1], [1, 1], [1, 1]], s1=6, s2=6)
    assert differences(numbers(page), {"plane.determinant": 1, "plane.spectral": 1, "plane.count": 1}) == []
    # On the boundary itself: the gain and the barrier have no bound.
    change(page, settle, "line", tokens=[-1, 1, 0], a=1)
    shown = numbers(page)
    assert shown["line.gain"]["text"] == shown["line.barrier"]["text"] == "∞"
    assert not BROKEN.search(page.inner_text("#line"))


@pytest.mark.parametrize("view", VIEWS)
def test_presets(open_page, settle, until, view):
    page = open_page(viewport={"width": 360, "height": 740})
    page.click(f"#tab-{view}")
    assert page.locator(f"#{view}-presets button").evaluate_all("all => all.map(button => button.id)") == list(
        PRESETS[view]
    )
    for preset in PRESETS[view]:
        if view == "sequence":
            page.click(f"#{preset}")
            until(page, "probattn.path().tokens.length > 60")
            page.click("#sequence-play")
            settle(page)
        else:
            for words in steps(page, settle, view, preset):
                assert "{" not in words
                if view != "sentence":
                    reason = page.inner_text(f"[data-name='{view}.reason']")
                    assert re.match(r"(The|A real|No|Within) \w", reason), preset
                shown = numbers(page)
                if view == "line":
                    assert differences(shown, line_expected(page.evaluate("probattn.state.line"))) == []
                elif view == "plane":
                    assert differences(shown, plane_expected(page.evaluate("probattn.state.plane"))) == []
        assert page.is_visible(f"#{view}-preset")
        assert not BROKEN.search(page.inner_text("main"))
        assert overflow(page) <= 0
        shown = numbers(page)
        if preset == "line-bounded":
            assert shown["line.regime"]["text"] == "certified"
            assert differences(shown, {"line.count": 1, "line.mass": 1}) == []
        if preset == "line-boundary":
            assert shown["line.regime"]["text"] == "certified"
            assert float(shown["line.margin"]["value"]) == pytest.approx(0.01)
        if preset == "line-runaway":
            assert float(shown["line.barrier"]["value"]) == pytest.approx(-2.397895272798)  # -log(11)
            assert abs(float(shown["line.e"]["value"])) < 1e-12
        if preset == "plane-two-folds":
            state = page.evaluate("probattn.state.plane")
            tokens = torch.tensor(state["tokens"], dtype=torch.float64)
            assert bool((stability_margin(plane_attention(state)[1], tokens, "determinant") > 0).all())
            assert differences(shown, {"plane.determinant": 1, "plane.spectral": -1, "plane.count": 9}) == []
            assert shown["plane.regime"]["text"] == "folded"
        if preset == "plane-runaway":
            assert float(shown["plane.barrier"]["value"]) == pytest.approx(-3.891820298110)  # -2 log(7)


def test_a_path_below_and_one_above(open_page, settle, until):
    page = open_page()
    page.click("#tab-sequence")
    spreads = {}
    for preset in ("sequence-below", "sequence-above"):
        page.click(f"#{preset}")
        page.locator("#sequence-speed").fill("40")
        until(page, "probattn.path().tokens.length >= 300")
        page.click("#sequence-play")
        settle(page)
        spreads[preset] = float(numbers(page)["sequence.spread"]["value"])
        length = page.evaluate("probattn.path().tokens.length")
        assert int(numbers(page)["sequence.n"]["value"]) == length == page.evaluate("probattn.state.sequence.n")
    assert spreads["sequence-below"] < 0.1
    assert spreads["sequence-above"] > 50
    assert numbers(page)["sequence.V"]["text"] == "none: a σ² > 4/27"


def test_a_preset_is_animated(open_page, settle, until):
    page = open_page(reduced_motion="no-preference")
    page.click("#line-fold")
    seen = set()
    for _ in range(12):
        seen.add(round(page.evaluate("probattn.state.line.a"), 2))
        page.wait_for_timeout(60)
    assert len(seen) > 4
    assert min(seen) < 1
    page.locator("#line-noise").click()  # a hand on the page stops it
    settle(page)
    assert page.evaluate("probattn.state.line.a") < 0.9
    assert "moved by hand" in page.inner_text("#line-turn")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_small_screens_and_both_themes(open_page, settle, scheme):
    page = open_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    for view in VIEWS:
        page.click(f"#tab-{view}")
        settle(page)
        assert overflow(page) <= 0
    # The text stands out from the paper as WCAG asks of small print.
    pairs = page.evaluate(
        """() => {
          const light = colour => {
            const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(c => c / 255)
              .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
          };
          const paper = light(getComputedStyle(document.body).backgroundColor);
          return [...document.querySelectorAll("dt, dd, .hint, h1, label, p")].map(element => {
            const ink = light(getComputedStyle(element).color);
            return (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
          });
        }"""
    )
    assert min(pairs) > 4.5
    assert page.evaluate("document.documentElement.dataset.theme") == scheme
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == {"light": "dark", "dark": "light"}[scheme]
    page.click("#large")
    settle(page)
    assert overflow(page) <= 0
    # Twenty on a screen as narrow as this, more on a wide one; without the button it is sixteen.
    assert page.evaluate("parseFloat(getComputedStyle(document.documentElement).fontSize)") >= 20


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("width", [360, 420, 1280])
def test_legends_are_whole_at_every_width(open_page, settle, width, large):
    page = open_page(viewport={"width": width, "height": 740})
    page.evaluate(
        """() => {
          window.words = {};
          const write = CanvasRenderingContext2D.prototype.fillText;
          CanvasRenderingContext2D.prototype.fillText = function (words, x, y, ...most) {
            const wide = this.measureText(words).width, part = { left: 0, center: 0.5, right: 1 }[this.textAlign];
            const left = x - part * wide;
            window.words[words] = { left, right: left + wide, y, width: this.canvas.clientWidth };
            return write.call(this, words, x, y, ...most);
          };
        }"""
    )
    if large:
        page.click("#large")
    for view, legend in LEGENDS.items():
        page.evaluate("() => { window.words = {} }")
        page.click(f"#tab-{view}")
        settle(page)
        seen = page.evaluate("words")
        assert legend <= set(seen)
        for words in legend:
            assert 0 <= seen[words]["left"] < seen[words]["right"] <= seen[words]["width"]
            for other in legend - {words}:
                apart = (
                    seen[other]["right"] < seen[words]["left"]
                    or seen[words]["right"] < seen[other]["left"]
                    or abs(seen[other]["y"] - seen[words]["y"]) > 10
                )
                assert apart, (words, other)


def test_on_paper_the_plot_is_light_and_its_handles_stay_on_it(open_page, settle):
    page = open_page(color_scheme="dark")
    before = page.locator("#line .plot").bounding_box()
    at = [
        (handle.bounding_box()["x"] - before["x"]) / before["width"] for handle in page.locator("#line .handle").all()
    ]
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 718, "height": 1000})  # A4
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    plot = page.locator("#line .plot").bounding_box()
    assert plot["width"] <= 681
    assert plot["width"] / plot["height"] == pytest.approx(before["width"] / before["height"], rel=0.01)
    there = [(handle.bounding_box()["x"] - plot["x"]) / plot["width"] for handle in page.locator("#line .handle").all()]
    assert there == pytest.approx(at, abs=0.01)
    assert not page.locator("#theme").is_visible()
    page.emulate_media(media="screen")
    page.set_viewport_size({"width": 1280, "height": 800})
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    settle(page)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    assert page.locator("#line .plot").bounding_box() == before


def test_what_a_new_user_sees_first(open_page, settle, until):
    page = open_page()
    shown = numbers(page)
    assert shown["line.noise"]["value"] == shown["line.e"]["value"]
    roots = [float(root) for root in shown["line.roots"]["value"].split()]
    assert min(abs(root - float(shown["line.u"]["value"])) for root in roots) < 1e-12
    page.click("#tab-sequence")
    until(page, "probattn.path().tokens.length === 100")
    settle(page)
    assert numbers(page)["sequence.n"]["text"] == "100"
    page.click("#sequence-play")
    until(page, "probattn.path().tokens.length > 120")


def test_the_reason_of_steep_repulsion(open_page, settle):
    page = open_page()
    change(page, settle, "line", tokens=[-1, 1, 0], a=-10)
    reason = page.inner_text("[data-name='line.reason']")
    assert reason.startswith("The largest a·Var over every next token is below one")


def test_the_matrix_is_edited_by_its_singular_vectors(open_page, settle):
    page = open_page(viewport={"width": 1280, "height": 1200})
    page.click("#tab-plane")
    settle(page)
    before = page.evaluate("probattn.state.plane")
    for index, field in ((0, "right"), (1, "left"), (2, "s2")):
        drag(page, page.locator("#matrix-handles .handle").nth(index), 12, -30)
        settle(page)
        assert page.evaluate(f"probattn.state.plane.{field}") != before[field]
        assert differences(numbers(page), plane_expected(page.evaluate("probattn.state.plane"))) == []


def test_a_frame_of_thirty_two_tokens_costs_little_more_than_one_of_four(open_page, settle, record_property):
    page = open_page()
    generator = torch.Generator().manual_seed(0)
    tokens = (4 * torch.rand(32, 2, generator=generator) - 2).tolist()
    for view, values in (("plane", tokens), ("line", [pair[0] for pair in tokens])):
        for handle, what in ((0, "token"), (-1, "query")):
            milliseconds = []  # of a frame while it is dragged, by number of tokens
            for count in (4, 32):
                change(page, settle, view, tokens=values[:count])
                begin = page.evaluate("probattn.frames.length")
                drag(page, page.locator(f"#{view}-handles .handle").nth(handle % count), 60, 20)
                frames = sorted(page.evaluate("probattn.frames")[begin:])
                milliseconds.append(frames[len(frames) // 2])
            record_property(f"{view}: milliseconds a frame, dragging a {what}, 4 and 32 tokens", milliseconds)
            # The work for each token grows 8 times, that for each pair 64 times.
            assert milliseconds[1] < 24 * milliseconds[0]


def test_nothing_leaves_the_machine(open_page, settle):
    page = open_page()
    assert len(open_page.requests) == 1
    blocked = page.evaluate("fetch('https://example.org/').then(() => 'loaded', () => 'blocked')")
    assert blocked == "blocked"
    page.evaluate(
        "document.head.append(Object.assign(document.createElement('script'), { text: 'window.ran = true' }))"
    )
    assert page.evaluate("window.ran === undefined")
    page.wait_for_timeout(100)
    assert len(open_page.errors) >= 2
    assert all("Content Security Policy" in error for error in open_page.errors)
    open_page.errors.clear()
    assert len(open_page.requests) == 1
    text = explorer_page()
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text)
    assert len(text.encode()) < 250_000  # a third of it the margins of the real sentence
    assert len(set(SCRIPTS)) == len(SCRIPTS)
