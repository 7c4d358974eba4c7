"""Indices for programs, written beside the pages: ``llms.txt`` lists the pages, ``index.json`` claims and public names.

Nothing in them is typed by hand: titles and first sentences come from the pages, claims from the committed results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from ledger import claims
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import probattn
from probattn.inference.claims.claim import verdict_in_words

SUMMARY = (
    "Causal self-attention as a generative Pyro model: densities, samples and posteriors with the exact Jacobian, and "
    "a measured verdict on every claim about it."
)
# Heading and beginnings of the names of its pages; a page goes to the first heading that fits.
_SECTIONS = (
    ("Claims", ("claims/",)),
    ("How to", ("how-to/", "faq", "gallery")),
    ("Results", ("results/", "reliability")),
    ("Notebooks", ("notebooks/",)),
    ("Reference", ("api/", "notation", "changes")),
    ("Understand", ("",)),
)


def first_sentence(text: str, longest: int = 240) -> str:
    """Cut the first sentence out of a paragraph.

    Args:
        text: paragraph.
        longest: largest number of characters; more are cut at a word and marked.

    Example:
        >>> first_sentence("One token, cf. section 2, is its own query. The rest follows.")
        'One token, cf. section 2, is its own query.'
        >>> first_sentence("one two three", longest=8)
        'one two …'
    """
    text = " ".join(text.split())
    sentence = re.split(r"(?<=[.?!:])(?<!cf\.)(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z`*])", text, maxsplit=1)[0]
    if len(sentence) <= longest:
        return sentence
    return sentence[:longest].rsplit(" ", 1)[0] + " …"


def section_of(page: str) -> str:
    """Choose the heading under which a page is listed.

    Args:
        page: name of the page in Sphinx.

    Example:
        >>> section_of("claims/jacobian"), section_of("theory")
        ('Claims', 'Understand')
    """
    return next(title for title, starts in _SECTIONS if page.startswith(starts))


def page_list(pages: dict[str, tuple[str, str]]) -> str:
    """Write ``llms.txt``.

    Args:
        pages: title and first sentence by the name of the page.

    Returns:
        Markdown: a heading, a summary, and a list of links per section.
    """
    lines = [
        "# probattn",
        "",
        f"> {SUMMARY}",
        "",
        "Claims, verdicts and numbers for programs: [index.json](index.json).",
        "",
    ]
    for title in ("Understand", *(title for title, _ in _SECTIONS[:-1])):
        found = [page for page in sorted(pages) if section_of(page) == title]
        if found:
            lines += [f"## {title}", ""]
            lines += [f"- [{pages[page][0]}]({page}.html): {pages[page][1]}".rstrip(": ") for page in found]
            lines.append("")
    return "\n".join(lines)


def claims_and_names(pages: dict[str, tuple[str, str]]) -> dict[str, Any]:
    """Collect the content of ``index.json``.

    Args:
        pages: title and first sentence by the name of the page.

    Returns:
        Plain JSON values: claims with verdict, words, formula, numbers and page; pages of results; public names.
    """
    kept = ("statement", "kind", "verdict", "condition", "formula", "finding", "control", "measured", "bound")
    listed = [
        {
            "id": name,
            "verdict_in_words": verdict_in_words(claim),
            **{key: claim.get(key) for key in kept},
            "page": f"claims/{name}.html",
        }
        for name, claim in claims().items()
    ]
    results = [
        {"title": pages[page][0], "page": f"{page}.html"} for page in sorted(pages) if page.startswith("results/")
    ]
    return {
        "schema": 1,
        "name": "probattn",
        "version": probattn.__version__,
        "summary": SUMMARY,
        "paper": "arXiv:2602.22271",
        "claims": listed,
        "results": results,
        "public": [f"probattn.{name}" for name in probattn.__all__],
    }


def _pages(env: BuildEnvironment) -> dict[str, tuple[str, str]]:
    found = {}
    for page in sorted(env.found_docs):
        paragraph = next(env.get_doctree(page).findall(nodes.paragraph), None)
        words = "" if paragraph is None else first_sentence(_without_formulas(paragraph))
        found[page] = (env.titles[page].astext(), words)
    return found


def _without_formulas(paragraph: nodes.paragraph) -> str:
    """The text of a paragraph with formulas as TeX between dollars."""
    text = paragraph.deepcopy()
    for formula in list(text.findall(nodes.math)):
        formula.replace_self(nodes.Text(f"${formula.astext()}$"))
    return text.astext()


def _write(app: Sphinx, error: Exception | None) -> None:
    if error is not None or app.builder.name != "html":
        return
    pages, out = _pages(app.env), Path(app.outdir)
    (out / "llms.txt").write_text(page_list(pages), encoding="utf-8")
    content = json.dumps(claims_and_names(pages), ensure_ascii=False, allow_nan=False, indent=1)
    (out / "index.json").write_text(content + "\n", encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Write both files at the end of a build."""
    app.connect("build-finished", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
