r"""Summary of the study: paired differences with intervals, by the rules of this study.

A difference is that of the losses of an arm and of its reference at the same seed and window. Seeds and windows are two
crossed samples, and the bootstrap draws anew from both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from probattn.inference.studies.robustness.arms import Arm
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES, label
from probattn.inference.studies.robustness.evaluation import Array
from probattn.inference.studies.robustness.rules import LEVEL, LONGER, PLAIN, RELEVANT, SHORTER, TOLERATED
from probattn.inference.studies.robustness.study import Record

__all__ = ["ArmSummary", "Difference", "Summary", "in_words", "paired_difference", "shared_seeds", "summarise"]

RESAMPLES = 2000
_POINTS = 61  # of a path that is kept


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
    by_seed, by_window = _shares(seeds, windows, resamples, seed)
    # Of the deviations, so that equal differences have no error at all.
    centre = float(values.mean())
    found = ((by_seed @ (values - centre)) * by_window).sum(1)
    return Difference(centre, math.sqrt(seeds / (seeds - 1)) * float(found.std()), seeds)


@lru_cache(maxsize=16)
def _shares(seeds: int, windows: int, resamples: int, seed: int) -> tuple[Array, Array]:
    """Shares of the seeds and of the windows in each resample, the same for every difference of a study."""
    generator = np.random.default_rng(seed)
    by_seed = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    by_window = generator.multinomial(windows, np.full(windows, 1 / windows), size=resamples) / windows
    return by_seed, by_window


@dataclass(frozen=True)
class ArmSummary:
    """Results of all runs of an arm.

    Attributes:
        arm: name of the arm.
        reference: name of the arm that it is compared with.
        barrier: True if its result speaks for the barrier.
        diverged: step at which a run diverged, by seed.
        losses: bits per character by corruption, averaged over seeds and windows.
        differences: differences to the reference by "clean", corruption, further measure, and family (averaged over its
            levels); empty if fewer than two seeds finished in both arms.
        facts: facts of the records, "seconds" and "training_seconds", averaged over seeds.
        path: root mean square of the embeddings in training at evenly spread steps, averaged over seeds.
        equal_loss: differences by family to plain training at the clean loss of the arm, interpolated between runs of
            half, once and twice the steps; empty without them, or if that loss lies outside their range at some seed.
        equal_compute: differences by "clean" and family to plain training of twice the steps.
        runs: number of runs, finished or diverged.
    """

    arm: str
    reference: str
    barrier: bool
    diverged: Mapping[int, int]
    losses: Mapping[str, float]
    differences: Mapping[str, Difference]
    facts: Mapping[str, float]
    path: Sequence[float]
    equal_loss: Mapping[str, Difference] = field(default_factory=dict)
    equal_compute: Mapping[str, Difference] = field(default_factory=dict)
    runs: int = 0

    def holds(self, statement: str, plain: Mapping[str, float], count: int = 1) -> bool:
        """Return True if the arm shows a statement, with an interval that holds for ``count`` arms at once.

        An arm with a diverged run shows nothing, and none shows what its study did not measure.

        Args:
            statement: key of :data:`STATEMENTS`.
            plain: losses of plain training, by "clean" and corruption.
            count: number of barrier arms that are judged together.
        """
        if self.diverged or (CLEAN if statement == "accuracy" else statement) not in self.differences:
            return False
        if statement == "accuracy":
            return self.differences[CLEAN].interval(count)[1] < TOLERATED * plain[CLEAN]
        found = self.differences[statement]
        names = [name for name in plain if name.rpartition(" ")[0] == statement]
        harm = float(np.mean([plain[name] for name in names])) - plain[CLEAN]
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
                    **{name: {key: list(found) for key, found in getattr(arm, name).items()} for name in _COMPARED},
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
            compared = {
                name: {key: Difference(*found) for key, found in fields.get(name, {}).items()} for name in _COMPARED
            }
            arms[fields["arm"]] = ArmSummary(**{**fields, "diverged": diverged, **compared})
        return cls(arms, tuple(content["seeds"]))


_COMPARED = ("differences", "equal_loss", "equal_compute")


def summarise(records: Sequence[Record], arms: Sequence[Arm], *, resamples: int = RESAMPLES) -> Summary:
    """Compare every arm with its reference, and with plain training at equal clean loss and at equal compute.

    Args:
        records: records of the study, one per run.
        arms: arms of the study, the references among them.
        resamples: number of resamples of the bootstrap.

    Returns:
        A summary per arm.
    """
    by_arm = {arm.name: {record.seed: record for record in records if record.arm == arm.name} for arm in arms}
    finished = {
        name: {seed: record.losses for seed, record in own.items() if record.diverged is None}
        for name, own in by_arm.items()
    }
    found = {}
    for arm in arms:
        own, differences, equal_loss, equal_compute = finished[arm.name], {}, {}, {}
        if arm.name != arm.reference:
            differences = _compare(own, finished[arm.reference], resamples)
        if arm.name not in (PLAIN, SHORTER, LONGER) and LONGER in finished:
            families = (CLEAN, *FAMILIES)
            compared = _compare(own, finished[LONGER], resamples)
            equal_compute = {name: compared[name] for name in families if name in compared}
            matched = _at_the_loss_of(own, [finished.get(name, {}) for name in (SHORTER, PLAIN, LONGER)])
            if matched is not None:
                compared = _compare(own, matched, resamples)
                equal_loss = {name: compared[name] for name in FAMILIES if name in compared}
        kept = [record for record in by_arm[arm.name].values() if record.diverged is None]
        found[arm.name] = ArmSummary(
            arm.name,
            arm.reference,
            arm.barrier,
            {seed: record.diverged for seed, record in by_arm[arm.name].items() if record.diverged is not None},
            _means([{name: float(values.mean()) for name, values in record.losses.items()} for record in kept]),
            differences,
            _means([_facts(record) for record in kept]),
            _mean_path([record.path for record in kept]),
            equal_loss,
            equal_compute,
            len(by_arm[arm.name]),
        )
    return Summary(found, tuple(sorted({record.seed for record in records})))


_Losses = Mapping[int, Mapping[str, Array]]  # by seed and corruption


def _compare(own: _Losses, other: _Losses, resamples: int) -> dict[str, Difference]:
    """Differences at the seeds that both have, by corruption and family; none with fewer than two seeds."""
    shared = [seed for seed in own if seed in other]
    if len(shared) < 2:
        return {}
    single = {name: np.stack([own[seed][name] - other[seed][name] for seed in shared]) for name in own[shared[0]]}
    families = {
        family: np.mean([single[label(family, level)] for level in levels], axis=0)
        for family, levels in FAMILIES.items()
    }
    return {name: paired_difference(values, resamples=resamples) for name, values in {**single, **families}.items()}


def _at_the_loss_of(own: _Losses, plain: Sequence[_Losses]) -> _Losses | None:
    """Losses that plain training would have at an arm's clean loss, by seed; None where it has none such.

    Seeds without all three runs of plain training are left out.
    """
    matched = {}
    for seed, losses in own.items():
        if not all(seed in run for run in plain):
            continue
        runs = sorted((run[seed] for run in plain), key=lambda run: float(run[CLEAN].mean()))
        clean, wanted = [float(run[CLEAN].mean()) for run in runs], float(losses[CLEAN].mean())
        place = int(np.searchsorted(clean, wanted))
        if not 0 < place < len(runs):
            return None
        share = (wanted - clean[place - 1]) / (clean[place] - clean[place - 1])
        matched[seed] = {name: (1 - share) * runs[place - 1][name] + share * runs[place][name] for name in runs[place]}
    return matched


def _facts(record: Record) -> dict[str, float]:
    training, total = record.seconds
    return {**record.facts, "seconds": total, "training_seconds": training}


def shared_seeds(records: Sequence[Record]) -> tuple[int, ...]:
    """Seeds that all arms have, where they are two at least; else all seeds.

    What is averaged over seeds and not paired by them, such as losses under stronger attacks, is comparable so.

    Args:
        records: records of the study.
    """
    by_arm: dict[str, set[int]] = {}
    for record in records:
        by_arm.setdefault(record.arm, set()).add(record.seed)
    shared = set.intersection(*by_arm.values())
    return tuple(sorted(shared if len(shared) > 1 else set.union(*by_arm.values())))


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
