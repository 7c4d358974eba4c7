"""The report of verify: figures inline, every text escaped, verdicts in words, nothing fetched."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from probattn.inference.claims import Claim
from probattn.inference.reports.verify import critical_slope, draw_figures, render_report, save_figures
from probattn.models.corpus import UNKNOWN, Corpus
from probattn.models.language import LanguageConfig

HISTORY = {
    name: [1.0, 0.5] for name in ("step", "objective", "cross_entropy", "barrier", "smallest_margin", "embedding_norm")
}
RECORD = {
    "environment": {
        "command": "probattn verify",
        "date": "2026-01-01",
        "seed": 0,
        "dtype": "float64",
        "device": "cpu",
        "processor": "one",
        "cores": 2,
        "threads": 2,
        "python": "3.11",
        "versions": {"torch": "2"},
    },
    "corpus": {"characters": 1, "heldout_characters": 1, "vocabulary": 2},
    "model": LanguageConfig(3).as_dict(),
    "fit": {"stopped": "steps"},
}


@pytest.fixture(scope="module")
def figures(subject, corpus):
    return draw_figures(subject, corpus, HISTORY)


class Balanced(HTMLParser):
    """Raises where tags do not close, and collects what would be fetched."""

    void = ("meta", "img", "br")

    def __init__(self):
        super().__init__()
        self.open, self.sources = [], []

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_figures_are_written_and_inlined(figures, tmp_path):
    images = save_figures(figures, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in figures}
    assert all(image.startswith("data:image/png;base64,") for image in images.values())


def test_text_is_escaped_and_nothing_is_fetched(subject, corpus, figures, tmp_path):
    hostile = ["<", ">", "&", '"', "'", *corpus.vocabulary[5:-1], UNKNOWN]
    attacked = Corpus("<script>alert(1)</script>", corpus.text, corpus.heldout, tuple(hostile))
    claims = [
        Claim("jacobian", "a < b", "identity", "supported", {"x": 1.0}, {"x": 2.0}, control="<b>", finding="<i>seen"),
        Claim("half", "h", "empirical", "supported_within", {}, {}, "x < 1", formula="x < y"),
        Claim("no", "n", "empirical", "not_supported", {}, {}),
        Claim("z", "s", "empirical", "not_run", {}, {}, "no time"),
    ]
    html = render_report(subject, attacked, claims, save_figures(figures, tmp_path), RECORD, HISTORY)
    assert "<script" not in html
    assert html.count("a &lt; b") == 2  # in the table and in its section
    assert "&lt;i&gt;seen" in html
    assert "&lt;b&gt;" in html
    verdicts = re.findall(r'<td><span class="verdict \w+">(.*?)</span></td>', html)
    assert verdicts == ["holds", "holds if x &lt; 1", "does not hold", "not run (no time)"]
    assert "supported within" not in html
    page = Balanced()
    page.feed(html)
    assert page.open == []
    assert page.sources
    assert all(source.startswith("data:") for source in page.sources)
    assert "http" not in re.sub(r"data:[^\"]*", "", html)
    # Every character of the shown windows has a cell, and five of each window are support tokens.
    assert html.count("<span style=") + html.count('<span class="support"') == 12 * 24
    assert html.count('<span class="support"') == 12 * 5


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
