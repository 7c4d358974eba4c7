"""Options of ``probattn train``."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch

from probattn.barrier import BarrierKind
from probattn.errors import InputError
from probattn.hf.barrier import Placement
from probattn.hf.penalty import require_probes
from probattn.models.causal_lm import Architecture
from probattn.models.options import Device, Range, Seed, check_options

__all__ = ["Precision", "TrainOptions"]

Precision = Literal["float32", "float64", "bf16", "fp16"]


@dataclass(frozen=True)
class TrainOptions:
    """Options of ``probattn train``.

    Attributes:
        corpus: text to train on: python-docs, the path of a UTF-8 file, or hf:NAME[:CONFIG].
        heldout: second text for evaluation; without it, the last tenth of the first.
        model: folder of a local checkpoint with its tokeniser to go on from; without it, a model of characters is
            trained from scratch.
        architecture: architecture of a model from scratch.
        layers: number of layers of a model from scratch.
        dim: size of the hidden states of a model from scratch.
        heads: number of attention heads of a model from scratch, a divisor of dim.
        context: number of tokens in a window.
        dropout: dropout rate of a model from scratch.
        weight: weight lambda of the barrier; 0 trains without it.
        kind: kind of penalty.
        positions: share of the positions at which the barrier is evaluated, drawn anew in each step.
        placement: barrier on the residual stream in front of each attention, or on an attention stage of its own over
            the embeddings.
        barrier_layers: chance of each layer to be evaluated in a step; residual placement only.
        probes: number of random probes per token in place of exact determinants, for kind logdet; 0 is exact.
        steps: number of optimiser steps.
        batch: number of windows in a step, over all processes.
        accumulate: number of parts that a process makes of its share of a batch.
        learning_rate: learning rate of AdamW after the warm-up, from where a cosine takes it to zero.
        weight_decay: weight decay of AdamW.
        warmup: number of steps of warm-up.
        precision: precision; bf16 and fp16 are mixed, and fp16 needs a GPU.
        checkpointing: recompute activations in the backward pass.
        compile: compile the model.
        save_every: number of steps between checkpoints; 0 saves none.
        evaluate_every: number of steps between evaluations; 0 evaluates at the end only.
        log_every: number of steps between lines of the log.
        keep: number of checkpoints that are kept.
        evaluate_windows: number of held-out windows in an evaluation; 0 takes all.
        report_to: trackers of transformers that the metrics are passed on to.
        out: output folder.
        seed: random seed.
        device: where to train; auto takes a GPU where there is one.
        resume: go on from the last whole checkpoint in the output folder.
    """

    corpus: str = "python-docs"
    heldout: str | None = None
    model: Path | None = None
    architecture: Architecture = "gpt2"
    layers: Annotated[int, Range(least=1)] = 2
    dim: Annotated[int, Range(least=1)] = 64
    heads: Annotated[int, Range(least=1)] = 4
    context: Annotated[int, Range(least=1)] = 64
    dropout: Annotated[float, Range(least=0, below=1)] = 0.0
    weight: Annotated[float, Range(least=0)] = 0.05
    kind: BarrierKind = "one_sided"
    positions: Annotated[float, Range(above=0, most=1)] = 0.05
    placement: Placement = "residual"
    barrier_layers: Annotated[float, Range(above=0, most=1)] = 1.0
    probes: Annotated[int, Range(least=0)] = 0
    steps: Annotated[int, Range(least=1)] = 1000
    batch: Annotated[int, Range(least=1)] = 32
    accumulate: Annotated[int, Range(least=1)] = 1
    learning_rate: Annotated[float, Range(above=0)] = 1e-3
    weight_decay: Annotated[float, Range(least=0)] = 0.0
    warmup: Annotated[int, Range(least=0)] = 50
    precision: Precision = field(default="float32", metadata={"aliases": ("--dtype",)})
    checkpointing: bool = False
    compile: bool = False
    save_every: Annotated[int, Range(least=0)] = 200
    evaluate_every: Annotated[int, Range(least=0)] = 200
    log_every: Annotated[int, Range(least=1)] = 20
    keep: Annotated[int, Range(least=1)] = 2
    evaluate_windows: Annotated[int, Range(least=0)] = 256
    report_to: tuple[str, ...] = ()
    out: Path = Path("runs/train")
    seed: Seed = 0
    device: Device = "auto"
    resume: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        if self.dim % self.heads:
            raise InputError(f"dim is {self.dim}, which heads = {self.heads} does not divide; choose a multiple.")
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if self.batch % (world * self.accumulate):
            raise InputError(
                f"batch is {self.batch}, which {world} processes cannot share in {self.accumulate} parts each; give a "
                f"multiple of {world * self.accumulate}."
            )
        require_probes(self.kind, self.probes or None)
        if self.placement == "embeddings" and (self.probes or self.barrier_layers != 1):
            raise InputError("probes and barrier_layers belong to placement residual; leave them out.")
        if self.precision == "fp16" and not torch.cuda.is_available():
            raise InputError("precision fp16 needs a CUDA device; use bf16, float32 or float64 on a CPU.")
