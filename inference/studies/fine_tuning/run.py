"""Runs of the fine-tuning study, resumable one by one, and their comparison."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.provenance import weights_digest
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import write_json
from probattn.inference.runtime.progress import log_step
from probattn.inference.studies.fine_tuning.measure import measure_margins, measure_model
from probattn.inference.studies.fine_tuning.pairs import Encode, cut_pairs
from probattn.inference.studies.fine_tuning.plan import CLEAN, FAMILIES, OTHER, Arm, Sizes
from probattn.inference.studies.fine_tuning.tuning import fine_tune
from probattn.inference.studies.robustness.corruptions import label
from probattn.inference.studies.robustness.summary import Difference, paired_difference

__all__ = ["Texts", "compare", "render", "run_fine_tuning"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """Texts of the study.

    Attributes:
        train: training text.
        heldout: text of the same kind that no arm is tuned on.
        other: text of another kind.
    """

    train: str
    heldout: str
    other: str


def run_fine_tuning(
    model: Any, encode: Encode, texts: Texts, arms: Sequence[Arm], sizes: Sizes, *, folder: Path | None = None
) -> list[dict[str, Any]]:
    """Tune and measure every arm with every seed, all arms of a seed before the next seed.

    Args:
        model: causal language model, which is left as it was.
        encode: tokeniser.
        texts: texts.
        arms: arms, "plain" among them.
        sizes: sizes.
        folder: folder of one file per run, from which finished runs are read; None keeps nothing.

    Returns:
        Records as plain JSON values, in the order in which they were made.

    Raises:
        InputError: two arms of one name, texts that are too short, or a folder with runs of other options.
    """
    if len({arm.name for arm in arms}) < len(arms):
        raise InputError(f"arms {[arm.name for arm in arms]}: two have the same name; rename one.")
    tokens = torch.tensor(list(encode(texts.train)))
    pairs = cut_pairs(texts.heldout, encode, sizes.windows, sizes.context, sizes.continuation)
    others = cut_pairs(texts.other, encode, sizes.windows, sizes.context, sizes.continuation)
    digest, records = weights_digest(model), []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    for seed in sizes.seeds:
        for arm in arms:
            identity = _identity(arm, seed, sizes, texts, digest)
            path = None if folder is None else folder / f"{arm.name.replace(' ', '-')}-{seed}.json"
            record = None if path is None else _load(path, identity)
            fresh = record is None
            if record is None:
                begin = time.perf_counter()
                tuned, diverged = fine_tune(model, arm, seed, tokens, sizes)
                middle = time.perf_counter() - begin
                losses, facts = {}, {}
                if diverged is None:
                    found = measure_model(tuned, pairs, others, encode, sizes.context, texts.train, seed)
                    losses = {name: values.round(6).tolist() for name, values in found.items()}
                    facts = measure_margins(tuned, _first(encode, texts, sizes))
                record = {
                    "identity": identity,
                    "arm": arm.name,
                    "seed": seed,
                    "diverged": diverged,
                    "losses": losses,
                    "facts": facts,
                    "seconds": [round(middle, 2), round(time.perf_counter() - begin, 2)],
                    "environment": describe(next(model.parameters()).device, next(model.parameters()).dtype, seed),
                }
                if path is not None:
                    write_json(path, record)
            records.append(record)
            words = "read in" if not fresh else f"{record['seconds'][1]:.0f} s"
            total = len(sizes.seeds) * len(arms)
            log_step(_LOG, f"fine-tuning: {arm.name}, seed {seed}, {words}", len(records), total)
    return records


def _first(encode: Encode, texts: Texts, sizes: Sizes) -> Tensor:
    return torch.tensor(list(encode(texts.heldout[: 12 * sizes.length]))[: sizes.length])


def compare(records: Sequence[Mapping[str, Any]], arms: Sequence[Arm]) -> dict[str, dict[str, Difference]]:
    """Compare every arm with plain tuning, paired by seed and continuation.

    Args:
        records: records of the study.
        arms: arms of the study.

    Returns:
        Differences in bits per token by arm and by "clean", "another text", corruption and family; no entry for an
        arm with fewer than two seeds that finished in both.
    """
    by_run = {(record["arm"], record["seed"]): record for record in records if record["diverged"] is None}
    found = {}
    for arm in arms:
        seeds = [seed for name, seed in by_run if name == arm.name and ("plain", seed) in by_run]
        if arm.name == "plain" or len(seeds) < 2:
            continue
        own = [(by_run[arm.name, seed]["losses"], by_run["plain", seed]["losses"]) for seed in seeds]
        values = {name: np.array([np.subtract(one[name], plain[name]) for one, plain in own]) for name in own[0][0]}
        for family, levels in FAMILIES.items():
            values[family] = np.mean([values[label(family, level)] for level in levels], axis=0)
        found[arm.name] = {name: paired_difference(differences) for name, differences in values.items()}
    return found


def render(records: Sequence[Mapping[str, Any]], arms: Sequence[Arm]) -> str:
    """Write differences, losses and margins as Markdown.

    Args:
        records: records of the study.
        arms: arms of the study.
    """
    names = (CLEAN, OTHER, *FAMILIES)
    lines = [
        "# Fine-tuning with and without the barrier",
        "",
        "Bits per token of true continuations after clean, corrupted and attacked contexts; differences to plain "
        "tuning, paired by seed and continuation, with half-widths of 95 % intervals; negative is better.",
        "",
        "| arm | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for name_of_arm, found in compare(records, arms).items():
        cells = (f"{found[name].mean:+.4f} ± {found[name].interval()[1] - found[name].mean:.4f}" for name in names)
        lines.append(f"| {_escape(name_of_arm)} | " + " | ".join(cells) + " |")
    lines += ["", "| arm | clean | det < 0 | median log det | median σ_min | seconds | diverged |", "|" + " --- |" * 7]
    for arm in arms:
        own = [record for record in records if record["arm"] == arm.name]
        kept = [record for record in own if record["diverged"] is None]
        if not kept:
            lines.append(f"| {_escape(arm.name)} | – | – | – | – | – | {len(own)} of {len(own)} |")
            continue
        clean = np.mean([np.mean(record["losses"][CLEAN]) for record in kept])
        facts = [
            np.mean([record["facts"][name] for record in kept])
            for name in ("determinant_negative", "logabsdet_0.5", "singular_value_0.5")
        ]
        seconds = np.mean([record["seconds"][0] for record in kept])
        lines.append(
            f"| {_escape(arm.name)} | {clean:.4f} | {facts[0]:.2%} | {facts[1]:.2f} | {facts[2]:.3f} | {seconds:.0f} | "
            f"{len(own) - len(kept)} of {len(own)} |"
        )
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return text.replace("_", "\\_")


def _identity(arm: Arm, seed: int, sizes: Sizes, texts: Texts, digest: str) -> str:
    content = {
        "arm": arm.as_dict(),
        "seed": seed,
        "sizes": sizes.as_dict(),
        "texts": [hashlib.sha256(text.encode()).hexdigest() for text in (texts.train, texts.heldout, texts.other)],
        "model": digest,
        "corruptions": dict(FAMILIES),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _load(path: Path, identity: str) -> dict[str, Any] | None:
    """Read the record in a file; None if there is none or it is damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found = content["identity"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if found != identity:
        raise InputError(f"{path}: a run with other options; name another folder.")
    return content
