"""Tables of a finished study, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES, label
from probattn.inference.studies.robustness.evaluation import MEASURES, SMALL_NOISE
from probattn.inference.studies.robustness.gains import Gains, rank_correlations
from probattn.inference.studies.robustness.obfuscation import ATTACKS, Attacked
from probattn.inference.studies.robustness.rules import DECISIVE, PLAIN, RELEVANT, STATEMENTS, TOLERATED
from probattn.inference.studies.robustness.study import QUANTILES, Record
from probattn.inference.studies.robustness.summary import ArmSummary, Difference, Summary
from probattn.inference.studies.robustness.verdict import Verdict

__all__ = ["escape", "render_table"]

_OVERALL = {
    "supported": "holds",
    "supported_within": "holds if the corruption is {}",
    "not_supported": "does not hold",
    "not_run": "nothing can be said",
}


def render_table(
    summary: Summary,
    verdict: Verdict,
    records: Sequence[Record],
    arms: Sequence[Arm],
    study: Study,
    corpus: str,
    environment: Mapping[str, Any],
    figures: Sequence[str] = (),
    attacked: Sequence[Attacked] = (),
    gains: Sequence[Gains] = (),
) -> str:
    """Write the whole result as Markdown; text from outside the package is escaped.

    Args:
        summary: summary of the study.
        verdict: its verdict.
        records: records of the runs.
        arms: arms of the study.
        study: sizes of the study.
        corpus: name of the text.
        environment: machine and versions, see :func:`~probattn.inference.runtime.environment.describe`.
        figures: names of the figures to link, without suffix.
        attacked: what stronger attacks found.
        gains: gains of the layers' two maps.

    Returns:
        Markdown.
    """
    lines = [
        "# Is training with the log-barrier more robust?",
        "",
        f"**Verdict: {_OVERALL[verdict.overall].format(verdict.corruptions)}.**",
    ]
    if verdict.condition:
        lines += ["", escape(_capital(verdict.condition).rstrip(".") + ".")]
    lines += ["", *(f"- {escape(_capital(words))}" for words in verdict.words.values()), ""]
    lines += _method(summary, records, study, corpus, environment)
    for name in figures:
        lines += [f"![{name}]({name}.png)", ""]
    lines += ["## Differences to plain training", ""]
    lines += _table(
        ("arm", "seeds", CLEAN, *FAMILIES, "shows, by itself", "shows, adjusted", "diverged"),
        [_family_row(arm, summary) for arm in summary.arms.values()],
    )
    lines += _second_comparisons(summary)
    lines += ["", "## Stronger attacks", ""]
    lines += _obfuscation(attacked)
    lines += [
        "",
        "## Why: sensitivity, bias and first order",
        "",
        f"Under normal noise of {SMALL_NOISE:g} of the embeddings' root mean square, in bits per character: the bias "
        "is the mean change of a window's loss, which is the harm; the first-order term has mean zero, and its "
        "standard deviation is given. The sensitivity is the share of later predictions that one replaced character "
        "changes.",
        "",
    ]
    lines += _table(
        ("arm", *MEASURES, *(f"{name}, difference" for name in MEASURES)),
        [_measure_row(arm) for arm in summary.arms.values() if arm.losses],
    )
    lines += _gains(summary, gains)
    lines += ["", "## Margins on the residual stream before and after training, and the costs", ""]
    quantiles = ", ".join(f"{q:.0%}" for q in QUANTILES)
    lines += _table(
        (
            "arm",
            "rms of u",
            "norm of the parameters",
            "det < 0",
            f"det: {quantiles}",
            f"σ_min: {quantiles}",
            "stage det < 0",
            "stage σ_min",
            "seconds of training",
        ),
        [*_before_row(summary), *(_fact_row(arm) for arm in summary.arms.values() if arm.facts)],
    )
    levels = [label(family, level) for family, levels in FAMILIES.items() for level in levels]
    lines += ["", "## Losses in bits per character", ""]
    lines += _table(
        ("arm", CLEAN, *levels),
        [
            (arm.arm, *(f"{arm.losses[name]:.4f}" for name in (CLEAN, *levels)))
            for arm in summary.arms.values()
            if arm.losses
        ],
    )
    lines += ["", "## Differences by level", ""]
    lines += _table(
        ("arm", *levels),
        [(arm.arm, *_written(arm.differences, levels)) for arm in summary.arms.values() if arm.differences],
    )
    lines += ["", "## The arms", ""]
    lines += _table(("arm", "settings", "why"), [(arm.name, _settings(arm), arm.reason) for arm in arms])
    return "\n".join(lines) + "\n"


def escape(text: str) -> str:
    """Escape text so that Markdown shows it as it is, within a table too.

    Args:
        text: any text.
    """
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def _method(
    summary: Summary, records: Sequence[Record], study: Study, corpus: str, environment: Mapping[str, Any]
) -> list[str]:
    diverged = sum(record.diverged is not None for record in records)
    return [
        "## How it was measured",
        "",
        f"{len(records)} runs of a character GPT ({study.layers} layers, {study.heads} heads, dimension {study.dim}, "
        f"context {study.context}, {study.steps} steps of {study.batch} windows) on {escape(corpus)}; seeds "
        f"{', '.join(map(str, summary.seeds))}{_missing(summary)}; {diverged} runs diverged. Every "
        f"arm of a seed starts from the same values, sees the same batches, and is tried on the same {study.windows} "
        "held-out windows at most with the "
        "same corruptions. Noise and attacks on embeddings are given as a share of the embeddings' root mean square or "
        "of each one's norm (absolute noise: as it is), swaps, substitutions, typing errors and deletions as a share "
        "of the characters, the attack on characters as their number per window.",
        "",
        "Differences are to plain training unless another arm is named, paired by seed and window, in bits per "
        "character; negative is better. The half-width of a 95 % interval follows ±: bootstrap of seeds and windows, "
        'Student\'s t with one degree of freedom less than seeds. "Adjusted" intervals hold for the '
        f"{len(summary.barriers)} barrier arms at once. No loss of accuracy: the upper end of the clean difference "
        f"lies below {TOLERATED:.0%} of the clean loss of plain training. More robust: the upper end lies below 0, and "
        f"the gain is at least {RELEVANT:.0%} of what the corruption costs plain training. These limits, and that "
        f"{' and '.join(DECISIVE)} decide, were fixed before the first run.",
        "",
        f"Command: `{str(environment['command']).replace('`', ' ')}`. {environment['date']}, "
        f"{environment['processor']}, {environment['cores']} cores, device {environment['device']}, "
        f"Python {environment['python']}, torch {environment['versions']['torch']}.",
        "",
    ]


def _missing(summary: Summary) -> str:
    """Say which arms lack a seed."""
    short = [f"{arm.arm}: {arm.runs}" for arm in summary.arms.values() if arm.runs < len(summary.seeds)]
    return f" (fewer seeds so far for {escape(', '.join(short))})" if short else ""


def _second_comparisons(summary: Summary) -> list[str]:
    names = (CLEAN, *FAMILIES)
    lines = ["", "## At equal clean loss", ""]
    matched = [arm for arm in summary.arms.values() if arm.equal_loss]
    lines += [
        "Differences to plain training at the arm's own clean loss, interpolated between runs of half, once and twice "
        "the steps; arms whose clean loss lies outside that range at some seed are left out.",
        "",
    ]
    if matched:
        lines += _table(("arm", *FAMILIES), [(arm.arm, *_written(arm.equal_loss, FAMILIES)) for arm in matched])
    else:
        lines += [
            "No arm can be compared so yet: that takes two seeds of plain training of half and of twice the steps."
        ]
    longer = [arm for arm in summary.arms.values() if arm.equal_compute]
    lines += ["", "## At equal compute", "", "Differences to plain training of twice the steps.", ""]
    if longer:
        lines += _table(
            ("arm", "seconds of training", *names),
            [
                (arm.arm, f"{arm.facts.get('training_seconds', 0.0):.0f}", *_written(arm.equal_compute, names))
                for arm in longer
            ],
        )
    else:
        lines += ["No arm can be compared so yet: that takes two seeds of plain training of twice the steps."]
    return lines


def _obfuscation(attacked: Sequence[Attacked]) -> list[str]:
    plain = next((found for found in attacked if found.arm == PLAIN), None)
    if plain is None:
        return ["No models were kept to attack."]
    count = len(plain.seeds)
    hidden = [found.arm for found in attacked if found.suspicious]
    lines = [
        f"Bits per character on 32 windows, averaged over the {count} seeds that all arms have, under the strongest "
        "level of the study's two attacks, the first with three times the steps and from three random starts, the "
        "second with the texts that were made for the model of another seed. A text of another seed that misleads "
        "more than the arm's own would be a sign of hidden gradients: "
        f"{escape(', '.join(hidden)) if hidden else 'none does'}. The last column is the share of the gain over plain "
        "training that the strongest of the three attacks on embeddings leaves.",
        "",
    ]
    rows = []
    for found in attacked:
        left = found.left(plain)
        losses = [f"{found.losses[name]:.3f}" if name in found.losses else "–" for name in (CLEAN, *ATTACKS)]
        rows.append((found.arm, *losses, f"{left:.0%}" if left == left else "no gain"))
    return lines + _table(("arm", CLEAN, *ATTACKS, "gain left"), rows)


def _gains(summary: Summary, gains: Sequence[Gains]) -> list[str]:
    if not gains:
        return []
    lines = [
        "",
        "## Why: the map that is guarded and the map that is applied",
        "",
        "The barrier guards I − M, the network applies I + M. Medians over tokens and layers of the residual stream, "
        "averaged over seeds; the cost is the loss under the noise or attack, averaged over its levels, minus the "
        "clean loss of the same arm.",
        "",
    ]
    costs = {family: _costs(summary, family) for family in DECISIVE}
    head = (
        "arm",
        "σ_min(I − M)",
        "1 / σ_min(I − M)",
        "σ_max(I + M)",
        "rms σ(I + M)",
        *(f"cost: {f}" for f in DECISIVE),
    )
    rows = [
        (found.arm, *(f"{value:.3f}" for value in found[1:]), *(f"{costs[f][found.arm]:.3f}" for f in DECISIVE))
        for found in gains
        if all(found.arm in cost for cost in costs.values())
    ]
    lines += _table(head, rows)
    for family in DECISIVE:
        ranked = rank_correlations(gains, costs[family])
        words = (f"{ranked[name]:+.2f} for {sign}" for name, sign in zip(Gains._fields[1:], head[1:5], strict=True))
        lines += ["", f"Rank correlation over arms with the cost of {family}: {escape(', '.join(words))}."]
    return lines


def _costs(summary: Summary, family: str) -> dict[str, float]:
    names = [label(family, level) for level in FAMILIES[family]]
    return {
        arm.arm: sum(arm.losses[name] for name in names) / len(names) - arm.losses[CLEAN]
        for arm in summary.arms.values()
        if arm.losses
    }


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line([escape(cell) for cell in row]) for row in rows)]


def _written(found: Mapping[str, Difference], names: Sequence[str] | Mapping[str, Any]) -> list[str]:
    return [f"{found[name].mean:+.3f} ± {found[name].interval()[1] - found[name].mean:.3f}" for name in names]


def _family_row(arm: ArmSummary, summary: Summary) -> tuple[str, ...]:
    diverged = ", ".join(f"seed {seed} at step {step}" for seed, step in arm.diverged.items()) or "none"
    seeds = str(arm.runs)
    name = arm.arm if arm.reference in (PLAIN, arm.arm) else f"{arm.arm} (compared with {arm.reference})"
    if not arm.differences:
        return (name, seeds, *("–",) * (len(FAMILIES) + 3), diverged)
    plain = summary.arms[PLAIN].losses

    def shows(count: int) -> str:
        return ", ".join(name for name in STATEMENTS if arm.holds(name, plain, count)) or "nothing"

    adjusted = shows(len(summary.barriers)) if arm.barrier else "–"
    return (name, seeds, *_written(arm.differences, (CLEAN, *FAMILIES)), shows(1), adjusted, diverged)


def _measure_row(arm: ArmSummary) -> tuple[str, ...]:
    differences = _written(arm.differences, MEASURES) if arm.differences else ["–"] * len(MEASURES)
    return (arm.arm, *(f"{arm.losses[name]:.3f}" for name in MEASURES), *differences)


def _listed(facts: Mapping[str, float], name: str) -> str:
    if f"{name}_0" not in facts:
        return "–"
    values = (facts[f"{name}_{q:g}"] for q in QUANTILES)
    return ", ".join(f"{value:.3f}" if abs(value) < 1e4 else f"{value:.1e}" for value in values)


def _before_row(summary: Summary) -> list[tuple[str, ...]]:
    facts = summary.arms[PLAIN].facts
    if "before_determinant_0" not in facts:
        return []
    margins = (_listed(facts, f"before_{kind}") for kind in ("determinant", "singular_value"))
    return [("before training", "–", "–", f"{facts['before_determinant_negative']:.2%}", *margins, "–", "–", "–")]


def _fact_row(arm: ArmSummary) -> tuple[str, ...]:
    facts = arm.facts
    stage = "stage_determinant_negative"
    return (
        arm.arm,
        f"{facts['rms']:.3f}",
        f"{facts['parameter_norm']:.1f}",
        f"{facts['residual_determinant_negative']:.2%}",
        _listed(facts, "residual_determinant"),
        _listed(facts, "residual_singular_value"),
        f"{facts[stage]:.2%}" if stage in facts else "–",
        _listed(facts, "stage_singular_value"),
        f"{facts['training_seconds']:.0f}",
    )


def _settings(arm: Arm) -> str:
    usual = Arm("usual").as_dict()
    changed = {name: value for name, value in arm.as_dict().items() if name != "name" and value != usual[name]}
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "–"
