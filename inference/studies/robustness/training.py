r"""Training character models with and without the barrier: the arms of a comparison, alike in all but what is compared.

Every arm of a seed starts from the same initial values and sees the same batches; what it draws beyond that (noise,
positions of a penalty, an attention stage of its own) comes from generators apart.

.. math:: \mathrm{CE}(y) + \lambda\, \tfrac1n \sum_i b_i

with b_i at the input embeddings, through a stage of its own, or at the model's own heads, mean over heads and layers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from probattn.barrier import BarrierKind
from probattn.embedding_prior import AttentionStage, Prior
from probattn.errors import InputError, require_at_least, require_choice, require_positive, require_share
from probattn.models.corpus import Corpus
from probattn.models.gpt import CharacterGPT, GPTConfig, Heads
from probattn.numerics.random import isolated_seed
from probattn.penalty import attention_penalty

__all__ = ["ARMS", "VARIANTS", "Arm", "Study", "Trained", "batches", "one_thread", "stream", "train"]

Placement = Literal["none", "embeddings", "heads"]


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: short, and unique in a study.
        placement: where the penalty sits: nowhere, on the embeddings through a stage of its own (one head, strict
            mask), or on the model's own heads in every layer (inclusive mask).
        kind: see :func:`~probattn.barrier.log_barrier`.
        weight: lambda.
        prior: of the stage: the penalty alone, or with the Gaussian term.
        normalise: the stage sees embeddings divided by their root mean square.
        frozen: the stage keeps its initial values, and cannot lower the penalty in place of the embeddings.
        positions: share of the positions that a step evaluates, drawn anew; the estimate stays unbiased.
        windows: share of the batch's windows that a step evaluates; as these are drawn at random, so it is unbiased.
        neftune: alpha of uniform noise of half-width alpha / sqrt(T p) on the embeddings in training; 0: none.
        relative_noise: standard deviation of normal noise in training, as a part of the embeddings' own root mean
            square.
        weight_decay: of AdamW, on every parameter.
        steer: an arm whose root mean square of the embeddings is followed, step by step, by rescaling table and
            positions: it tells scale from direction.
        reseed: added to the seed of initial values and batches; what remains is the difference that seeds make.
        reference: the arm that this one is compared with.
        reason: why it is there.
    """

    name: str
    placement: Placement = "none"
    kind: BarrierKind = "logdet"
    weight: float = 0.0
    prior: Prior = "margin"
    normalise: bool = False
    frozen: bool = False
    positions: float = 1.0
    windows: float = 1.0
    neftune: float = 0.0
    relative_noise: float = 0.0
    weight_decay: float = 0.0
    steer: str | None = None
    reseed: int = 0
    reference: str = "plain"
    reason: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("placement", Placement), ("kind", BarrierKind), ("prior", Prior)):
            require_choice(f"arm {self.name}: {name}", getattr(self, name), get_args(allowed))
        for name in ("weight", "neftune", "relative_noise", "weight_decay"):
            require_at_least(f"arm {self.name}: {name}", getattr(self, name), 0)
        for name in ("positions", "windows"):
            require_share(f"arm {self.name}: {name}", getattr(self, name))

    @property
    def barrier(self) -> bool:
        """Whether the arm is training with the barrier and nothing else, so that its result speaks for the barrier."""
        return self.placement != "none" and self.steer is None and self.reference == "plain"

    def as_dict(self) -> dict[str, Any]:
        """What decides the result, by name: everything but the reason."""
        fields = asdict(self)
        del fields["reason"]
        if not self.frozen:
            del fields["frozen"]  # younger than the first results, which stay those of the same arm
        return fields


_KINDS: tuple[BarrierKind, ...] = ("logdet", "one_sided", "smooth", "spectral", "singular_value")
# Shares of positions and windows that keep a step within about three times a plain one, on one thread.
_SHARES: Mapping[tuple[Placement, BarrierKind], tuple[float, float]] = {
    ("embeddings", "spectral"): (0.25, 1.0),
    ("embeddings", "singular_value"): (0.25, 0.25),
    **{("heads", kind): (0.5, 0.5) for kind in ("logdet", "one_sided", "smooth")},
    ("heads", "spectral"): (0.1, 0.25),
    ("heads", "singular_value"): (0.2, 0.25),
}


def _barrier(placement: Placement, kind: BarrierKind, weight: float, name: str = "", **fields: Any) -> Arm:
    positions, windows = _SHARES.get((placement, kind), (1.0, 1.0))
    name = name or f"{placement} {kind} {weight:g}"
    return Arm(name, placement, kind, weight, positions=positions, windows=windows, **fields)


_LITERAL = "embeddings logdet 0.05"

ARMS: tuple[Arm, ...] = (
    Arm("plain", reason="cross-entropy alone: what every other arm is compared with"),
    Arm("plain reseeded", reseed=1000, reason="negative control: what a change of initial values and batches does"),
    Arm("weight decay 0.1", weight_decay=0.1, reason="the usual regulariser"),
    Arm("plain at the barrier's scale", steer=_LITERAL, reason="the scale of the literal barrier without its penalty"),
    _barrier(
        "embeddings",
        "logdet",
        0.05,
        "logdet 0.05 at the plain scale",
        steer="plain",
        reason="the penalty without the scale that comes with it",
    ),
    Arm("NEFTune 5", neftune=5.0, reason="noise training of fixed size (Jain et al., 2310.05914)"),
    Arm("relative noise 0.2", relative_noise=0.2, reason="positive control: noise training must help against noise"),
    _barrier("embeddings", "logdet", 0.02, reason="the literal term of the density, lower weight"),
    *(_barrier("embeddings", kind, 0.05, reason="a stage of its own on the embeddings") for kind in _KINDS),
    _barrier("embeddings", "logdet", 0.05, "embeddings full prior 0.05", prior="full", reason="with the Gaussian term"),
    *(_barrier("heads", kind, 0.05, reason="the model's own heads, every layer") for kind in _KINDS),
)

VARIANTS: tuple[Arm, ...] = (
    _barrier(
        "embeddings",
        "one_sided",
        0.5,
        "embeddings normalised one_sided 0.5",
        normalise=True,
        reason="blind to scale, so that only directions can lower the penalty; ten times the weight, as it has less to "
        "push on",
    ),
    _barrier(
        "embeddings",
        "singular_value",
        0.5,
        "embeddings normalised singular_value 0.5",
        normalise=True,
        reason="the same with the margin that bounds the gain from noise to token",
    ),
    _barrier(
        "embeddings",
        "singular_value",
        0.5,
        "embeddings normalised singular_value 0.5, stage frozen",
        normalise=True,
        frozen=True,
        reason="the same where the stage cannot give way: a free stage soon satisfies a one-sided penalty by itself",
    ),
    _barrier("heads", "one_sided", 0.5, reason="ten times the weight on the heads that do the work"),
    _barrier("heads", "singular_value", 0.5, reason="the same with the margin that bounds the gain"),
    _barrier(
        "heads",
        "one_sided",
        0.05,
        "relative noise 0.2 + heads one_sided 0.05",
        relative_noise=0.2,
        reference="relative noise 0.2",
        reason="does the barrier add to noise training? Compared with that",
    ),
)


@dataclass(frozen=True)
class Study:
    """Sizes of a comparison; the arms are given beside it.

    Attributes:
        seeds: one run of every arm each.
        steps: of the optimiser.
        batch: windows of a step.
        learning_rate: of AdamW at its peak; it rises over the first steps and falls as a cosine to a tenth.
        warmup: those first steps.
        context, dim, layers, heads: of the model.
        rank: r of the stage on the embeddings.
        windows: held-out windows that are evaluated, at most.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 1000
    batch: int = 32
    learning_rate: float = 2e-3
    warmup: int = 50
    context: int = 64
    dim: int = 64
    layers: int = 2
    heads: int = 4
    rank: int = 8
    windows: int = 512

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "context": 3, "dim": 1, "layers": 1, "heads": 1, "rank": 1, "windows": 2}
        for name, smallest in {**least, "warmup": 0}.items():
            require_at_least(name, getattr(self, name), smallest)
        require_positive("learning_rate", self.learning_rate)
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < 2:
            raise InputError(f"seeds are {self.seeds}; give at least two, no one twice.")

    def gpt(self, vocabulary: int) -> GPTConfig:
        """The model's sizes."""
        return GPTConfig(vocabulary, self.context, self.dim, self.layers, self.heads)

    def as_dict(self) -> dict[str, Any]:
        """What one run depends on, by name: everything but the seeds."""
        fields = asdict(self)
        del fields["seeds"]
        return fields


class Trained(NamedTuple):
    """A run.

    Attributes:
        model: as the last finite step left it.
        stage: of the penalty on the embeddings; None without one.
        path: root mean square of the embeddings of the batch, after each step and before the first.
        diverged: the step whose objective or gradient was not finite, where the run was stopped; None: it ran through.
    """

    model: CharacterGPT
    stage: AttentionStage | None
    path: list[float]
    diverged: int | None


def stream(*key: object) -> int:
    """A seed for everything drawn under a key, the same on every machine and unrelated to those of other keys."""
    return int.from_bytes(hashlib.sha256(json.dumps(key).encode()).digest()[:7], "big")


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch in one thread: fastest for tensors this small, and the same sums in whatever process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches(text: Tensor, study: Study, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random windows of the text and their successors, (batch, T) each, one pair a step; the seed alone decides."""
    generator = torch.Generator().manual_seed(stream("batches", seed))
    within = torch.arange(study.context + 1)
    for _ in range(study.steps):
        begin = torch.randint(len(text) - study.context, (study.batch, 1), generator=generator)
        window = text[begin + within]
        yield window[:, :-1], window[:, 1:]


def train(
    arm: Arm,
    seed: int,
    corpus: Corpus,
    study: Study,
    *,
    path: Sequence[float] | None = None,
    device: torch.device | None = None,
) -> Trained:
    """Train one model.

    Args:
        arm: how.
        seed: of initial values and batches.
        corpus: its training text.
        study: sizes.
        path: of the arm that this one follows, where it follows one; see :class:`Trained`.
        device: where; None: the CPU.

    Raises:
        InputError: an arm that follows another without its path, or a text shorter than a window.
    """
    text = corpus.encode(corpus.text)
    if len(text) <= study.context:
        raise InputError(f"corpus {corpus.name}: {len(text)} characters do not hold a window; give a longer text.")
    if arm.steer is not None and (path is None or len(path) != study.steps + 1):
        raise InputError(f"arm {arm.name} follows {arm.steer}: pass its path of {study.steps + 1} numbers.")
    device = device or torch.device("cpu")
    own = seed + arm.reseed
    # Everything else that is drawn: positions of the penalty, the stage, noise.
    with isolated_seed(stream("arm", own), device):
        model = CharacterGPT(study.gpt(len(corpus.vocabulary)), stream("model", own)).to(device)
        stage = None
        if arm.placement == "embeddings":
            stage = AttentionStage(study.dim, rank=study.rank, prior=arm.prior, normalise=arm.normalise).to(device)
            stage.requires_grad_(not arm.frozen)
        return _optimise(arm, model, stage, batches(text, study, own), study, path if arm.steer else None)


def _optimise(
    arm: Arm,
    model: CharacterGPT,
    stage: AttentionStage | None,
    data: Iterator[tuple[Tensor, Tensor]],
    study: Study,
    wanted: Sequence[float] | None,
) -> Trained:
    parameters = [*model.parameters(), *(stage.parameters() if stage is not None and not arm.frozen else ())]
    device = parameters[0].device
    optimiser = torch.optim.AdamW(parameters, lr=study.learning_rate, weight_decay=arm.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, study))
    path: list[float] = []
    for step, (inputs, targets) in enumerate(data):
        inputs, targets = inputs.to(device), targets.to(device)
        if not path:
            path.append(_follow(model, inputs, wanted[0] if wanted is not None else None))
        u = model.embed(inputs)
        logits, heads = model.forward_with_heads(_noisy(u, arm))
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        if arm.weight > 0:
            loss = loss + arm.weight * _penalty(arm, u, heads, stage)
        optimiser.zero_grad()
        loss.backward()
        size = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if not bool(torch.isfinite(loss.detach() + size)):
            return Trained(model, stage, path, step)
        optimiser.step()
        schedule.step()
        path.append(_follow(model, inputs, wanted[step + 1] if wanted is not None else None))
    return Trained(model, stage, path, None)


def _rate(step: int, study: Study) -> float:
    if step < study.warmup:
        return (step + 1) / study.warmup
    done = (step - study.warmup) / max(1, study.steps - study.warmup)
    return 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2


@torch.no_grad()
def _follow(model: CharacterGPT, inputs: Tensor, wanted: float | None) -> float:
    """Root mean square of the embeddings of a batch; brought to the wanted one first where there is one."""
    found = float(model.embed(inputs).square().mean().sqrt())
    if wanted is None or not found > 0:
        return found
    for part in (model.table, model.positions):
        part.mul_(wanted / found)
    return wanted


def _noisy(u: Tensor, arm: Arm) -> Tensor:
    if arm.neftune > 0:
        half = arm.neftune / math.sqrt(u.shape[1] * u.shape[2])
        u = u + half * (2 * torch.rand_like(u) - 1)
    if arm.relative_noise > 0:
        u = u + arm.relative_noise * u.detach().square().mean().sqrt() * torch.randn_like(u)
    return u


def _penalty(arm: Arm, u: Tensor, heads: Sequence[Heads], stage: AttentionStage | None) -> Tensor:
    """b, mean over tokens, heads and layers."""
    first = max(1, round(arm.windows * len(u)))
    if stage is not None:
        return stage.penalty(u[:first], arm.kind, share=arm.positions).mean()
    parts = [
        attention_penalty(*(part[:first] for part in layer), kind=arm.kind, share=arm.positions).mean()
        for layer in heads
    ]
    return torch.stack(parts).mean()
