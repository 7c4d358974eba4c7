"""Claim: a language model trained with the log-barrier is more robust to noise, at no loss of held-out accuracy.

A penalty that makes the embeddings larger makes noise of a fixed size smaller beside them. What decides is therefore
noise in proportion to the embeddings, random or the worst there is; a gain under other corruptions alone becomes a
condition of the verdict. The rules are those of :mod:`~probattn.inference.studies.robustness.rules`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from probattn.inference.claims.claim import Claim, Settings, Subject
from probattn.inference.runtime.environment import select_device
from probattn.inference.studies.robustness.arms import ARMS, Arm, Study
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES, label
from probattn.inference.studies.robustness.figures import draw_study
from probattn.inference.studies.robustness.report import RESULTS, study_identity, write_study
from probattn.inference.studies.robustness.rules import PLAIN, STATEMENTS, TOLERATED
from probattn.inference.studies.robustness.study import Record, run_study
from probattn.inference.studies.robustness.summary import Summary, paired_difference, summarise
from probattn.inference.studies.robustness.verdict import Verdict, judge_study
from probattn.models.corpus import Corpus

__all__ = ["FORMULA", "STUDY", "quick_study", "robustness_claim", "words_of_verdict"]

STUDY = Study()
_ON_THE_STREAM = "residual logdet 0.05"
_QUICK_ARMS = tuple(arm for arm in ARMS if arm.name in (PLAIN, _ON_THE_STREAM))
_CONTEXT = 32  # context of the quick form: half the usual one allows twice the steps in the same time
_PERMUTED = 20  # permutations of the labels of the two arms; of their 95 % intervals a few may miss zero
_HOLDING = 0.75  # the smallest share that may hold zero: below it lies 0.03 % of Binomial(20, 0.95)
FORMULA = (
    "CE(y) + λ Σ_i b_i against CE(y):  Δ loss(u + δ) < 0,  δ = level · rms(u) · z,  "
    f"Δ loss(u) < {100 * TOLERATED:g} % of loss(u)"
)
"""The claim in symbols."""
_CLAIM = "is more robust to noise on its embeddings, at no loss of held-out accuracy."


def robustness_claim(
    subject: Subject,
    settings: Settings,
    *,
    study: Study = STUDY,
    arms: Sequence[Arm] = ARMS,
    quick: Study | None = None,
) -> Claim:
    """Train with and without the barrier, and compare.

    Args:
        subject: the fitted model and its text; the quick form has models of the same size.
        settings: ``full`` with ``named`` runs the whole study, and writes its table and figures into ``folder``.
            ``full`` alone reads the results that ship with the package if they are of the same study and text.
            Otherwise the quick form is run: two arms, three seeds, a short training.
        study: sizes of the whole study.
        arms: arms of the whole study.
        quick: sizes of the quick study; None for :func:`quick_study`.
    """
    corpus = subject.corpus
    if corpus is None:
        return _claim("not_run", {}, condition="it trains models of its own, and no text was given")
    if settings.full and settings.named:
        return _whole(corpus, settings, study, arms)
    if settings.full:
        summary = _committed(corpus, study, arms)
        if summary is not None:
            return _of_many(summary, judge_study(summary))
    return _quick(subject, corpus, settings, quick or quick_study(subject))


def quick_study(subject: Subject) -> Study:
    """Choose a study of about a minute, with models of the subject's size or, if that is large, of the study's."""
    config = subject.model.config
    small = config.dim <= STUDY.dim
    context, dim = min(config.context, _CONTEXT), config.dim if small else STUDY.dim
    return Study(
        seeds=tuple(subject.seed + k for k in range(3)),
        steps=12 * min(context, dim),
        warmup=20,
        batch=16,
        learning_rate=1e-2,
        context=context,
        dim=dim,
        heads=config.decoder_heads if small else STUDY.heads,
        layers=min(config.layers, STUDY.layers),
        rank=min(config.stage_rank, STUDY.rank),
        windows=128,
    )


def words_of_verdict(verdict: Verdict) -> dict[str, str | None]:
    """Put the condition of a study's verdict into the form of a claim.

    Args:
        verdict: verdict of :func:`~probattn.inference.studies.robustness.verdict.judge_study`.

    Returns:
        The fields ``condition`` and ``finding`` of a :class:`~probattn.inference.claims.claim.Claim`.
    """
    if verdict.overall == "supported_within":
        condition = f"the corruption is {verdict.corruptions}"
        return {"condition": condition, "finding": _sentence(verdict.condition or "")}
    return {"condition": verdict.condition, "finding": ""}


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _whole(corpus: Corpus, settings: Settings, study: Study, arms: Sequence[Arm]) -> Claim:
    device = select_device("auto")
    folder = None if settings.folder is None else settings.folder / "robustness"
    records = run_study(arms, study, corpus, folder=folder, jobs=settings.jobs, device=device)
    if settings.folder is None:
        summary = summarise(records, arms)
        return _of_many(summary, judge_study(summary))
    summary, verdict = write_study(
        settings.folder, records, arms=arms, study=study, corpus=corpus, weights=folder, device=device
    )
    return _of_many(summary, verdict)


def _quick(subject: Subject, corpus: Corpus, settings: Settings, study: Study) -> Claim:
    if len(corpus.heldout) <= 2 * study.context:
        return _claim("not_run", {}, condition="the held-out text does not fill two windows")
    records = run_study(_QUICK_ARMS, study, corpus, jobs=settings.jobs)
    summary = summarise(records, _QUICK_ARMS)
    verdict = judge_study(summary)
    measured = _measured(summary)
    subject_words = (
        "A small language model trained for a short time with the literal log-barrier on its residual stream at "
        "λ = 0.05 "
    )
    statement = f"{subject_words}{_CLAIM} (Quick form: one arm, {len(study.seeds)} seeds.)"
    literal = summary.arms[_ON_THE_STREAM]
    if not literal.differences or verdict.overall == "not_run":
        reason = verdict.condition or f"training with the barrier diverged with seeds {list(literal.diverged)}"
        return _claim("not_run", measured, condition=reason, statement=statement)
    held = _permuted(records, subject.seed)
    measured["control_permuted_holds_zero"] = held
    low, high = literal.differences["relative noise"].interval()
    control = (
        f"With the labels of the two arms permuted at every seed and window, {_PERMUTED} times, {held:.0%} of the "
        f"intervals contain 0. An effect on relative noise of {(high - low) / 2:.4f} bits per character could be seen."
    )
    if held < _HOLDING:
        reason = "a control failed: differences are found where there are none"
        return _claim("not_run", measured, condition=reason, statement=statement, control=control)
    return _claim(
        verdict.overall,
        measured,
        **words_of_verdict(verdict),
        statement=statement,
        control=control,
        figures=draw_study(summary),
    )


def _of_many(summary: Summary, verdict: Verdict) -> Claim:
    statement = (
        f"Of {len(summary.barriers)} ways to train a character GPT with the log-barrier, at least one gives a model "
        f"that {_CLAIM}"
    )
    return _claim(
        verdict.overall,
        _measured(summary),
        **words_of_verdict(verdict),
        statement=statement,
        control=" ".join(words for name, words in verdict.words.items() if "control" in name),
        figures=draw_study(summary),
    )


def _claim(verdict: Any, measured: Mapping[str, float], *, statement: str = "", **more: Any) -> Claim:
    return Claim(
        "robustness",
        statement or f"A language model trained with the log-barrier {_CLAIM}",
        "empirical",
        verdict,
        measured,
        formula=FORMULA,
        **more,
    )


def _measured(summary: Summary) -> dict[str, float]:
    """Return differences of the barrier arms and of the controls, and the number of arms behind each statement."""
    plain = summary.arms[PLAIN]
    measured = {"seeds": float(len(summary.seeds)), "barrier_arms": float(len(summary.barriers))}
    measured["diverged_runs"] = float(sum(len(arm.diverged) for arm in summary.arms.values()))
    if not plain.losses:
        return measured
    measured["plain_clean"] = plain.losses[CLEAN]
    for statement in STATEMENTS:
        shown = [arm.holds(statement, plain.losses, len(summary.barriers)) for arm in summary.barriers]
        measured[f"arms_with_{_slug(statement)}"] = float(sum(shown))
    for arm in summary.arms.values():
        for name in (CLEAN, *FAMILIES):
            if name in arm.differences:
                found, own = arm.differences[name], f"{_slug(arm.arm)}_{_slug(name)}"
                measured[own] = found.mean
                measured[f"{own}_low"], measured[f"{own}_high"] = found.interval()
        if arm.facts:
            measured[f"{_slug(arm.arm)}_rms"] = arm.facts["rms"]
    return measured


def _permuted(records: Sequence[Record], seed: int) -> float:
    """Return the share of permutations of the two arms' labels whose interval for relative noise contains zero."""
    names = [label("relative noise", level) for level in FAMILIES["relative noise"]]
    by_run = {(record.arm, record.seed): record for record in records if record.diverged is None}
    pairs = [
        (by_run[_ON_THE_STREAM, own], by_run[PLAIN, own])
        for name, own in by_run
        if name == PLAIN and (_ON_THE_STREAM, own) in by_run
    ]
    values = np.array([np.mean([a.losses[n] - b.losses[n] for n in names], axis=0) for a, b in pairs])
    generator = np.random.default_rng(seed)
    held = 0
    for _ in range(_PERMUTED):
        low, high = paired_difference(
            values * generator.choice([-1.0, 1.0], size=values.shape), resamples=500
        ).interval()
        held += low <= 0 <= high
    return held / _PERMUTED


def _committed(corpus: Corpus, study: Study, arms: Sequence[Arm]) -> Summary | None:
    """Read the summary that ships with the package; None if it is of another study or text."""
    file = resources.files("probattn.inference.studies") / "results" / RESULTS
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    wanted = study_identity(corpus, study, arms)
    return Summary.from_dict(content["summary"]) if all(content.get(n) == v for n, v in wanted.items()) else None


def _slug(name: str) -> str:
    return "_".join(name.replace("'", "").replace("+", "and").replace(",", "").split())
