"""Table and figures of a finished study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from probattn import plotting
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import write_figure, write_text
from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES, label
from probattn.inference.studies.robustness.study import QUANTILES, Record
from probattn.inference.studies.robustness.summary import (
    LITERAL,
    LITERAL_AT_PLAIN_SCALE,
    PLAIN,
    POSITIVE,
    RELEVANT,
    STATEMENTS,
    TOLERATED,
    ArmSummary,
    Summary,
    Verdict,
    in_words,
)

__all__ = ["draw_study", "render_table", "write_results"]

# The arms of the curves, besides the best barrier arm under each kind of noise.
_CURVES = (PLAIN, "weight decay 0.1", POSITIVE, "NEFTune 5", LITERAL, LITERAL_AT_PLAIN_SCALE)
_OVERALL = {
    "supported": "supported",
    "supported_within": "supported within limits",
    "not_supported": "not supported",
    "not_run": "nothing can be said",
}


def write_results(
    folder: Path,
    summary: Summary,
    verdict: Verdict,
    *,
    records: Sequence[Record],
    arms: Sequence[Arm],
    study: Study,
    corpus: str,
    device: torch.device | None = None,
) -> Path:
    """Write ``robustness.md`` and its figures.

    Args:
        folder: output folder.
        summary: summary of the study.
        verdict: its verdict.
        records: records of the runs.
        arms: arms of the study.
        study: sizes of the study.
        corpus: name of the text.
        device: device on which it ran; None for the CPU.

    Returns:
        Path of the table.
    """
    environment = describe(device or torch.device("cpu"), torch.float32, study.seeds[0])
    figures = draw_study(summary)
    for name, figure in figures.items():
        write_figure(folder / f"{name}.png", figure)
    path = folder / "robustness.md"
    write_text(path, render_table(summary, verdict, records, arms, study, corpus, environment, list(figures)))
    return path


def render_table(
    summary: Summary,
    verdict: Verdict,
    records: Sequence[Record],
    arms: Sequence[Arm],
    study: Study,
    corpus: str,
    environment: Mapping[str, Any],
    figures: Sequence[str] = (),
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

    Returns:
        Markdown.
    """
    count = len(summary.barriers)
    lines = ["# Is training with the log-barrier more robust?", "", f"**Verdict: {_OVERALL[verdict.overall]}.**"]
    if verdict.condition:
        lines += ["", escape(_capital(verdict.condition).rstrip(".") + ".")]
    lines += ["", *(f"- {escape(_capital(words))}" for words in verdict.words.values()), ""]
    lines += [
        "## How it was measured",
        "",
        f"{len(records)} runs of a character GPT ({study.layers} layers, {study.heads} heads, dimension {study.dim}, "
        f"context {study.context}, {study.steps} steps of {study.batch} windows) on {escape(corpus)}; seeds "
        f"{', '.join(map(str, study.seeds))}. Every arm of a seed starts from the same values, sees the same batches, "
        f"and is tried on the same {study.windows} held-out windows at most with the same corruptions. Characters are "
        "replaced by others in proportion to their frequency in the training text.",
        "",
        "Differences are to the arm named, paired by seed and window, in bits per character; negative is better. 95 % "
        "intervals: bootstrap of seeds and windows, Student's t with one degree of freedom less than seeds. "
        f'"Adjusted" intervals hold for the {count} barrier arms at once. No loss of accuracy: the upper end of the '
        f"clean difference lies below {TOLERATED:.0%} of the clean loss of plain training. More robust: the upper end "
        f"lies below 0, and the gain is at least {RELEVANT:.0%} of what the corruption costs plain training.",
        "",
        f"Command: `{str(environment['command']).replace('`', ' ')}`. {environment['date']}, "
        f"{environment['processor']}, {environment['cores']} cores, device {environment['device']}, "
        f"Python {environment['python']}, torch {environment['versions']['torch']}.",
        "",
        "## Differences by family",
        "",
    ]
    lines += _table(
        ("arm", "compared with", "clean", *FAMILIES, "shows, by itself", "shows, adjusted", "diverged"),
        [_family_row(arm, summary) for arm in summary.arms.values()],
    )
    lines += ["", "## Differences by level", ""]
    levels = [label(family, level) for family, levels in FAMILIES.items() for level in levels]
    compared = [arm for arm in summary.arms.values() if arm.differences]
    lines += _table(
        ("arm", *levels), [(arm.arm, *(in_words(arm.differences[name]) for name in levels)) for arm in compared]
    )
    lines += ["", "## Losses in bits per character", ""]
    lines += _table(
        ("arm", CLEAN, *levels),
        [
            (arm.arm, *(f"{arm.losses[name]:.4f}" for name in (CLEAN, *levels)))
            for arm in summary.arms.values()
            if arm.losses
        ],
    )
    lines += ["", "## Norms and margins of the model's own layers, and of the stage where there is one", ""]
    lines += _table(
        (
            "arm",
            "rms of u",
            "norm of the parameters",
            "det < 0",
            "det: " + ", ".join(f"{q:.0%}" for q in QUANTILES),
            "σ_min: " + ", ".join(f"{q:.0%}" for q in QUANTILES),
            "stage det < 0",
            "stage σ_min",
            "seconds",
        ),
        [_fact_row(arm) for arm in summary.arms.values() if arm.facts],
    )
    lines += ["", "## The arms", ""]
    lines += _table(("arm", "settings", "why"), [(arm.name, _settings(arm), arm.reason) for arm in arms])
    for name in figures:
        lines += ["", f"![{name}]({name}.png)"]
    return "\n".join(lines) + "\n"


def draw_study(summary: Summary) -> dict[str, Figure]:
    """Draw the figures of a study.

    Args:
        summary: summary of the study.

    Returns:
        Differences, losses against noise, and norms with margins, by file name without suffix.
    """
    clean = summary.arms[PLAIN].losses[CLEAN] if summary.arms[PLAIN].losses else 0.0
    compared = [arm for arm in summary.arms.values() if arm.differences]
    figures = {}
    if compared:
        panels = {}
        for name in (CLEAN, *FAMILIES):
            ends = np.array([(arm.differences[name].mean, *arm.differences[name].interval()) for arm in compared])
            panels[name] = (ends[:, 0], ends[:, 1], ends[:, 2])
        limits = {CLEAN: TOLERATED * clean}
        figures["robustness-differences"] = plotting.plot_arm_differences([arm.arm for arm in compared], panels, limits)
    shown = [name for name in _CURVES if name in summary.arms and summary.arms[name].losses]
    for family in ("absolute noise", "relative noise"):
        ranked = sorted(
            (arm for arm in summary.barriers if arm.differences), key=lambda arm: arm.differences[family].mean
        )
        shown += [arm.arm for arm in ranked[:1] if arm.arm not in shown]
    if shown:
        curves = {}
        for family in ("absolute noise", "relative noise"):
            names = (CLEAN, *(label(family, level) for level in FAMILIES[family]))
            losses = {arm: np.array([summary.arms[arm].losses[name] for name in names]) for arm in shown}
            curves[family] = (np.array([0.0, *FAMILIES[family]]), losses)
        figures["robustness-noise"] = plotting.plot_loss_curves(curves)
    known = [arm for arm in summary.arms.values() if arm.facts]
    if known:
        titles = {"determinant": "det J of the layers", "singular_value": "smallest singular value of J"}
        margins = {
            title: {arm.arm: np.array(_quantiles(arm, f"residual_{kind}")) for arm in known}
            for kind, title in titles.items()
        }
        paths = {arm.arm: np.array(arm.path) for arm in known}
        figures["robustness-norms"] = plotting.plot_norms_and_margins(paths, margins)
    return figures


def escape(text: str) -> str:
    """Escape text so that Markdown shows it as it is, within a table too.

    Args:
        text: any text.
    """
    for sign in "\\`*_[]<>|#":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("\n", " ")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    return [line(head), line(["---"] * len(head)), *(line([escape(cell) for cell in row]) for row in rows)]


def _family_row(arm: ArmSummary, summary: Summary) -> tuple[str, ...]:
    diverged = ", ".join(f"seed {seed} at step {step}" for seed, step in arm.diverged.items()) or "none"
    if not arm.differences:
        return (arm.arm, *("–",) * (len(FAMILIES) + 4), diverged)
    plain = summary.arms[PLAIN].losses

    def shows(count: int) -> str:
        return ", ".join(name for name in STATEMENTS if arm.holds(name, plain, count)) or "nothing"

    adjusted = shows(len(summary.barriers)) if arm.barrier else "–"
    numbers = (in_words(arm.differences[name]) for name in (CLEAN, *FAMILIES))
    return (arm.arm, arm.reference, *numbers, shows(1), adjusted, diverged)


def _fact_row(arm: ArmSummary) -> tuple[str, ...]:
    facts = arm.facts

    def listed(name: str) -> str:
        return ", ".join(f"{value:.3f}" for value in _quantiles(arm, name)) if f"{name}_0" in facts else "–"

    stage = "stage_determinant_negative"
    return (
        arm.arm,
        f"{facts['rms']:.4f}",
        f"{facts['parameter_norm']:.2f}",
        f"{facts['residual_determinant_negative']:.2%}",
        listed("residual_determinant"),
        listed("residual_singular_value"),
        f"{facts[stage]:.2%}" if stage in facts else "–",
        listed("stage_singular_value"),
        f"{facts['seconds']:.0f}",
    )


def _quantiles(arm: ArmSummary, name: str) -> list[float]:
    return [arm.facts[f"{name}_{q:g}"] for q in QUANTILES]


def _settings(arm: Arm) -> str:
    usual = Arm("usual").as_dict()
    changed = {name: value for name, value in arm.as_dict().items() if name != "name" and value != usual.get(name)}
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "–"
