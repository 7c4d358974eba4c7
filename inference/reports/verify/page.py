"""The page of the verification report, from claims, pictures and the fitted model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from probattn.barrier import stability_margin
from probattn.folds.regime import regime
from probattn.inference.claims.claim import Claim, Subject, verdict_in_words
from probattn.inference.reports.verify.pictures import Picture
from probattn.inference.reports.verify.summary import (
    OPTION_WORDS,
    VERDICTS,
    claim_title,
    decided,
    in_order,
    kind_in_words,
    numbers_in_words,
    summary,
)
from probattn.inference.reports.verify.text import LEVELS, SUPPORT, colour_rules, coloured_rows
from probattn.models.corpus import Corpus

__all__ = ["render_report"]

_WINDOWS = 12
_INDEX = re.compile(r"(?<![^\W_])([^\W\d_]|[∏∑Σ])_(?:\{([^{}]*)\}|(&lt;\w|\w+))")  # one letter, as in u_i and σ_min
_POWER = re.compile(r"\^\{([^{}]*)\}")


def render_report(
    subject: Subject,
    corpus: Corpus,
    claims: Sequence[Claim],
    images: Mapping[str, Picture],
    config: Mapping[str, Any],
    history: Mapping[str, Sequence[float]],
) -> str:
    """Render the report as HTML; the template engine escapes every text.

    Args:
        subject: the fitted model and held-out text.
        corpus: the text, for its name and vocabulary.
        claims: the claims in the order of measurement.
        images: pictures by file name, from :func:`~probattn.inference.reports.verify.save_figures`; those of a claim
            are named "claim-NAME".
        config: contents of ``config.json``.
        history: metrics of the fit at each evaluation, by name.

    Returns:
        A page that needs no other file.
    """
    attention = subject.attention
    u = subject.tokens(min(_WINDOWS, len(subject.inputs)))
    windows = [[corpus.vocabulary[index] for index in window.tolist()] for window in subject.inputs[: len(u)]]
    rows, nearest, counts = coloured_rows(windows, stability_margin(attention, u).numpy())
    found = regime(attention, u)
    named = found if isinstance(found, list) else [found]
    regimes = Counter(str(one) for one in named)
    shown, folded = in_order(claims)
    last = {name: values[-1] for name, values in history.items()}
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("probattn.inference.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["formula"] = _formula
    return environment.get_template("verify.html").render(
        sentences=summary(claims, corpus.name, len(rows), len(rows[0]), regimes, nearest, last),
        shown=[_entry(claim) for claim in shown],
        folded=[_entry(claim) for claim in folded],
        verdicts=VERDICTS,
        images=images,
        config=config,
        options=[(OPTION_WORDS.get(name, name.replace("_", " ")), value) for name, value in config["model"].items()],
        corpus=corpus.name,
        rows=rows,
        nearest=nearest,
        counts=counts,
        support=SUPPORT,
        levels=LEVELS,
        light=colour_rules(dark=False),
        dark=colour_rules(dark=True),
        evidence=getattr(named[0], "evidence", ""),
        first={name: values[0] for name, values in history.items()},
        last=last,
    )


def _formula(text: str) -> Markup:
    """Escape a text, and set the indices of its symbols below the line and powers above it."""
    lowered = _INDEX.sub(lambda found: f"{found[1]}<sub>{found[2] or found[3]}</sub>", str(escape(text)))
    return Markup(_POWER.sub(r"<sup>\1</sup>", lowered))


def _entry(claim: Claim) -> dict[str, Any]:
    return {
        "id": claim.id,
        "title": claim_title(claim.id),
        "statement": claim.statement,
        "formula": claim.formula,
        "kind": claim.kind,
        "meaning": kind_in_words(claim.kind),
        "verdict": claim.verdict,
        "words": verdict_in_words(claim),
        "decided": decided(claim),
        "numbers": numbers_in_words(claim),
        "control": claim.control,
        "finding": claim.finding,
        "figures": list(claim.figures),
        "seconds": claim.seconds,
        "measured": bool(claim.measured),
    }
