"""Runs of the study: every arm with every seed, trained, then measured on corrupted text."""

from __future__ import annotations

import copy
import hashlib
import io
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
from probattn.inference.runtime.files import write_bytes, write_json
from probattn.inference.runtime.progress import log_step
from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES, label
from probattn.inference.studies.robustness.evaluation import MEASURES, Array, Text, evaluate
from probattn.inference.studies.robustness.training import (
    Trained,
    forward_with_streams,
    one_thread,
    residual_attention,
    stream,
    train,
)
from probattn.models.corpus import Corpus, Windows
from probattn.models.gpt import CharacterGPT
from probattn.penalty import Penalty

__all__ = ["QUANTILES", "Record", "look_inside", "read_study", "run_study", "weights_file"]

_LOG = logging.getLogger(__name__)

#: Quantiles of the margins that a record keeps.
QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9)
_SCHEMA = 2
_LOOKED_AT = 8  # windows whose margins are measured


@dataclass(frozen=True)
class Record:
    """Results of one run.

    Attributes:
        arm: name of the arm.
        seed: random seed.
        diverged: step at which the run was stopped because its objective was not finite; None if it finished.
        losses: bits per character of every held-out window, (W,), by "clean" and
            :func:`~probattn.inference.studies.robustness.corruptions.label`, and the further measures of
            :func:`~probattn.inference.studies.robustness.evaluation.evaluate`; empty if the run diverged.
        facts: norms, margins and the share of negative determinants, by name; "before" marks those of the initial
            values.
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
def look_inside(trained: Trained, inputs: Tensor, before: CharacterGPT | None = None) -> dict[str, float]:
    """Measure norms, margins on the residual stream, and those of the stage if there is one, on held-out text.

    Args:
        trained: trained model.
        inputs: indices of the characters, (W, T).
        before: the model with its initial values; None leaves out its margins.

    Returns:
        Numbers by name, the same names for all arms but for those of the stage.
    """
    # In float64: a literal barrier drives determinants beyond what float32 holds.
    model, stage = copy.deepcopy(trained.model).double(), copy.deepcopy(trained.stage)
    u = model.embed(inputs[:_LOOKED_AT])
    facts = {
        "rms": float(model.embed(inputs).square().mean().sqrt()),
        "parameter_norm": math.sqrt(sum(float(part.double().square().sum()) for part in model.parameters())),
    }
    for name, kind in _MARGINS.items():
        facts |= _margins(f"residual_{name}", _layers(model, u, kind))
        if before is not None:
            before = before.double()
            facts |= _margins(f"before_{name}", _layers(before, before.embed(inputs[:_LOOKED_AT]), kind))
        if stage is not None:
            facts |= _margins(f"stage_{name}", [stage.double().penalty(u, kind)])
    return facts


_MARGINS: Mapping[str, BarrierKind] = {"determinant": "logdet", "singular_value": "singular_value"}


def _layers(model: CharacterGPT, u: Tensor, kind: BarrierKind) -> list[Penalty]:
    rows = torch.arange(u.shape[1], device=u.device)
    return [
        residual_penalty(residual_attention(model, number), Stream(tokens, None, None, None), rows, kind)
        for number, tokens in enumerate(forward_with_streams(model, u)[1])
    ]


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

    Each run leaves a file in the folder as soon as it is done, and is read from there the next time; the weights of the
    model lie beside it. Runs go through joblib, one thread each, seed by seed, so that a study that is cut short has
    all arms of the first seeds; those that follow another arm come last in each seed. Each is logged when it is done.

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
        InputError: two arms with the same name, an arm that follows one which is missing or itself follows another, or
            a folder with runs of other sizes, of another text or device.
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
        _require_same_study(folder, study, corpus, device)
    done: dict[tuple[str, int], Record] = {}
    total = len(arms) * len(study.seeds)
    workers = 1 if device.type == "cuda" else jobs
    with joblib.Parallel(n_jobs=workers, return_as="generator") as parallel:
        for seed in study.seeds:
            for wave in ([arm for arm in arms if arm.steer is None], [arm for arm in arms if arm.steer is not None]):
                leaders = [done[arm.steer, seed] if arm.steer is not None else None for arm in wave]
                calls = [
                    joblib.delayed(_run)(arm, seed, study, corpus, folder, device, leader)
                    for arm, leader in zip(wave, leaders, strict=True)
                ]
                for record, fresh in parallel(calls):
                    done[record.arm, record.seed] = record
                    log_step(_LOG, f"robustness: {len(done)} of {total}, {_words(record, fresh)}", len(done), total)
    return [done[arm.name, seed] for arm in arms for seed in study.seeds]


def read_study(
    arms: Sequence[Arm], study: Study, corpus: Corpus, folder: Path, *, device: torch.device | None = None
) -> list[Record]:
    """Read the runs of a study that are finished, without making any.

    Args:
        arms: arms of the study.
        study: sizes and seeds.
        corpus: text.
        folder: folder of the files.
        device: device on which they were trained; None for the CPU.

    Returns:
        The records that are there, in the order of arms and seeds; files of other sizes, texts or arms are no part.
    """
    found: dict[tuple[str, int], Record] = {}
    for arm in sorted(arms, key=lambda arm: arm.steer is not None):
        for seed in study.seeds:
            leader = found.get((arm.steer, seed)) if arm.steer is not None else None
            if arm.steer is None or leader is not None:
                identity = _identity(arm, seed, study, corpus, device or torch.device("cpu"), leader)
                record = _load(folder / f"{_file_name(arm.name)}-{seed}.json", identity)
                if record is not None:
                    found[arm.name, seed] = record
    return [found[arm.name, seed] for arm in arms for seed in study.seeds if (arm.name, seed) in found]


def weights_file(folder: Path, arm: str, seed: int) -> Path:
    """Name the file with the weights of a run's model.

    Args:
        folder: folder of the study.
        arm: name of the arm.
        seed: random seed.
    """
    return folder / f"{_file_name(arm)}-{seed}.pt"


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
        record, weights = _measure(arm, seed, study, corpus, device, leader)
    if folder is not None and path is not None:
        if weights is not None:
            file = io.BytesIO()
            torch.save(weights, file)
            write_bytes(weights_file(folder, arm.name, seed), file.getvalue())
        write_json(path, {"schema": _SCHEMA, "identity": identity, **record.as_dict()})
    return record, True


def _measure(
    arm: Arm, seed: int, study: Study, corpus: Corpus, device: torch.device, leader: Record | None
) -> tuple[Record, dict[str, Tensor] | None]:
    """Train and evaluate one model; return its record and, unless it diverged, its weights."""
    begin = time.perf_counter()
    environment = describe(device, torch.float32, seed)
    if leader is not None and leader.diverged is not None:
        # There is no path to follow to the end.
        return Record(arm.name, seed, leader.diverged, {}, {}, [], (0.0, 0.0), environment), None
    trained = train(arm, seed, corpus, study, path=None if leader is None else leader.path, device=device)
    middle = time.perf_counter() - begin
    path = [round(size, 7) for size in trained.path]
    if trained.diverged is not None:
        return Record(arm.name, seed, trained.diverged, {}, {}, path, (middle, middle), environment), None
    windows = Windows(*(part[: study.windows].to(device) for part in corpus.windows(study.context, heldout=True)))
    losses = evaluate(trained.model, windows, Text.of(corpus), seed)
    before = CharacterGPT(study.gpt(len(corpus.vocabulary)), stream("model", seed + arm.reseed)).to(device)
    facts = look_inside(trained, windows.inputs, before)
    if not np.isfinite([*facts.values(), *(values.sum() for values in losses.values())]).all():
        return Record(arm.name, seed, len(path) - 1, {}, {}, path, (middle, middle), environment), None
    weights = {name: value.cpu() for name, value in trained.model.state_dict().items()}
    seconds = (middle, time.perf_counter() - begin)
    return Record(arm.name, seed, None, losses, facts, path, seconds, environment), weights


def _shared(study: Study, corpus: Corpus, device: torch.device) -> dict[str, Any]:
    """Return what all runs of a study depend on, as plain JSON values."""
    content = {
        "schema": _SCHEMA,
        "study": study.as_dict(),
        "corpus": corpus.digest,
        "device": device.type,
        "corruptions": dict(FAMILIES),
        "measures": list(MEASURES),
    }
    plain: dict[str, Any] = json.loads(json.dumps(content))
    return plain


def _require_same_study(folder: Path, study: Study, corpus: Corpus, device: torch.device) -> None:
    """Refuse a folder of another study, whose runs would be overwritten one by one; mark a new one."""
    file, wanted = folder / "study.json", _shared(study, corpus, device)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a new folder, or a damaged mark
        found = None
    if isinstance(found, dict) and found != wanted:
        differ = ", ".join(name for name in wanted if found.get(name) != wanted[name])
        raise InputError(f"{folder}: holds runs of another study ({differ} differ); name another folder.")
    write_json(file, wanted)


def _identity(arm: Arm, seed: int, study: Study, corpus: Corpus, device: torch.device, leader: Record | None) -> str:
    """Return the SHA-256 of everything that a run depends on."""
    content = {
        **_shared(study, corpus, device),
        "arm": arm.as_dict(),
        "seed": seed,
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
