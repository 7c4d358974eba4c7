"""Arms of the study: ways of training that differ in one respect each, and the sizes they share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from probattn.barrier import BarrierKind
from probattn.embedding_prior import Prior
from probattn.errors import InputError, require_at_least, require_choice, require_positive, require_share
from probattn.models.gpt import GPTConfig

__all__ = ["ARMS", "RADIUS", "VARIANTS", "Arm", "Study"]

Placement = Literal["none", "embeddings", "residual"]


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: short name, unique in a study.
        placement: place of the penalty: "none", "embeddings" (through a stage of its own with one head and the strict
            mask) or "residual" (on the residual stream in front of the attention of every layer).
        kind: kind of the penalty, see :func:`~probattn.barrier.log_barrier`.
        weight: weight lambda of the penalty.
        prior: "margin" for the penalty alone, "full" with the Gaussian term of the stage.
        contraction: limit kappa in (0, 1) of the stage's contraction on the ball of radius :data:`RADIUS` (theory,
            section 11); 0 for a free stage.
        positions: share of the positions that a step evaluates, drawn anew each time; the estimate stays unbiased.
        windows: share of the windows of the batch that a step evaluates; they are in random order, so that the
            estimate stays unbiased.
        neftune: alpha of uniform noise of half-width alpha / sqrt(T p) on the embeddings in training (Jain et al.,
            2023, arXiv 2310.05914); 0 for none.
        symmetric_noise: alpha of noise of plus or minus alpha / sqrt(T p), every draw used with both signs (Yadav and
            Singh, 2023, arXiv 2312.01523); a step costs two.
        relative_noise: standard deviation of normal noise in training, as a fraction of the root mean square of the
            embeddings.
        adversarial: length of the one step up the gradient that every embedding takes, as a fraction of its own norm;
            the objective is the mean of both losses (Miyato et al., 2017, arXiv 1605.07725). A step costs two.
        cap: largest spectral norm of the products c W_K^T W_Q and W_O W_V of every head, which are scaled back after
            each step; 0 for none.
        jasmin: weight of the penalty on the largest spectral norm of the softmax's Jacobian in each head (after Yudin
            et al., 2025, arXiv 2507.07814).
        weight_decay: weight decay of AdamW, on every parameter.
        length: number of steps as a multiple of the study's.
        steer: name of an arm whose root mean square of the embeddings this one follows step by step, by rescaling
            table and positions; it separates scale from direction.
        reseed: number added to the seed of initial values and batches, for the difference that seeds make.
        reference: name of the arm that this one is compared with.
        reason: purpose of the arm.
    """

    name: str
    placement: Placement = "none"
    kind: BarrierKind = "logdet"
    weight: float = 0.0
    prior: Prior = "margin"
    contraction: float = 0.0
    positions: float = 1.0
    windows: float = 1.0
    neftune: float = 0.0
    symmetric_noise: float = 0.0
    relative_noise: float = 0.0
    adversarial: float = 0.0
    cap: float = 0.0
    jasmin: float = 0.0
    weight_decay: float = 0.0
    length: float = 1.0
    steer: str | None = None
    reseed: int = 0
    reference: str = "plain"
    reason: str = ""

    def __post_init__(self) -> None:
        for name, allowed in (("placement", Placement), ("kind", BarrierKind), ("prior", Prior)):
            require_choice(f"arm {self.name}: {name}", getattr(self, name), get_args(allowed))
        for name in _AMOUNTS:
            require_at_least(f"arm {self.name}: {name}", getattr(self, name), 0)
        for name in ("positions", "windows"):
            require_share(f"arm {self.name}: {name}", getattr(self, name))
        require_positive(f"arm {self.name}: length", self.length)
        if self.contraction >= 1:
            raise InputError(f"arm {self.name}: contraction is {self.contraction}; it must lie below 1.")

    @property
    def barrier(self) -> bool:
        """True if the arm trains with the barrier and nothing else, so that its result speaks for the barrier."""
        return self.placement != "none" and self.steer is None and self.reference == "plain"

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that decide the result, by name: all but the reason."""
        fields = asdict(self)
        del fields["reason"]
        return fields


_AMOUNTS = (
    "weight",
    "contraction",
    "neftune",
    "symmetric_noise",
    "relative_noise",
    "adversarial",
    "cap",
    "jasmin",
    "weight_decay",
)
#: Radius of the ball on which a contractive stage sees the embeddings: the norm of initial embeddings of size 64.
RADIUS = 4.0
# Shares of positions and windows that keep a step within about twice a plain one, on one thread.
_SHARES: Mapping[tuple[Placement, BarrierKind], tuple[float, float]] = {
    ("embeddings", "singular_value"): (0.25, 0.25),
    ("residual", "logdet"): (0.1, 0.25),
    ("residual", "one_sided"): (0.1, 0.25),
    ("residual", "singular_value"): (0.1, 0.25),
}


def _barrier(placement: Placement, kind: BarrierKind, weight: float, name: str = "", **fields: Any) -> Arm:
    positions, windows = _SHARES.get((placement, kind), (1.0, 1.0))
    name = name or f"{placement} {kind} {weight:g}"
    return Arm(name, placement, kind, weight, positions=positions, windows=windows, **fields)


_LITERAL = "embeddings logdet 0.05"
_KINDS: tuple[BarrierKind, ...] = ("logdet", "one_sided", "singular_value")

ARMS: tuple[Arm, ...] = (
    Arm("plain", reason="cross-entropy alone: what every other arm is compared with"),
    Arm("relative noise 0.2", relative_noise=0.2, reason="positive control: noise training must help against noise"),
    _barrier("residual", "logdet", 0.05, reason="the literal term on the stream in front of every attention"),
    _barrier("residual", "one_sided", 0.05, reason="no reward for large determinants"),
    _barrier("residual", "singular_value", 0.05, reason="the margin that bounds the gain from noise to token"),
    _barrier("residual", "logdet", 0.02, reason="the literal term, lower weight"),
    Arm("adversarial 0.1", adversarial=0.1, reason="one-step adversarial training (Miyato et al., 1605.07725)"),
    Arm("plain reseeded", reseed=1000, reason="negative control: what a change of initial values and batches does"),
    *(_barrier("embeddings", kind, 0.05, reason="a free stage of its own on the embeddings") for kind in _KINDS),
    *(
        _barrier(
            "embeddings",
            kind,
            0.05,
            f"contractive {kind} 0.05",
            contraction=0.9,
            reason="a stage that cannot reach the boundary",
        )
        for kind in _KINDS
    ),
    _barrier("embeddings", "logdet", 0.05, "full prior 0.05", prior="full", reason="with the Gaussian term"),
    Arm("plain, twice the steps", length=2.0, reason="equal compute for the arms whose steps cost two"),
    Arm("plain, half the steps", length=0.5, reason="with the longer run: plain training at other clean losses"),
    Arm("weight decay 0.1", weight_decay=0.1, reason="the usual regulariser"),
    Arm("NEFTune 5", neftune=5.0, reason="noise training of fixed size (Jain et al., 2310.05914)"),
    Arm("symmetric noise 5", symmetric_noise=5.0, reason="the same with both signs (Yadav and Singh, 2312.01523)"),
    Arm("spectral cap 0.5", cap=0.5, reason="a bound on the attention's products, with a guarantee"),
    Arm("JaSMin 0.5", jasmin=0.5, reason="a penalty on the softmax's Jacobian (after Yudin et al., 2507.07814)"),
    Arm("plain at the barrier's scale", steer=_LITERAL, reason="the scale of the literal barrier without its penalty"),
    _barrier(
        "embeddings",
        "logdet",
        0.05,
        "logdet 0.05 at the plain scale",
        steer="plain",
        reason="the penalty without the scale that comes with it",
    ),
)

VARIANTS: tuple[Arm, ...] = (
    _barrier("residual", "one_sided", 0.5, reason="ten times the weight on the layers that do the work"),
    _barrier("residual", "singular_value", 0.5, reason="the same with the margin that bounds the gain"),
    _barrier(
        "residual",
        "one_sided",
        0.05,
        "relative noise 0.2 + residual one_sided 0.05",
        relative_noise=0.2,
        reference="relative noise 0.2",
        reason="does the barrier add to noise training? Compared with that",
    ),
)


@dataclass(frozen=True)
class Study:
    """Sizes of a study.

    Attributes:
        seeds: random seeds; every arm has one run per seed.
        steps: number of optimiser steps.
        batch: number of windows per step.
        learning_rate: peak learning rate of AdamW; it rises during the warm-up and falls as a cosine to a tenth.
        warmup: number of warm-up steps.
        context: number T of characters per window.
        dim: size p of the embeddings.
        layers: number of layers of the model.
        heads: number of heads per layer.
        rank: rank r of the stage on the embeddings.
        windows: largest number of held-out windows to evaluate.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 500
    batch: int = 16
    learning_rate: float = 6e-3
    warmup: int = 50
    context: int = 64
    dim: int = 48
    layers: int = 2
    heads: int = 4
    rank: int = 8
    windows: int = 128

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch": 1, "context": 3, "dim": 1, "layers": 1, "heads": 1, "rank": 1, "windows": 2}
        for name, smallest in {**least, "warmup": 0}.items():
            require_at_least(name, getattr(self, name), smallest)
        require_positive("learning_rate", self.learning_rate)
        if len(set(self.seeds)) != len(self.seeds) or len(self.seeds) < 2:
            raise InputError(f"seeds are {self.seeds}; give at least two, all different.")

    def gpt(self, vocabulary: int) -> GPTConfig:
        """Return the sizes of the model.

        Args:
            vocabulary: number of characters.
        """
        return GPTConfig(vocabulary, self.context, self.dim, self.layers, self.heads)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that one run depends on, by name: all but the seeds."""
        fields = asdict(self)
        del fields["seeds"]
        return fields
