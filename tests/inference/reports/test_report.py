"""The report of verify: figures inline, every text escaped, verdicts in words, nothing fetched."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from reported import HISTORY, RECORD

from probattn.inference.claims import Claim
from probattn.inference.reports.verify import critical_slope, draw_figures, render_report, save_figures
from probattn.inference.reports.verify.summary import summary
from probattn.inference.reports.verify.text import (
    LEVELS,
    colour_rules,
    coloured_rows,
    level_of,
    support_positions,
)
from probattn.models.corpus import UNKNOWN, Corpus


@pytest.fixture(scope="module")
def figures(subject, corpus):
    return draw_figures(subject, corpus, HISTORY)


class Balanced(HTMLParser):
    """Raises where tags do not close, and collects what would be fetched."""

    void = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.anchors, self.names = [], [], [], set()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        links = [value for name, value in attributes if name in ("src", "href")]
        self.anchors += [link[1:] for link in links if link.startswith("#")]
        self.sources += [link for link in links if not link.startswith("#")]
        if "id" in found:
            assert found["id"] not in self.names
            self.names.add(found["id"])
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def parsed(html):
    page = Balanced()
    page.feed(html)
    assert page.open == []
    return page


CLAIMS = [
    Claim("jacobian", "a < b", "identity", "supported", {"x": 1.0}, {"x": 2.0}, control="<b>", finding="<i>seen"),
    Claim("half", "h", "empirical", "supported_within", {"y": 1.0}, {}, "u_i < 1", formula="x < y, Σ_{t≤n} a^{b/c}"),
    Claim("no", "n", "empirical", "not_supported", {}, {}),
    Claim("z", "s", "empirical", "not_run", {}, {}, "no time"),
]


@pytest.fixture(scope="module")
def html(subject, corpus, figures, tmp_path_factory):
    """The report of a hostile text."""
    hostile = ["<", ">", "&", '"', "'", *corpus.vocabulary[5:-1], UNKNOWN]
    attacked = Corpus("<script>alert(1)</script>", corpus.text, corpus.heldout, tuple(hostile))
    images = save_figures(figures, tmp_path_factory.mktemp("figures"))
    return render_report(subject, attacked, CLAIMS, images, RECORD, HISTORY)


def test_figures_are_written_and_inlined(figures, tmp_path):
    images = save_figures(figures, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in figures}
    assert all(image.uri.startswith("data:image/png;base64,") for image in images.values())


def test_a_narrow_screen_gets_the_columns_of_a_figure_one_by_one(figures, tmp_path):
    images = save_figures(figures, tmp_path)
    assert [len(images[name].parts) for name in ("conditional", "training", "margins", "mass")] == [2, 5, 0, 0]
    for image in images.values():
        for part in (box for boxes in image.parts for box in boxes):
            assert 0 <= part.left < part.left + part.width <= image.width + 1e-6
            assert 0 <= part.top < part.top + part.height <= image.height + 1e-6
    (left,), (right,) = images["conditional"].parts
    assert left.height > 0.9 * images["conditional"].height  # both rows, which share their axis below
    assert left.left + left.width < right.left + 12


def test_a_panel_that_borrows_labels_is_shown_with_them(tmp_path):
    figure = Figure(figsize=(9, 3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)  # room for the edge around a panel, which ends at the border
    own, borrowed, other = figure.subplots(1, 3)
    borrowed.tick_params(axis="y", labelleft=False)
    figure.colorbar(other.imshow(np.eye(2)), ax=other)
    figure.suptitle("all")
    own.plot([0, 1], label="line")
    figure.legend(loc="outside lower center")
    parts = save_figures({"figure": figure}, tmp_path)["figure"].parts
    assert [len(part) for part in parts] == [1, 1, 1, 2, 1]  # title, legend, own, borrowed, a map with its colours
    (first,), (labels, panel) = parts[2:4]
    assert first.left > 0  # not cut at the border of the figure
    assert labels.left == pytest.approx(first.left + 4, abs=1e-9)
    assert labels.left + labels.width < panel.left
    assert (labels.top, labels.height) == (panel.top, panel.height)


def test_text_is_escaped_and_nothing_is_fetched(html):
    assert "<script" not in html
    assert html.count("a &lt; b") == 2  # in the table and in its section
    assert "&lt;i&gt;seen" in html
    assert "&lt;b&gt;" in html
    page = parsed(html)
    assert page.sources
    assert all(source.startswith("data:") for source in page.sources)
    assert set(page.anchors) <= page.names
    assert "http" not in re.sub(r"data:[^\"]*", "", html)


def test_verdicts_are_words_failures_first_and_identities_that_hold_are_folded(html):
    verdicts = re.findall(r'<td><span class="verdict \w+">(.*?)</span></td>', html)
    assert verdicts == ["does not hold", "holds if u<sub>i</sub> &lt; 1", "not run (no time)", "holds"]
    assert "supported within" not in html
    assert "Σ<sub>t≤n</sub> a<sup>b/c</sup>" in html
    assert html.index("does not hold") < html.index('<details class="fold">') < html.index("Jacobian</a>")
    for words in ("does not hold", "holds if …", "holds", "not run"):  # and what they mean, beside the table
        assert re.search(rf"<dt><span [^>]*>{re.escape(words)}</span></dt><dd>\w", html)


def test_every_character_has_a_cell_and_five_of_a_window_are_support_tokens(html):
    cells = re.findall(r'<span class="m(\d+)( support)?" title="([^"]*)">', html)
    assert len(cells) == 12 * 24
    assert sum(bool(chosen) for _, chosen, _ in cells) == 12 * 5
    assert not any(chosen and re.match("space|newline|tab", note) for _, chosen, note in cells)
    rules = dict(re.findall(r"^\.m(\d+)\{(.*)\}$", html, re.MULTILINE))
    assert {level for level, _, _ in cells} <= set(rules)


def test_the_summary_comes_first_in_five_sentences(html):
    listed = html[html.index('<ul class="summary"') : html.index("</ul>")]
    assert listed.count("<li>") == 5
    assert "4 claims" in listed
    assert "1 holds, 1 under a condition that is stated, 1 does not (no), and 1 could not be judged" in listed
    assert html.index("</ul>") < html.index("<figure") < html.index('aria-label="Contents"') < html.index("<h2")


@pytest.mark.parametrize(
    ("claims", "words"),
    [
        ([Claim("a", "", "identity", "not_supported", {}, {})], "does not (a): the code is wrong"),
        ([Claim("a", "", "identity", "supported", {}, {})] * 2, "The 2 identities that must hold to numerical"),
        ([Claim("a", "", "empirical", "supported", {}, {})], "No identity was measured"),
    ],
)
def test_the_summary_of_identities(claims, words):
    sentences = summary(claims, "a text", 1, 8, {"regular": 1}, [], {"barrier": -0.5})
    assert words in sentences[2]
    assert sentences[3] == "In 1 held-out window of 8 characters no fold was seen."
    assert "−0.50 nats per character: being negative" in sentences[4]
    assert "negative" not in summary(claims, "t", 1, 8, {"folded": 1}, [], {"barrier": 0.5})[4]
    mixed = summary(claims, "t", 3, 8, {"folded": 1, "certified": 2}, [], {"barrier": 0.5})[3]
    assert mixed == "Of 3 held-out windows of 8 characters, in 2 no character can fold the map and in 1 the map folds."


def test_support_tokens_leave_out_what_is_trivial():
    text = [*"ab \n  cde"]
    margins = np.array([0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.3, 0.2, 0.1])
    assert support_positions(text, margins, 2) == [8, 7]
    assert support_positions(text, margins) == [8, 7, 6]
    rows, nearest, counts = coloured_rows([text], margins[None])
    assert [cell.support for cell in rows[0]] == [False] * 6 + [True] * 3
    assert [(one.name, one.before, one.sign) for one in nearest] == [
        ("e", "ab ↵  cd", "e"),
        ("d", "ab ↵  c", "d"),
        ("c", "ab ↵  ", "c"),
    ]
    assert (counts["blank"], counts["total"]) == (3, 3)
    assert rows[0][3].note == "newline: margin 0.030"


def test_the_scale_of_the_colours_does_not_depend_on_the_text():
    """The same margin has the same colour, whatever the others are; a relative scale would fail here."""
    alone, among = (coloured_rows([[*"xyz"]], np.array([row]))[0][0][0] for row in ([0.5, 0.5, 0.5], [0.5, 0.1, 2.0]))
    assert alone.level == among.level == 10
    assert [level_of(margin) for margin in (-1.0, 0.0, 1.0, 1.5, 2.0, 9.0)] == [0, 0, 20, 22, 25, 25]


@pytest.mark.parametrize("dark", [False, True])
def test_every_colour_carries_a_readable_ink(dark):
    rules = re.findall(r"rgb\((\d+),(\d+),(\d+)\);color:(#\w+)", colour_rules(dark))
    assert len(rules) == LEVELS
    for *background, ink in rules:
        light = [luminance(map(int, background)), 1.0 if ink == "#fff" else 0.0]
        assert (max(light) + 0.05) / (min(light) + 0.05) >= 4.5


def luminance(colour):
    parts = [part / 255 for part in colour]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("points", [(-1.0, 1.0), (-1.3, 0.2, 0.9), (0.0, 0.1, 5.0)])
def test_the_first_fold_is_where_the_critical_slope_says(points):
    from probattn.folds.mass import scalar_mass
    from probattn.models.scalar import scalar_attention
    from probattn.solve.context import Context

    tokens = torch.tensor(points, dtype=torch.float64)
    critical = critical_slope(tokens)
    folds = [
        len(scalar_mass(Context.of(scalar_attention(factor * critical), tokens.unsqueeze(-1)), 1.0).turning_points)
        for factor in (0.999, 1.001)
    ]
    assert folds[0] == 0
    assert folds[1] == 2
    assert np.isfinite(critical)
