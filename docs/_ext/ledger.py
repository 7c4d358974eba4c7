"""Directives and roles that read committed results, so that no number of a claim is typed by hand.

- ``{claim} NAME``: a claim's statement, verdict, negative control and numbers, from ``results/ledger/claims.json``.
- ``{verdicts}``: the table of all of them.
- ``{measured}`NAME:KEY:FORMAT```: one number in a sentence, such as ``{measured}`jacobian:max_abs_error:.0e```.

The claim ``robustness`` is a study of its own, read from ``inference/studies/results/robustness.json``; its keys are
``ARM on MEASURE`` (a difference with its interval) or ``ARM in CORRUPTION`` (a loss). ``bench:WORK against OTHER`` is a ratio of
``results/bench/bench.json``. A name, a key or a file that does not exist fails the build.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective, SphinxRole

from probattn.inference.studies.robustness.summary import Summary, judge_study

HERE = Path(__file__).parents[1]
LEDGER = HERE / "results" / "ledger" / "claims.json"
STUDY = HERE.parent / "inference" / "studies" / "results" / "robustness.json"
BENCH = HERE / "results" / "bench" / "bench.json"
WORDS = {
    "supported": "supported",
    "supported_within": "supported within",
    "not_supported": "not supported",
    "not_run": "not run",
}
_LISTED = 12  # numbers that are shown without being asked for


@cache
def claims() -> dict[str, dict[str, Any]]:
    """The committed claims by id, with the study of robustness in its place.

    Example:
        >>> claims()["jacobian"]["verdict"]
        'supported'
    """
    found = {claim["id"]: claim for claim in json.loads(LEDGER.read_text(encoding="utf-8"))["claims"]}
    verdict = judge_study(study())
    statements = {name: words for name, words in verdict.words.items() if "control" not in name}
    found["robustness"] |= {
        "statement": "A language model trained with the log-barrier is more robust to noise on its embeddings, at no "
        "loss of held-out accuracy.",
        "formula": "CE(y) + λ Σ_i b_i against CE(y):  Δ loss(u + δ) < 0,  δ = level · rms(u) · z,  Δ loss(u) < 1 %",
        "verdict": verdict.overall,
        "condition": verdict.condition,
        "words": statements,
        "control": " ".join(words for name, words in verdict.words.items() if "control" in name),
    }
    return found


@cache
def study() -> Summary:
    """The study of robustness: differences of every arm, with intervals."""
    return Summary.from_dict(json.loads(STUDY.read_text(encoding="utf-8"))["summary"])


def measured(target: str) -> str:
    """The number that ``NAME:KEY:FORMAT`` names, in words; the format is Python's, and may be left out.

    Raises:
        KeyError: there is no such number.

    Example:
        >>> measured("stationarity:critical_p1_strict:.4f")
        '0.1480'
    """
    name, key, form = (*target.split(":"), "")[:3]
    if name == "bench":
        work, _, against = key.partition(" against ")
        rows = json.loads(BENCH.read_text(encoding="utf-8"))["rows"]
        return _number(next(row for row in rows if (row["work"], row["against"]) == (work, against))["ratio"], form)
    if name == "robustness":
        arm, between, what = re.split(r" (on|in) (?=clean|absolute|relative|swaps|substitutions)", key)
        if between == "in":
            return _number(study().arms[arm].losses[what], form)
        difference = study().arms[arm].differences[what]
        ends = (_number(end, form) for end in difference.interval())
        return f"{_number(difference.mean, form)} [{', '.join(ends)}]"
    return _number(claims()[name]["measured"][key], form)


def _number(value: float | str, form: str = "") -> str:
    """A number as it is read: 1.9 × 10⁻¹⁴ rather than 1.9e-14, and a true minus."""
    if isinstance(value, str):
        return value
    form = form or (".3g" if value == int(value) or 1e-3 <= abs(value) < 1e5 else ".1e")
    text = f"{value:,.0f}" if form == ".3g" and value == int(value) else f"{value:{form}}"
    digits, exponent, power = text.partition("e")
    if exponent:
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"10{raised}" if float(digits) == 1 else f"{digits} × 10{raised}"
    return text.replace("-", "−")


def _badge(verdict: str) -> str:
    return f'<span class="verdict verdict-{verdict}">{WORDS[verdict]}</span>'


def _plain(text: str) -> str:
    """A sentence of the results, with what Markdown would take for markup escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|$#~^])", r"\\\1", text)


class ClaimDirective(SphinxDirective):
    """The committed result of one claim."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write it as Markdown and read that."""
        self.env.note_dependency(str(LEDGER))
        self.env.note_dependency(str(STUDY))
        claim = claims()[self.arguments[0]]
        lines = [
            f"> {_plain(claim['statement'])}",
            "",
            "```text",
            *re.split(r";\s+|,\s{2,}", claim["formula"]),
            "```",
            "",
            f"**Verdict.** {_badge(claim['verdict'])} ({claim['kind']})",
            "",
        ]
        if claim["condition"]:
            lines += [f"**Where.** {_plain(_sentence(claim['condition']))}", ""]
        lines += [f"- {_plain(_sentence(words))}" for words in claim.get("words", {}).values()]
        label = "Controls" if claim["control"].startswith("Positive") else "Negative control"
        lines += ["", f"**{label}.** {_plain(claim['control'])}", "", *_table(claim)]
        found = self.parse_text_to_nodes("\n".join(lines))
        for part in found:
            if isinstance(part, nodes.literal_block):
                part["classes"].append("formula")  # wraps instead of scrolling
        return found


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _table(claim: dict[str, Any]) -> list[str]:
    """The numbers: those with a bound first, the rest behind a fold where they are many."""
    head = ["| number | measured | may be at most |", "|---|---|---|"]
    bound, rows = claim["bound"], []
    for name, value in sorted(claim["measured"].items(), key=lambda item: item[0] not in bound):
        limit = _number(bound[name]) if name in bound else ""
        rows.append(f"| `{name}` | {_number(value)} | {limit} |")
    if not rows:
        return []
    shown = rows if len(rows) <= _LISTED else rows[: len(bound)] if len(bound) <= _LISTED else rows[:_LISTED]
    lines = [*head, *shown, ""] if shown else []
    if len(shown) < len(rows):
        label = f"{'All' if not shown else 'The other'} {len(rows) - len(shown)} numbers"
        lines += [f'<details class="numbers"><summary>{label}</summary>', "", *head, *rows[len(shown) :], ""]
        lines += ["</details>", ""]
    return lines


class VerdictsDirective(SphinxDirective):
    """One line a claim: its page, its verdict, its statement."""

    def run(self) -> list[nodes.Node]:
        """Write it as Markdown and read that."""
        self.env.note_dependency(str(LEDGER))
        self.env.note_dependency(str(STUDY))
        lines = ["| claim | verdict | statement |", "|---|---|---|"]
        for name, claim in claims().items():
            statement = _plain(claim["statement"])
            lines.append(f"| [`{name}`](/claims/{name}.md) | {_badge(claim['verdict'])} | {statement} |")
        return self.parse_text_to_nodes("\n".join(lines))


class MeasuredRole(SphinxRole):
    """One number of the committed results."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Look it up."""
        for source in (LEDGER, STUDY, BENCH):
            self.env.note_dependency(str(source))
        return [nodes.Text(measured(self.text))], []


def setup(app: Sphinx) -> dict[str, bool]:
    """Register them."""
    directives: dict[str, type[Directive]] = {"claim": ClaimDirective, "verdicts": VerdictsDirective}
    for name, directive in directives.items():
        app.add_directive(name, directive)
    app.add_role("measured", MeasuredRole())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
