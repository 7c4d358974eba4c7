"""Build the explorer as one file: style and scripts inlined, with a policy that lets nothing else run or load."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

__all__ = ["SCRIPTS", "explorer_page", "sentence_data"]

# In the order of their dependencies.
SCRIPTS = (
    "line_mathematics.js",
    "plane_mathematics.js",
    "sequence_mathematics.js",
    "bounded_mathematics.js",
    "state.js",
    "presets.js",
    "draw.js",
    "controls.js",
    "line.js",
    "matrix.js",
    "plane.js",
    "sequence.js",
    "sentence.js",
    "stories.js",
    "main.js",
)


def explorer_page() -> str:
    """Build the page, which can be opened from a file, served or hosted anywhere.

    The content security policy contains the hashes of the one style and the one script, so that a browser runs nothing
    else and sends no request.

    Returns:
        HTML as text, to be encoded as UTF-8.

    Example:
        >>> page = explorer_page()
        >>> page.startswith("<!doctype html>"), "http://" in page.split("<script>")[0]
        (True, False)
    """
    style = _asset("style.css")
    data = json.dumps(sentence_data(), ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    script = "\n".join(['"use strict";', f"const sentenceData = {data};", *map(_asset, SCRIPTS)])
    if "</script" in script or "</style" in style:
        raise AssertionError("an asset closes its own element")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    page = _asset("index.html")
    for mark, content in (("{{policy}}", policy), ("{{style}}", style), ("{{script}}", script)):
        page = page.replace(mark, content, 1)
    return page


def sentence_data() -> dict[str, Any]:
    """Margins of a sentence under a language model, which the page shows.

    They were measured once by ``probattn support``; the record names command, model, digest of the weights, hardware
    and date.

    Returns:
        Plain JSON values, see :func:`probattn.inference.reports.sentence.sentence_record`.

    Example:
        >>> data = sentence_data()
        >>> len(data["tokens"]) == len(data["surprisal"]), data["layers"]
        (True, 30)
    """
    data: dict[str, Any] = json.loads(_asset("sentence.json"))
    return data


def _asset(name: str) -> str:
    return files("probattn.teach.explorer").joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Hash of the text between the tags, in the notation of the policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
