r"""How much worse a character model becomes under corrupted input, and the study that finds it for every arm and seed.

Corruptions: normal noise on the embeddings, of a fixed size or in proportion to the model's own root mean square of the
embeddings; swaps of adjacent characters; substitution of characters by others. The targets stay the true characters.
All arms of a seed are tried on the same windows with the same draws.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import joblib
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from probattn.barrier import BarrierKind
from probattn.errors import InputError
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import write_json
from probattn.inference.studies.robustness.training import Arm, Study, Trained, one_thread, stream, train
from probattn.models.corpus import Corpus, Windows
from probattn.models.gpt import CharacterGPT
from probattn.penalty import Penalty, attention_penalty

__all__ = [
    "CLEAN",
    "FAMILIES",
    "QUANTILES",
    "Record",
    "evaluate",
    "label",
    "run_study",
    "substitute_characters",
    "swap_characters",
]

Array = NDArray[np.float64]

CLEAN = "clean"
FAMILIES: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "absolute noise": (0.1, 0.3, 0.5),
        "relative noise": (0.1, 0.2, 0.4),
        "swaps": (0.02, 0.05, 0.1),
        "substitutions": (0.02, 0.05, 0.1),
    }
)
QUANTILES = (0.0, 0.01, 0.1, 0.5, 0.9)
_SCHEMA = 1
_CHUNK = 128  # windows in one pass
_LOOKED_AT = 64  # windows whose margins are measured


@dataclass(frozen=True)
class Record:
    """What one run left.

    Attributes:
        arm, seed: which run.
        diverged: the step at which it was stopped, as its objective was not finite; None: it ran through.
        losses: bits per character of every held-out window, (W,), by "clean" and :func:`label`; empty if it diverged.
        facts: norms, margins and the share of negative determinants, by name.
        path: root mean square of the embeddings in training, at every step.
        seconds: of training, and of all.
        environment: where and when.
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
        """Plain JSON values; losses to a millionth of a bit."""
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
        """The inverse of :meth:`as_dict`."""
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


def label(family: str, level: float) -> str:
    """How records call a corruption, such as "swaps 0.05"."""
    return f"{family} {level:g}"


def swap_characters(tokens: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Swap characters with their right neighbours; no character moves twice.

    Args:
        tokens: (N, T).
        rate: probability that a swap begins at a position, the same at each of the first T - 1; at most 0.5.
        generator: of the draws, on the CPU.

    Returns:
        (N, T).

    Raises:
        InputError: rate outside [0, 0.5].
    """
    if not 0 <= rate <= 0.5:
        raise InputError(f"rate is {rate}; a share of swaps must lie in [0, 0.5], as each takes two characters.")
    length = tokens.shape[1]
    order = torch.arange(length).repeat(len(tokens), 1)
    chance = torch.rand(len(tokens), length, generator=generator)
    begun = torch.zeros(len(tokens), dtype=torch.bool)
    for i in range(length - 1):
        # None may begin inside another, so that the others must begin more often: rate = x (1 - rate).
        begun = ~begun & (chance[:, i] < (rate if i == 0 else rate / (1 - rate)))
        order[:, i] += begun.long()
        order[:, i + 1] -= begun.long()
    return tokens.gather(1, order.to(tokens.device))


def substitute_characters(tokens: Tensor, rate: float, frequency: Tensor, generator: torch.Generator) -> Tensor:
    """Replace characters by others, drawn in proportion to their frequency in the training text.

    Args:
        tokens: (N, T).
        rate: probability that a character is replaced, always by another one.
        frequency: of every character in the training text, (V,).
        generator: of the draws, on the CPU.

    Returns:
        (N, T).

    Raises:
        InputError: rate outside [0, 1], or a single character in the text.
    """
    if not 0 <= rate <= 1:
        raise InputError(f"rate is {rate}; a share of characters must lie in [0, 1].")
    if int((frequency > 0).sum()) < 2:
        raise InputError("the training text has a single character, and no other to put in its place.")
    chosen = torch.rand(tokens.shape, generator=generator) < rate
    old = tokens.cpu()[chosen]
    weights = frequency.double().repeat(len(old), 1).scatter(1, old.unsqueeze(1), 0.0)
    changed = tokens.cpu().clone()
    if len(old):
        changed[chosen] = torch.multinomial(weights, 1, generator=generator).squeeze(1)
    return changed.to(tokens.device)


@torch.no_grad()
def evaluate(model: CharacterGPT, windows: Windows, frequency: Tensor, seed: int) -> dict[str, Array]:
    """Bits per character of every window under every corruption.

    Args:
        model: the model, on the device of the windows.
        windows: held-out text, (W, T).
        frequency: of every character in the training text, (V,).
        seed: of the corruptions; the draws of each depend on it and on the corruption alone.

    Returns:
        By "clean" and :func:`label`, (W,) each.
    """
    clean = model.embed(windows.inputs)
    spread = float(clean.square().mean().sqrt())
    losses = {CLEAN: _bits(model, clean, windows.targets)}
    for family, levels in FAMILIES.items():
        for level in levels:
            generator = torch.Generator().manual_seed(stream(family, level, seed))
            if family == "swaps":
                u = model.embed(swap_characters(windows.inputs, level, generator))
            elif family == "substitutions":
                u = model.embed(substitute_characters(windows.inputs, level, frequency, generator))
            else:
                size = level * spread if family == "relative noise" else level
                u = clean + size * torch.randn(clean.shape, generator=generator).to(clean.device)
            losses[label(family, level)] = _bits(model, u, windows.targets)
    return losses


def _bits(model: CharacterGPT, u: Tensor, targets: Tensor) -> Array:
    """Mean cross-entropy of each window in bits per character, (W,)."""
    found = []
    for own, goal in zip(u.split(_CHUNK), targets.split(_CHUNK), strict=True):
        loss = F.cross_entropy(model(u=own).transpose(1, 2), goal, reduction="none")
        found.append(loss.mean(1).double() / math.log(2))
    bits: Array = torch.cat(found).cpu().numpy()
    return bits


@torch.no_grad()
def look_inside(trained: Trained, inputs: Tensor) -> dict[str, float]:
    """Norms, and the margins of the model's own heads on held-out text, for all arms alike; of the stage if any."""
    model = trained.model
    facts = {
        "rms": float(model.embed(inputs).square().mean().sqrt()),
        "parameter_norm": math.sqrt(sum(float(part.double().square().sum()) for part in model.parameters())),
    }
    u = model.embed(inputs[:_LOOKED_AT])
    heads = model.forward_with_heads(u)[1]
    kinds: dict[str, BarrierKind] = {"determinant": "logdet", "singular_value": "singular_value"}
    for name, kind in kinds.items():
        layers = [attention_penalty(*layer, kind=kind) for layer in heads]
        facts |= _margins(f"heads_{name}", layers)
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
    report: Callable[[str], None] = lambda line: None,
) -> list[Record]:
    """Train and evaluate every arm with every seed.

    Each run leaves a file in the folder as soon as it is done, and is taken from there the next time. Runs go through
    joblib, one thread each; those that follow another arm come after it.

    Args:
        arms: which; an arm that is followed must be among them.
        study: sizes and seeds.
        corpus: text.
        folder: of the files; None keeps nothing.
        jobs: processes.
        device: where to train; None: the CPU. A GPU takes one run at a time.
        report: called with a line after each run.

    Returns:
        One record a run, in the order of arms and, within an arm, of seeds.

    Raises:
        InputError: two arms of one name, or one that follows an arm which is missing or itself follows another.
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
        # Seeds outside, so that a study that is cut short has all arms of the first ones.
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
            report(f"robustness: {len(done)} of {total}, {_words(record, fresh)}")
    return [done[arm.name, seed] for arm in arms for seed in study.seeds]


def _run(
    arm: Arm, seed: int, study: Study, corpus: Corpus, folder: Path | None, device: torch.device, leader: Record | None
) -> tuple[Record, bool]:
    """One run, and whether it had to be made."""
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
    """SHA-256 of all that a run depends on."""
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
    """The record in a file, if it is of the same run; a damaged file is made anew."""
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
