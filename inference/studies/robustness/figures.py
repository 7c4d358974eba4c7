"""Figures of the study: one question per panel, at most six arms in each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from probattn import plotting
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES, label
from probattn.inference.studies.robustness.rules import LITERAL, PLAIN, POSITIVE, POSITIVE_ATTACK, TOLERATED
from probattn.inference.studies.robustness.study import QUANTILES
from probattn.inference.studies.robustness.summary import ArmSummary, Summary

__all__ = ["draw_study"]

_MAIN = (
    "residual logdet 0.05",
    "residual one_sided 0.05",
    "residual singular_value 0.05",
    LITERAL,
    POSITIVE,
    POSITIVE_ATTACK,
)
_CURVES = (PLAIN, POSITIVE, POSITIVE_ATTACK, "residual logdet 0.05", "residual one_sided 0.05", LITERAL)
_MOST = 6  # arms in a panel
_QUESTIONS = (CLEAN, "relative noise", "embedding attack", "character attack")
_CHARACTERS = ("swaps", "substitutions", "typos", "deletions")
_GRADED = ("relative noise", "embedding attack", "character attack")


def draw_study(summary: Summary) -> dict[str, Figure]:
    """Draw the figures of a study.

    Args:
        summary: summary of the study.

    Returns:
        Figures by file name without suffix: the main questions for six arms, the corruptions of characters for the
        same, losses against strength, margins, and the main questions for the rest.
    """
    compared = {name: arm for name, arm in summary.arms.items() if arm.differences}
    main = [name for name in _MAIN if name in compared] or list(compared)[:_MOST]
    figures = {}
    if main:
        figures["robustness-questions"] = _differences(summary, main, _QUESTIONS)
        figures["robustness-characters"] = _differences(summary, main, _CHARACTERS)
    shown = [name for name in _CURVES if name in summary.arms and summary.arms[name].losses]
    if shown:
        figures["robustness-strength"] = _curves(summary, shown)
    known = [name for name in (PLAIN, *main) if name in summary.arms and summary.arms[name].facts][:_MOST]
    if known:
        figures["robustness-margins"] = _margins(summary, known)
    rest = sorted((name for name in compared if name not in main), key=lambda name: not compared[name].barrier)
    for number in range(0, len(rest), _MOST):
        name = f"robustness-others-{number // _MOST + 1}"
        figures[name] = _differences(summary, rest[number : number + _MOST], _QUESTIONS)
    return figures


def _differences(summary: Summary, arms: Sequence[str], measures: Sequence[str]) -> Figure:
    panels = {}
    for name in measures:
        found = [summary.arms[arm].differences[name] for arm in arms]
        ends = np.array([(one.mean, *one.interval()) for one in found])
        panels[name] = (ends[:, 0], ends[:, 1], ends[:, 2])
    losses = summary.arms[PLAIN].losses
    limits = {CLEAN: TOLERATED * losses[CLEAN]} if CLEAN in measures and losses else {}
    return plotting.plot_arm_differences(list(arms), panels, limits)


def _curves(summary: Summary, arms: Sequence[str]) -> Figure:
    curves = {}
    for family in _GRADED:
        names = (CLEAN, *(label(family, level) for level in FAMILIES[family]))
        losses = {arm: np.array([summary.arms[arm].losses[name] for name in names]) for arm in arms}
        curves[family] = (np.array([0.0, *FAMILIES[family]]), losses)
    return plotting.plot_loss_curves(curves)


def _margins(summary: Summary, arms: Sequence[str]) -> Figure:
    titles = {"determinant": "det J of the layers", "singular_value": "smallest singular value of J"}
    margins = {
        title: {arm: np.array(_quantiles(summary.arms[arm], f"residual_{kind}")) for arm in arms}
        for kind, title in titles.items()
    }
    before = {title: summary.arms[arms[0]].facts.get(f"before_{kind}_0.5") for kind, title in titles.items()}
    marks = {title: value for title, value in before.items() if value is not None}
    paths = {arm: np.array(summary.arms[arm].path) for arm in arms}
    return plotting.plot_norms_and_margins(paths, margins, marks)


def _quantiles(arm: ArmSummary, name: str) -> list[float]:
    return [arm.facts[f"{name}_{q:g}"] for q in QUANTILES]
