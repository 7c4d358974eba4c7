"""The language model at the mode of its posterior, which ``verify`` and ``fit`` start from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from probattn.inference.methods.draws import Draws
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import Evaluate, MapConfig, fit_map
from probattn.models.language import LanguageModel
from probattn.models.options import Range

__all__ = ["LanguageFit", "fit_language"]


@dataclass(frozen=True)
class LanguageFit(MapConfig):
    """Fit of the language model, by MAP.

    Minibatches make its objective noisy: a smaller learning rate than for the posterior of an attention alone, and an
    improvement that counts only if it stands out from the noise.
    """

    steps: Annotated[int, Range(least=1)] = 2000
    batch: Annotated[int, Range(least=0)] = 32
    learning_rate: Annotated[float, Range(above=0)] = 3e-3
    patience: Annotated[int, Range(least=0)] = 5
    tolerance: Annotated[float, Range(least=0)] = 1e-3
    shards: Annotated[int, Range(least=1)] = 1


def fit_language(
    model: LanguageModel,
    windows: tuple[Tensor, ...],
    config: LanguageFit,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    evaluate: Evaluate | None = None,
) -> tuple[dict[str, Tensor], Draws]:
    """Fit a language model to windows of text by MAP.

    Args:
        model: model, on the device of the windows.
        windows: characters and their successors, ``(N, T)`` each.
        config: options.
        checkpoint: file for the state; None keeps none.
        resume: continue from the checkpoint if it exists.
        identity: names and values that tell this fit from others.
        evaluate: metrics of the values of the sites, recorded beside the objective.

    Returns:
        Values of the sites at the mode, by name, and the mode as draws, with info and history.
    """
    target = LogDensity(model, *windows)
    draws = fit_map(
        target,
        config,
        start=target.unconstrain(model.initial_values(config.seed)),
        checkpoint=checkpoint,
        resume=resume,
        identity={**model.config.as_dict(), **(identity or {})},
        evaluate=evaluate,
    )
    return target.constrain(draws.z[0, 0]), draws
