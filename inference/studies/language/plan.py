"""Sizes, controls and jobs of the study of margins, the jobs in the order of their importance."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from probattn.hf.margins import Control, Kind, Map
from probattn.models.options import Range, Seed, check_options

__all__ = ["CONTROLS", "EIGENVALUES", "VOLUME", "Growth", "Job", "Plan"]

#: Controls of where the blocks of a trained model lie.
CONTROLS: tuple[Control, ...] = tuple(control for control in get_args(Control) if control != "none")
#: Margins that need a factorisation of the block.
VOLUME: tuple[Kind, ...] = ("logabsdet", "sigma_min")
#: Margins that need its eigenvalues.
EIGENVALUES: tuple[Kind, ...] = ("spectral", "complex")

What = Literal["margins", "noise", "growth"]


@dataclass(frozen=True)
class Growth:
    """Training of small models of our own, with the margins along it.

    Attributes:
        layers: number of layers.
        dim: size of the residual stream.
        heads: number of attention heads, a divisor of dim.
        context: number of characters in a window.
        training_steps: number of optimiser steps.
        batch: number of windows in a step.
        learning_rate: learning rate of AdamW after the warm-up, from where a cosine takes it to a tenth.
        looks: number of times that the margins are measured, evenly in the logarithm of the steps, and at the start.
        measured_windows: number of held-out windows that the margins are measured on.
        stride: distance of the positions that the margins are measured at.
        runs: number of models, which differ by their seeds.
    """

    layers: Annotated[int, Range(least=1)] = 6
    dim: Annotated[int, Range(least=2)] = 64
    heads: Annotated[int, Range(least=1)] = 4
    context: Annotated[int, Range(least=4)] = 96
    training_steps: Annotated[int, Range(least=1)] = 3000
    batch: Annotated[int, Range(least=1)] = 32
    learning_rate: Annotated[float, Range(above=0)] = 2e-3
    looks: Annotated[int, Range(least=1)] = 14
    measured_windows: Annotated[int, Range(least=2)] = 12
    stride: Annotated[int, Range(least=1)] = 8
    runs: Annotated[int, Range(least=0)] = 2

    def __post_init__(self) -> None:
        check_options(self)

    def looked_at(self) -> list[int]:
        """Numbers of steps after which the margins are measured, from 0.

        Example:
            >>> Growth(training_steps=100, looks=3).looked_at()
            [0, 1, 10, 100]
        """
        last = self.training_steps
        steps = (round(last ** (k / max(1, self.looks - 1))) for k in range(self.looks))
        return sorted({0, *steps, last})


@dataclass(frozen=True)
class Job:
    """One piece of work, whose result is saved.

    Attributes:
        table: name of the table that it adds to.
        what: kind of work.
        first: number of its first text, or of its training run.
        count: number of texts.
        control: control of the margins.
        kinds: kinds of margins.
        maps: maps whose blocks are measured.
        stride: distance of the positions.
    """

    table: str
    what: What
    first: int
    count: int
    control: Control = "none"
    kinds: tuple[Kind, ...] = ()
    maps: tuple[Map, ...] = ()
    stride: int = 1


@dataclass(frozen=True)
class Plan:
    """Sizes of the measurements on a language model.

    Attributes:
        windows: number of texts, one window each.
        length: number of tokens in a window.
        control_windows: number of windows that the controls are measured on, the first ones.
        control_stride: distance of the positions of the controls.
        eigenvalue_stride: distance of the positions at which eigenvalues are computed.
        draws: number of noise draws.
        chunk: number of windows that are measured, and saved, at a time.
        eigenvalue_chunk: the same where eigenvalues are computed.
        controls: controls to measure.
        seed: random seed of noise and controls.
    """

    windows: Annotated[int, Range(least=2)] = 24
    length: Annotated[int, Range(least=20)] = 256
    control_windows: Annotated[int, Range(least=2)] = 12
    control_stride: Annotated[int, Range(least=1)] = 2
    eigenvalue_stride: Annotated[int, Range(least=1)] = 4
    draws: Annotated[int, Range(least=1)] = 16
    chunk: Annotated[int, Range(least=1)] = 4
    eigenvalue_chunk: Annotated[int, Range(least=1)] = 2
    controls: tuple[str, ...] = CONTROLS
    growth: Growth = field(default_factory=Growth)
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_options(self)

    def jobs(self) -> list[Job]:
        """List all jobs, the most important first; where time runs out, the rest is missing.

        The blocks of the text and the noise come before the controls, and eigenvalues, which cost most, come last,
        with every control as far as the text.
        """
        both: tuple[Map, ...] = ("generator", "update")
        one: tuple[Map, ...] = ("generator",)
        controls: list[Control] = [control for control in CONTROLS if control in self.controls]
        found = [Job("text", "margins", *part, "none", VOLUME, both) for part in self._parts(self.windows)]
        found += [Job("noise", "noise", *part) for part in self._parts(self.windows)]
        found += [
            Job(control, "margins", *part, control, VOLUME, one, self.control_stride)
            for part in self._parts(min(self.control_windows, self.windows))
            for control in controls
        ]
        found += [Job("growth", "growth", run, 1) for run in range(self.growth.runs)]
        groups: list[Control] = ["none", *controls]
        for first, count in self._parts(self.windows, self.eigenvalue_chunk):
            for control in groups:
                if control == "none":
                    found.append(
                        Job(
                            "text-eigenvalues",
                            "margins",
                            first,
                            count,
                            control,
                            EIGENVALUES,
                            both,
                            self.eigenvalue_stride,
                        )
                    )
                elif first < self.control_windows:
                    own = min(count, self.control_windows - first)
                    name = f"{control}-eigenvalues"
                    found.append(Job(name, "margins", first, own, control, EIGENVALUES, one, self.eigenvalue_stride))
        return found

    def _parts(self, windows: int, chunk: int | None = None) -> Iterator[tuple[int, int]]:
        """First window and number of windows of each chunk."""
        chunk = chunk or self.chunk
        for first in range(0, windows, chunk):
            yield first, min(chunk, windows - first)
