"""Directives and roles that read committed results, so that no number of a claim is typed by hand.

- ``{claim} NAME``: a claim's statement, verdict, findings, control and numbers, from ``results/ledger/claims.json``.
- ``{verdicts}``: the table of all claims.
- ``{verdict}`NAME```: the verdict of one claim in words, in a sentence.
- ``{measured}`NAME:KEY:FORMAT```: one number in a sentence, such as ``{measured}`jacobian:max_abs_error:.0e```.

The claim ``robustness`` is a study of its own, read from ``inference/studies/results/robustness.json``; its keys are
``ARM on MEASURE`` (a difference with its interval) or ``ARM in CORRUPTION`` (a loss); ``robustness-earlier`` is the
study before it, on another text. ``bench:WORK against OTHER`` is a
ratio of ``results/bench/bench.json``. A name, a key or a file that does not exist fails the build.
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

from probattn.inference.claims.claim import verdict_in_words
from probattn.inference.claims.robustness import FORMULA, words_of_verdict
from probattn.inference.studies.robustness.summary import Summary
from probattn.inference.studies.robustness.verdict import judge_study

HERE = Path(__file__).parents[1]
LEDGER = HERE / "results" / "ledger" / "claims.json"
STUDY = HERE.parent / "inference" / "studies" / "results" / "robustness.json"
EARLIER = HERE / "results" / "robustness" / "earlier.json"
BENCH = HERE / "results" / "bench" / "bench.json"
_LISTED = 12  # largest number of rows that are shown without a fold


@cache
def claims() -> dict[str, dict[str, Any]]:
    """Read the committed claims by id, with the whole study of robustness in the place of its quick form.

    Example:
        >>> verdict_in_words(claims()["jacobian"])
        'holds'
    """
    found = {claim["id"]: claim for claim in json.loads(LEDGER.read_text(encoding="utf-8"))["claims"]}
    verdict = judge_study(study())
    statements = {name: words for name, words in verdict.words.items() if "control" not in name}
    found["robustness"] |= {
        "statement": "A language model trained with the log-barrier is more robust to noise on its embeddings, at no "
        "loss of held-out accuracy.",
        "formula": FORMULA,
        "verdict": verdict.overall,
        **words_of_verdict(verdict),
        "words": statements,
        "control": " ".join(words for name, words in verdict.words.items() if "control" in name),
    }
    return found


@cache
def study(path: Path = STUDY) -> Summary:
    """Read a study of robustness: differences of every arm, with intervals."""
    return Summary.from_dict(json.loads(path.read_text(encoding="utf-8"))["summary"])


def measured(target: str) -> str:
    """Look up the number that ``NAME:KEY:FORMAT`` names and put it into words.

    Args:
        target: id of the claim, name of the number, and a format of Python's, which may be omitted.

    Returns:
        The number as it reads in a sentence.

    Raises:
        KeyError: a number that does not exist.

    Example:
        >>> measured("jacobian:above_diagonal")  # exactly, by causality
        '0'
    """
    name, key, form = (*target.split(":"), "")[:3]
    if name == "bench":
        work, _, against = key.partition(" against ")
        rows = json.loads(BENCH.read_text(encoding="utf-8"))["rows"]
        return _number(next(row for row in rows if (row["work"], row["against"]) == (work, against))["ratio"], form)
    if name in ("robustness", "robustness-earlier"):
        found = study(STUDY if name == "robustness" else EARLIER)
        arm, between, what = re.split(r" (on|in) (?=[a-z]+(?: [a-z]+)*(?: [0-9.]+)?$)", key)
        if between == "in":
            return _number(found.arms[arm].losses[what], form)
        difference = found.arms[arm].differences[what]
        ends = (_number(end, form) for end in difference.interval())
        return f"{_number(difference.mean, form)} [{', '.join(ends)}]"
    return _number(claims()[name]["measured"][key], form)


def _number(value: float | str, form: str = "") -> str:
    """Write a number as people do: 1.9 × 10⁻¹⁴ instead of 1.9e-14, and a true minus sign."""
    if isinstance(value, str):  # a number that JSON does not have
        return {"inf": "∞", "-inf": "−∞"}.get(value, value)
    form = form or (".3g" if value == int(value) or 1e-3 <= abs(value) < 1e5 else ".1e")
    text = f"{value:,.0f}" if form == ".3g" and value == int(value) else f"{value:{form}}"
    digits, exponent, power = text.partition("e")
    if exponent:
        raised = str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        text = f"10{raised}" if float(digits) == 1 else f"{digits} × 10{raised}"
    return text.replace("-", "−")


def _badge(claim: dict[str, Any]) -> str:
    return f'<span class="verdict verdict-{claim["verdict"]}">{_plain(verdict_in_words(claim))}</span>'


def _plain(text: str) -> str:
    """Escape everything in a sentence that Markdown would take for markup."""
    return re.sub(r"([\\`*_{}\[\]<>|$#~^])", r"\\\1", text)


class ClaimDirective(SphinxDirective):
    """The committed result of one claim."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the claim as Markdown and parse that."""
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
            f"**Verdict.** {_badge(claim)} ({claim['kind']})",
            "",
        ]
        if claim["finding"]:
            lines += [_plain(claim["finding"]), ""]
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
    """List the numbers, those with a bound first; if they are many, the rest is folded away."""
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
    """One line per claim: its page, its verdict, its statement."""

    def run(self) -> list[nodes.Node]:
        """Write the table as Markdown and parse that."""
        self.env.note_dependency(str(LEDGER))
        self.env.note_dependency(str(STUDY))
        lines = ["| claim | verdict | statement |", "|---|---|---|"]
        for name, claim in claims().items():
            statement = _plain(claim["statement"])
            lines.append(f"| [`{name}`](/claims/{name}.md) | {_badge(claim)} | {statement} |")
        return self.parse_text_to_nodes("\n".join(lines))


class MeasuredRole(SphinxRole):
    """One number of the committed results."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Look the number up."""
        for source in (LEDGER, STUDY, BENCH):
            self.env.note_dependency(str(source))
        return [nodes.Text(measured(self.text))], []


class VerdictRole(SphinxRole):
    """The verdict of one claim in words."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Look the verdict up."""
        for source in (LEDGER, STUDY):
            self.env.note_dependency(str(source))
        return [nodes.Text(verdict_in_words(claims()[self.text]))], []


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the role."""
    directives: dict[str, type[Directive]] = {"claim": ClaimDirective, "verdicts": VerdictsDirective}
    for name, directive in directives.items():
        app.add_directive(name, directive)
    app.add_role("measured", MeasuredRole())
    app.add_role("verdict", VerdictRole())
    return {"parallel_read_safe": True, "parallel_write_safe": True}
