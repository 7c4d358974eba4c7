r"""Summary of the study: paired differences with intervals, and verdicts by rules fixed before anything was trained.

A difference is that of the losses of an arm and of its reference at the same seed and window. Seeds and windows are two
crossed samples, and the bootstrap draws anew from both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from probattn.inference.studies.robustness.arms import Arm
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES, Array, label
from probattn.inference.studies.robustness.study import Record

__all__ = [
    "STATEMENTS",
    "ArmSummary",
    "Difference",
    "Summary",
    "Verdict",
    "judge_study",
    "paired_difference",
    "summarise",
]

RESAMPLES = 2000
LEVEL = 0.95
_POINTS = 61  # of a path that is kept
# Both limits were written down before the first run. The figures reported for the barrier, 1.7 % of the clean loss for
# 12 % under noise, would pass them.
TOLERATED = 0.02  # share of the clean loss that still counts as no loss of accuracy
# Share of what the corruption costs plain training: a smaller gain is none, however certain. An arm whose penalty has
# next to no effect differs from plain training by a ten-thousandth of a bit, consistently.
RELEVANT = 0.05

#: Statements that an arm shows, or not, by the upper end of its interval; the claim of the barrier consists of them.
STATEMENTS: Mapping[str, str] = MappingProxyType(
    {
        "accuracy": "no loss of held-out accuracy (less than 1 % of the clean loss)",
        "absolute noise": "more robust to noise of a fixed size on the embeddings",
        "relative noise": "more robust to noise in proportion to the embeddings",
        "swaps": "more robust to swaps of adjacent characters",
        "substitutions": "more robust to substituted characters",
    }
)
PLAIN, POSITIVE, NEGATIVE = "plain", "relative noise 0.2", "plain reseeded"
LITERAL, LITERAL_AT_PLAIN_SCALE = "embeddings logdet 0.05", "logdet 0.05 at the plain scale"


class Difference(NamedTuple):
    """A mean of paired differences.

    Attributes:
        mean: mean in bits per character; negative where the arm is better.
        error: standard error of the mean.
        seeds: number of seeds behind it.
    """

    mean: float
    error: float
    seeds: int

    def interval(self, count: int = 1) -> tuple[float, float]:
        """Return a 95 % interval by Student's t with one degree of freedom fewer than seeds.

        Percentiles of a bootstrap of five seeds would contain the truth in about 85 % of the cases.

        Args:
            count: number of intervals that are to hold at once (Bonferroni).

        Returns:
            Lower and upper end.
        """
        reach = float(stats.t.ppf(1 - (1 - LEVEL) / (2 * count), self.seeds - 1)) * self.error
        return self.mean - reach, self.mean + reach


def paired_difference(values: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    r"""Average differences over seeds and windows, with the standard error that both samples leave.

    .. math:: \hat\sigma^2 = \frac{S}{S - 1} \mathrm{Var}^* \sum_{sw} a_s b_w d_{sw},

    where a and b are the shares of each seed and of each window in a resample. All seeds share the resample of the
    windows, as they share the windows. The factor corrects the variance that resampling S seeds loses (derived here).

    Args:
        values: differences d, (S, W), with S and W at least 2.
        resamples: number of resamples of the bootstrap.
        seed: random seed of the bootstrap.

    Returns:
        Mean, standard error and number of seeds.

    Example:
        >>> paired_difference(np.full((3, 4), 0.5))
        Difference(mean=0.5, error=0.0, seeds=3)
    """
    seeds, windows = values.shape
    generator = np.random.default_rng(seed)
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    by_window = generator.multinomial(windows, np.full(windows, 1 / windows), size=resamples) / windows
    # Of the deviations, so that equal differences have no error at all.
    centre = float(values.mean())
    found = ((by_seed @ (values - centre)) * by_window).sum(1)
    return Difference(centre, math.sqrt(seeds / (seeds - 1)) * float(found.std()), seeds)


@dataclass(frozen=True)
class ArmSummary:
    """Results of all runs of an arm.

    Attributes:
        arm: name of the arm.
        reference: name of the arm that it is compared with.
        barrier: True if its result speaks for the barrier.
        diverged: step at which a run diverged, by seed.
        losses: bits per character by corruption, averaged over seeds and windows.
        differences: differences to the reference by "clean", corruption, and family (averaged over its levels); empty
            if fewer than two seeds finished in both arms.
        facts: facts of the records and "seconds", averaged over seeds.
        path: root mean square of the embeddings in training at evenly spread steps, averaged over seeds.
    """

    arm: str
    reference: str
    barrier: bool
    diverged: Mapping[int, int]
    losses: Mapping[str, float]
    differences: Mapping[str, Difference]
    facts: Mapping[str, float]
    path: Sequence[float]

    def holds(self, statement: str, plain: Mapping[str, float], count: int = 1) -> bool:
        """Return True if the arm shows a statement, with an interval that holds for ``count`` arms at once.

        An arm with a diverged run shows nothing.

        Args:
            statement: key of :data:`STATEMENTS`.
            plain: losses of plain training, by "clean" and corruption.
            count: number of barrier arms that are judged together.
        """
        if self.diverged or not self.differences:
            return False
        if statement == "accuracy":
            return self.differences[CLEAN].interval(count)[1] < TOLERATED * plain[CLEAN]
        found = self.differences[statement]
        harm = float(np.mean([plain[label(statement, level)] for level in FAMILIES[statement]])) - plain[CLEAN]
        return found.interval(count)[1] < 0 and found.mean <= -RELEVANT * max(harm, 0.0)


@dataclass(frozen=True)
class Summary:
    """Results of a study.

    Attributes:
        arms: summaries of the arms by name, in the order of the study.
        seeds: random seeds of the study.
    """

    arms: Mapping[str, ArmSummary]
    seeds: tuple[int, ...]

    @property
    def barriers(self) -> list[ArmSummary]:
        """Arms that speak for the barrier."""
        return [arm for arm in self.arms.values() if arm.barrier]

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        arms = []
        for arm in self.arms.values():
            arms.append(
                {
                    **vars(arm),
                    "diverged": {str(seed): step for seed, step in arm.diverged.items()},
                    "differences": {name: list(found) for name, found in arm.differences.items()},
                }
            )
        return {"seeds": list(self.seeds), "arms": arms}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Summary:
        """Read a summary that :meth:`as_dict` wrote.

        Args:
            content: plain JSON values.
        """
        arms = {}
        for fields in content["arms"]:
            diverged = {int(seed): step for seed, step in fields["diverged"].items()}
            differences = {name: Difference(*found) for name, found in fields["differences"].items()}
            arms[fields["arm"]] = ArmSummary(**{**fields, "diverged": diverged, "differences": differences})
        return cls(arms, tuple(content["seeds"]))


def summarise(records: Sequence[Record], arms: Sequence[Arm], *, resamples: int = RESAMPLES) -> Summary:
    """Compare every arm with its reference.

    Args:
        records: records of the study, one per run.
        arms: arms of the study, the references among them.
        resamples: number of resamples of the bootstrap.

    Returns:
        A summary per arm.
    """
    by_arm = {arm.name: {record.seed: record for record in records if record.arm == arm.name} for arm in arms}
    seeds = tuple(sorted({record.seed for record in records}))
    found = {}
    for arm in arms:
        own, other = by_arm[arm.name], by_arm[arm.reference]
        finished = [record for record in own.values() if record.diverged is None]
        shared = [seed for seed, record in own.items() if record.diverged is None and other[seed].diverged is None]
        differences = {}
        if len(shared) >= 2 and arm.name != arm.reference:
            single = {
                name: np.stack([own[seed].losses[name] - other[seed].losses[name] for seed in shared])
                for name in own[shared[0]].losses
            }
            families = {
                family: np.mean([single[label(family, level)] for level in levels], axis=0)
                for family, levels in FAMILIES.items()
            }
            differences = {
                name: paired_difference(values, resamples=resamples) for name, values in {**single, **families}.items()
            }
        found[arm.name] = ArmSummary(
            arm.name,
            arm.reference,
            arm.barrier,
            {seed: record.diverged for seed, record in own.items() if record.diverged is not None},
            _means([{name: float(values.mean()) for name, values in record.losses.items()} for record in finished]),
            differences,
            _means([{**record.facts, "seconds": record.seconds[1]} for record in finished]),
            _mean_path([record.path for record in finished]),
        )
    return Summary(found, seeds)


class Verdict(NamedTuple):
    """Verdict of a study.

    Attributes:
        overall: "supported", "supported_within" (under absolute noise only), "not_supported" or "not_run".
        condition: condition under which the claim holds, or the reason why nothing can be said; None without either.
        words: one line for each statement, for the question of scale and for the controls, by name.
    """

    overall: Literal["supported", "supported_within", "not_supported", "not_run"]
    condition: str | None
    words: Mapping[str, str]


def judge_study(summary: Summary) -> Verdict:
    """Judge a study by these rules, in this order.

    - "not_run": plain training diverged, or there are fewer than two seeds; or noise training, known to help against
      noise, was not found to help (where the study has that arm): the study could not have seen an effect.
    - "supported": some barrier arm loses no accuracy and is more robust to *relative* noise, with intervals adjusted
      for the number of barrier arms, by at least 1 % of what the noise costs plain training.
    - "supported_within": some barrier arm loses no accuracy and is more robust to absolute noise, but none to relative.
    - "not_supported": anything else.

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

    def both(statement: str) -> list[str]:
        count = len(barriers)
        return [
            arm.arm for arm in barriers if arm.holds("accuracy", losses, count) and arm.holds(statement, losses, count)
        ]

    if both("relative noise"):
        return Verdict("supported", None, words)
    if both("absolute noise"):
        condition = (
            f"only under absolute noise ({', '.join(both('absolute noise'))}): no barrier arm is more robust to noise "
            f"in proportion to the embeddings at no loss of accuracy. {words['scale']}"
        )
        return Verdict("supported_within", condition, words)
    return Verdict("not_supported", None, words)


def _who(statement: str, meaning: str, barriers: Sequence[ArmSummary], losses: Mapping[str, float]) -> str:
    """Say which barrier arms show a statement."""
    alone = [arm.arm for arm in barriers if arm.holds(statement, losses)]
    sure = [arm.arm for arm in barriers if arm.holds(statement, losses, len(barriers))]
    head = f"{meaning}: {len(sure)} of {len(barriers)} barrier arms, adjusted for their number"
    return head + (f" ({', '.join(sure)})" if sure else "") + f"; {len(alone)} by themselves."


def _scale(summary: Summary, losses: Mapping[str, float]) -> str:
    """Say whether the gain under absolute noise remains when the embeddings keep the scale of plain training."""
    literal, fixed = summary.arms.get(LITERAL), summary.arms.get(LITERAL_AT_PLAIN_SCALE)
    if literal is None or fixed is None or not fixed.differences or not literal.differences:
        return "That the gain is not a matter of scale was not tested here."
    if not literal.holds("absolute noise", losses):
        return "That the gain is not a matter of scale: no gain of the literal barrier under absolute noise was found."
    left = fixed.differences["absolute noise"]
    verdict = "supported" if fixed.holds("absolute noise", losses) else "not supported"
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
    if negative is not None and negative.differences:
        names = (CLEAN, *FAMILIES)
        held = [low <= 0 <= high for low, high in (negative.differences[name].interval(len(names)) for name in names)]
        words["negative control"] = (
            f"Negative: plain training with other initial values and batches differs from plain training in "
            f"{len(names) - sum(held)} of {len(names)} measures (none is expected)."
        )
    return words


def in_words(found: Difference) -> str:
    """Write a difference with its interval.

    Args:
        found: a difference.
    """
    low, high = found.interval()
    return f"{found.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]} if rows else {}


def _mean_path(paths: Sequence[Sequence[float]]) -> list[float]:
    if not paths:
        return []
    where = np.linspace(0, len(paths[0]) - 1, min(_POINTS, len(paths[0]))).round().astype(int)
    mean: list[float] = np.mean([np.asarray(path)[where] for path in paths], axis=0).round(6).tolist()
    return mean
