"""Formulas that need no network: TeX goes into the page, and KaTeX, which ships with the site, typesets it there.

A build fails if a page asks for anything from another host: scripts, style sheets, fonts or pictures.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

_LOG = logging.getLogger(__name__)
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio|embed)\b[^>]*?\ssrc\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\srel\s*=\s*["']?(?:stylesheet|preload|icon|preconnect|modulepreload))[^>]*?\shref\s*=\s*["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|(?:url\(\s*["']?|@import\s+["'])((?:https?:)?//[^"')\s]+)""",
    re.IGNORECASE,
)


def as_displayed(tex: str, whole: bool = False) -> str:
    r"""Put lines and paragraphs of a displayed formula under each other.

    Args:
        tex: formula.
        whole: whether it brings its own environment.

    Returns:
        One formula that KaTeX takes.

    Example:
        >>> as_displayed("a &= b \\\\ c &= d")
        '\\begin{aligned}a &= b \\\\ c &= d\\end{aligned}'
        >>> as_displayed("a = b")
        'a = b'
    """
    parts = [part.strip() for part in re.split(r"\n\s*\n", tex.strip())]
    joined = r" \\ ".join(parts)
    plain = re.sub(r"\\begin\{(\w+\*?)\}.*?\\end\{\1\}", "", joined, flags=re.DOTALL)
    if whole or not (len(parts) > 1 or r"\\" in plain):
        return joined
    return rf"\begin{{aligned}}{joined}\end{{aligned}}"


def requests_elsewhere(text: str) -> list[str]:
    """List the addresses on other hosts that a page or a style sheet loads; a link that a reader follows is none.

    Args:
        text: HTML or CSS.

    Example:
        >>> requests_elsewhere('<script defer src="https://cdn.example/x.js"></script> <a href="https://a.b">a</a>')
        ['https://cdn.example/x.js']
        >>> requests_elsewhere("@font-face { src: url(//fonts.example/a.woff2) }")
        ['//fonts.example/a.woff2']
        >>> requests_elsewhere('<link rel="stylesheet" href="_static/site.css"> <img src="a.png">')
        []
    """
    return [next(filter(None, found)) for found in _LOADED.findall(text)]


def _visit_inline(self: HTML5Translator, node: nodes.math) -> None:
    self.body.append(_element("span", node.astext()))
    raise nodes.SkipNode


def _visit_block(self: HTML5Translator, node: nodes.math_block) -> None:
    own = bool(node.get("no-wrap", node.get("nowrap", False)))
    self.body.append(_element("div", as_displayed(node.astext(), own)))
    raise nodes.SkipNode


def _element(tag: str, tex: str) -> str:
    shown, kept = html.escape(tex, quote=False), html.escape(tex, quote=True)
    return f'<{tag} class="math notranslate nohighlight" data-tex="{kept}">{shown}</{tag}>'


def _load_where_needed(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: nodes.document) -> None:
    if tree is not None and next(tree.findall(lambda node: isinstance(node, nodes.math | nodes.math_block)), None):
        app.add_css_file("katex/katex.min.css")
        app.add_js_file("katex/katex.min.js", loading_method="defer")
        app.add_js_file("katex/render.js", loading_method="defer")


def _refuse_requests(app: Sphinx, error: Exception | None) -> None:
    """Warn of requests to other hosts in what was written; the build treats a warning as an error."""
    if error is not None or app.builder.format != "html":
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        if path.suffix in (".html", ".css"):
            for address in requests_elsewhere(path.read_text(encoding="utf-8")):
                _LOG.warning("%s loads %s from another host", path.relative_to(app.outdir), address)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer and the check."""
    app.add_html_math_renderer("katex", (_visit_inline, None), (_visit_block, None))
    app.connect("html-page-context", _load_where_needed)
    app.connect("build-finished", _refuse_requests)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
