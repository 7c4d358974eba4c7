"""Verdict of the study by the rules of :mod:`~probattn.inference.studies.robustness.rules`, with its words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES
from probattn.inference.studies.robustness.rules import (
    DECISIVE,
    LITERAL,
    LITERAL_AT_PLAIN_SCALE,
    NEGATIVE,
    PLAIN,
    POSITIVE,
    POSITIVE_ATTACK,
    STATEMENTS,
)
from probattn.inference.studies.robustness.summary import ArmSummary, Summary, in_words

__all__ = ["Verdict", "judge_study"]


class Verdict(NamedTuple):
    """Verdict of a study.

    Attributes:
        overall: "supported", "supported_within" (under other corruptions only), "not_supported" or "not_run".
        condition: condition under which the claim holds, or the reason why nothing can be said; None without either.
        words: one line for each statement, for the question of scale and for the controls, by name.
        shown: corruptions under which a barrier arm is more robust at no loss of accuracy.
    """

    overall: Literal["supported", "supported_within", "not_supported", "not_run"]
    condition: str | None
    words: Mapping[str, str]
    shown: tuple[str, ...] = ()

    @property
    def corruptions(self) -> str:
        """The corruptions of ``shown``, in words."""
        return " or ".join(STATEMENTS[name].removeprefix("more robust to ") for name in self.shown)


def judge_study(summary: Summary) -> Verdict:
    """Judge a study by its rules, see :mod:`~probattn.inference.studies.robustness.rules`.

    Args:
        summary: summary of the study.
    """
    plain = summary.arms[PLAIN]
    if plain.diverged or len(summary.seeds) < 2:
        reason = f"plain training diverged with seeds {list(plain.diverged)}, or has a single seed: nothing to compare"
        return Verdict("not_run", reason, {})
    losses, barriers = plain.losses, summary.barriers
    words = {name: _who(name, meaning, barriers, losses) for name, meaning in STATEMENTS.items()}
    words["scale"] = _scale(summary, losses)
    words |= _controls(summary, losses)
    if POSITIVE in summary.arms and not summary.arms[POSITIVE].holds("relative noise", losses):
        return Verdict(
            "not_run",
            "the positive control failed: training with relative noise, which is known to help against it, was not "
            "found to help, so that this study could not have seen an effect of the barrier",
            words,
        )
    attack = summary.arms.get(POSITIVE_ATTACK)
    blind = attack is not None and not attack.holds("embedding attack", losses)
    decisive = [name for name in DECISIVE if not (blind and name == "embedding attack")]
    shown = {name: found for name in FAMILIES if (found := _both(name, barriers, losses))}
    if any(name in shown for name in decisive):
        return Verdict("supported", None, words, tuple(shown))
    missing = [arm.arm for arm in barriers if not arm.runs]
    if missing:
        return Verdict(
            "not_run",
            f"no barrier arm that was run is more robust in proportion to the embeddings at no loss of accuracy, and "
            f"{len(missing)} of {len(barriers)} have no run ({', '.join(missing)})",
            words,
            tuple(shown),
        )
    if shown:
        where = "; ".join(f"{name}: {', '.join(arms)}" for name, arms in shown.items())
        return Verdict(
            "supported_within",
            f"only under some corruptions ({where}): no barrier arm is more robust to noise or attacks in proportion "
            f"to the embeddings at no loss of accuracy. {words['scale']}",
            words,
            tuple(shown),
        )
    return Verdict("not_supported", None, words)


def _both(statement: str, barriers: Sequence[ArmSummary], losses: Mapping[str, float]) -> list[str]:
    """Names of the barrier arms that show a statement and accuracy, adjusted for their number."""
    return [
        arm.arm
        for arm in barriers
        if arm.holds("accuracy", losses, len(barriers)) and arm.holds(statement, losses, len(barriers))
    ]


def _who(statement: str, meaning: str, barriers: Sequence[ArmSummary], losses: Mapping[str, float]) -> str:
    """Say which barrier arms show a statement."""
    alone = [arm.arm for arm in barriers if arm.holds(statement, losses)]
    sure = [arm.arm for arm in barriers if arm.holds(statement, losses, len(barriers))]
    idle = sum(not arm.runs for arm in barriers)
    number = f"{len(barriers)} barrier arms" + (f" ({idle} of which have no run)" if idle else "")
    head = f"{meaning}: {len(sure)} of {number}, adjusted for their number"
    return head + (f" ({', '.join(sure)})" if sure else "") + f"; {len(alone)} by themselves."


def _scale(summary: Summary, losses: Mapping[str, float]) -> str:
    """Say whether the gain under absolute noise remains when the embeddings keep the scale of plain training."""
    literal, fixed = summary.arms.get(LITERAL), summary.arms.get(LITERAL_AT_PLAIN_SCALE)
    if literal is None or fixed is None or not fixed.differences or not literal.differences:
        return "That the gain is not a matter of scale was not tested here."
    if not literal.holds("absolute noise", losses):
        return "That the gain is not a matter of scale: no gain of the literal barrier under absolute noise was found."
    left = fixed.differences["absolute noise"]
    verdict = "holds" if fixed.holds("absolute noise", losses) else "does not hold"
    return (
        f"That the gain is not a matter of scale: {verdict} (with the literal barrier at the scale of plain training "
        f"the difference is {in_words(left)} bits per character, of {in_words(literal.differences['absolute noise'])} "
        "at its own scale)."
    )


def _controls(summary: Summary, losses: Mapping[str, float]) -> dict[str, str]:
    words = {}
    positive, negative = summary.arms.get(POSITIVE), summary.arms.get(NEGATIVE)
    if positive is not None and positive.differences:
        verdict = "found" if positive.holds("relative noise", losses) else "not found"
        words["positive control"] = (
            f"Positive: training with relative noise is {verdict} to help against relative noise, "
            f"{in_words(positive.differences['relative noise'])} bits per character."
        )
    attack = summary.arms.get(POSITIVE_ATTACK)
    if attack is not None and "embedding attack" in attack.differences:
        verdict = "found" if attack.holds("embedding attack", losses) else "not found"
        words["positive control of attacks"] = (
            f"Positive, for attacks: adversarial training is {verdict} to help against the attack on embeddings, "
            f"{in_words(attack.differences['embedding attack'])} bits per character."
        )
    if negative is not None and negative.differences:
        names = [name for name in (CLEAN, *FAMILIES) if name in negative.differences]
        held = [low <= 0 <= high for low, high in (negative.differences[name].interval(len(names)) for name in names)]
        words["negative control"] = (
            f"Negative: plain training with other initial values and batches differs from plain training in "
            f"{len(names) - sum(held)} of {len(names)} measures (none is expected)."
        )
    return words
