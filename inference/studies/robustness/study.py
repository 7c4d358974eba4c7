"""Runs of the study: every arm with every seed, trained, then measured on corrupted text."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from torch import Tensor

from probattn.barrier import BarrierKind
from probattn.errors import InputError
from probattn.hf.penalty import residual_penalty
from probattn.hf.stream import Stream
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import write_json
from probattn.inference.runtime.progress import log_step
from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES, Array, evaluate, label
from probattn.inference.studies.robustness.training import (
    Trained,
    forward_with_streams,
    one_thread,
    residual_attention,
    train,
)
from probattn.models.corpus import Corpus, Windows
from probattn.penalty import Penalty

__all__ = ["QUANTILES", "Record", "look_inside", "run_study"]

_LOG = logging.getLogger(__name__)

#: Quantiles of the margins that a record keeps.
QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9)
_SCHEMA = 1
_LOOKED_AT = 64  # windows whose margins are measured


@dataclass(frozen=True)
class Record:
    """Results of one run.

    Attributes:
        arm: name of the arm.
        seed: random seed.
        diverged: step at which the run was stopped because its objective was not finite; None if it finished.
        losses: bits per character of every held-out window, (W,), by "clean" and
            :func:`~probattn.inference.studies.robustness.corruptions.label`; empty if the run diverged.
        facts: norms, margins and the share of negative determinants, by name.
        path: root mean square of the embeddings in training, at every step.
        seconds: seconds of the training, and of the whole run.
        environment: machine, versions and date.
    """

    arm: str
    seed: int
    diverged: int | None
    losses: Mapping[str, Array]
    facts: Mapping[str, float]
    path: Sequence[float]
    seconds: tuple[float, float] = (0.0, 0.0)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values; losses to a millionth of a bit."""
        return {
            "arm": self.arm,
            "seed": self.seed,
            "diverged": self.diverged,
            "seconds": [round(part, 2) for part in self.seconds],
            "environment": dict(self.environment),
            "facts": dict(self.facts),
            "path": list(self.path),
            "losses": {name: [round(float(loss), 6) for loss in values] for name, values in self.losses.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Record:
        """Read a record that :meth:`as_dict` wrote.

        Args:
            content: plain JSON values.
        """
        losses = {name: np.asarray(values, dtype=float) for name, values in content["losses"].items()}
        training, total = content["seconds"]
        return cls(
            content["arm"],
            content["seed"],
            content["diverged"],
            losses,
            content["facts"],
            content["path"],
            (training, total),
            content["environment"],
        )


@torch.no_grad()
def look_inside(trained: Trained, inputs: Tensor) -> dict[str, float]:
    """Measure norms, margins of the model's own layers, and of the stage if there is one, on held-out text.

    Args:
        trained: trained model.
        inputs: indices of the characters, (W, T).

    Returns:
        Numbers by name, the same names for all arms but for those of the stage.
    """
    model = trained.model
    facts = {
        "rms": float(model.embed(inputs).square().mean().sqrt()),
        "parameter_norm": math.sqrt(sum(float(part.double().square().sum()) for part in model.parameters())),
    }
    u = model.embed(inputs[:_LOOKED_AT])
    streams = forward_with_streams(model, u)[1]
    rows = torch.arange(u.shape[1], device=u.device)
    kinds: dict[str, BarrierKind] = {"determinant": "logdet", "singular_value": "singular_value"}
    for name, kind in kinds.items():
        layers = [
            residual_penalty(residual_attention(model, number), Stream(tokens, None, None, None), rows, kind)
            for number, tokens in enumerate(streams)
        ]
        facts |= _margins(f"residual_{name}", layers)
        if trained.stage is not None:
            facts |= _margins(f"stage_{name}", [trained.stage.penalty(u, kind)])
    return facts


def _margins(name: str, layers: Sequence[Penalty]) -> dict[str, float]:
    margins = torch.cat([layer.margins.flatten() for layer in layers]).double()
    found = {f"{name}_{q:g}": float(margins.quantile(q)) for q in QUANTILES}
    if name.endswith("determinant"):
        found[f"{name}_negative"] = float((margins < 0).double().mean())
    return found


def run_study(
    arms: Sequence[Arm],
    study: Study,
    corpus: Corpus,
    *,
    folder: Path | None = None,
    jobs: int = 1,
    device: torch.device | None = None,
) -> list[Record]:
    """Train and evaluate every arm with every seed.

    Each run leaves a file in the folder as soon as it is done, and is read from there the next time. Runs go through
    joblib, one thread each; those that follow another arm come after it. Each is logged when it is done.

    Args:
        arms: arms of the study; an arm that another one follows must be among them.
        study: sizes and seeds.
        corpus: text.
        folder: folder of the files; None keeps nothing.
        jobs: number of processes.
        device: device to train on, which takes one run at a time if it is a GPU; None for the CPU.

    Returns:
        One record per run, in the order of arms and, within an arm, of seeds.

    Raises:
        InputError: two arms with the same name, or an arm that follows one which is missing or itself follows another.
    """
    named = {arm.name: arm for arm in arms}
    if len(named) < len(arms):
        raise InputError(f"arms {[arm.name for arm in arms]}: two have the same name; rename one.")
    for arm in arms:
        if arm.steer is not None and (arm.steer not in named or named[arm.steer].steer is not None):
            raise InputError(f"arm {arm.name} follows {arm.steer!r}; add that arm, which must not follow another.")
    device = device or torch.device("cpu")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    done: dict[tuple[str, int], Record] = {}
    total = len(arms) * len(study.seeds)
    for wave in ([arm for arm in arms if arm.steer is None], [arm for arm in arms if arm.steer is not None]):
        # Seeds in the outer loop, so that a study that is cut short has all arms of the first seeds.
        tasks = [(arm, seed) for seed in study.seeds for arm in wave]
        calls = [
            joblib.delayed(_run)(
                arm, seed, study, corpus, folder, device, done[arm.steer, seed] if arm.steer is not None else None
            )
            for arm, seed in tasks
        ]
        workers = 1 if device.type == "cuda" else jobs
        for record, fresh in joblib.Parallel(n_jobs=workers, return_as="generator")(calls):
            done[record.arm, record.seed] = record
            log_step(_LOG, f"robustness: {len(done)} of {total}, {_words(record, fresh)}", len(done), total)
    return [done[arm.name, seed] for arm in arms for seed in study.seeds]


def _run(
    arm: Arm, seed: int, study: Study, corpus: Corpus, folder: Path | None, device: torch.device, leader: Record | None
) -> tuple[Record, bool]:
    """Return one run, and True if it was made now rather than read."""
    identity = _identity(arm, seed, study, corpus, device, leader)
    path = None if folder is None else folder / f"{_file_name(arm.name)}-{seed}.json"
    if path is not None:
        found = _load(path, identity)
        if found is not None:
            return found, False
    with one_thread():
        record = _measure(arm, seed, study, corpus, device, leader)
    if path is not None:
        write_json(path, {"schema": _SCHEMA, "identity": identity, **record.as_dict()})
    return record, True


def _measure(arm: Arm, seed: int, study: Study, corpus: Corpus, device: torch.device, leader: Record | None) -> Record:
    begin = time.perf_counter()
    environment = describe(device, torch.float32, seed)
    if leader is not None and leader.diverged is not None:
        # There is no path to follow to the end.
        return Record(arm.name, seed, leader.diverged, {}, {}, [], (0.0, 0.0), environment)
    trained = train(arm, seed, corpus, study, path=None if leader is None else leader.path, device=device)
    middle = time.perf_counter() - begin
    path = [round(size, 7) for size in trained.path]
    if trained.diverged is not None:
        return Record(arm.name, seed, trained.diverged, {}, {}, path, (middle, middle), environment)
    windows = Windows(*(part[: study.windows].to(device) for part in corpus.windows(study.context, heldout=True)))
    frequency = torch.bincount(corpus.encode(corpus.text), minlength=len(corpus.vocabulary))
    losses = evaluate(trained.model, windows, frequency, seed)
    facts = look_inside(trained, windows.inputs)
    if not np.isfinite([*facts.values(), *(values.sum() for values in losses.values())]).all():
        return Record(arm.name, seed, study.steps, {}, {}, path, (middle, middle), environment)
    return Record(arm.name, seed, None, losses, facts, path, (middle, time.perf_counter() - begin), environment)


def _identity(arm: Arm, seed: int, study: Study, corpus: Corpus, device: torch.device, leader: Record | None) -> str:
    """Return the SHA-256 of everything that a run depends on."""
    content = {
        "schema": _SCHEMA,
        "arm": arm.as_dict(),
        "seed": seed,
        "study": study.as_dict(),
        "corpus": corpus.digest,
        "device": device.type,
        "corruptions": dict(FAMILIES),
        "path": None if leader is None else [leader.diverged, *leader.path],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _load(path: Path, identity: str) -> Record | None:
    """Read the record in a file; None if it belongs to another run or is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Record.from_dict(content) if content["identity"] == identity else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _file_name(arm: str) -> str:
    return "".join(character if character.isalnum() or character in "._+" else "-" for character in arm)


def _words(record: Record, fresh: bool) -> str:
    if record.diverged is not None:
        outcome = f"diverged at step {record.diverged}"
    else:
        noisy = label("relative noise", FAMILIES["relative noise"][1])
        outcome = f"clean {record.losses[CLEAN].mean():.4f}, {noisy} {record.losses[noisy].mean():.4f} bits/character"
    return f"{record.arm}, seed {record.seed}: {outcome}, {record.seconds[1]:.0f} s{'' if fresh else ', read in'}"
