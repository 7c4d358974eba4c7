r"""Gains of the two maps of a layer: the one that the barrier guards, and the one that the network applies.

With M_i the derivative of the attention's mean by its own token, the barrier guards I - M_i, the map from a token to
its noise in the generative model. A transformer adds the mean instead: noise on the residual stream is multiplied by

.. math:: I + M_i .

Where a penalty drives det(I - M_i) up, M_i gets large eigenvalues of negative real part, and I + M_i grows with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from scipy import stats
from torch import Tensor

from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.obfuscation import read_models
from probattn.inference.studies.robustness.training import forward_with_streams, residual_attention
from probattn.models.corpus import Corpus
from probattn.models.gpt import CharacterGPT

__all__ = ["Gains", "layer_gains", "measure_gains", "rank_correlations"]

_WINDOWS = 4


class Gains(NamedTuple):
    """Singular values of a layer's two maps, medians over tokens and layers, averaged over seeds.

    Attributes:
        arm: name of the arm.
        smallest: sigma_min(I - M), which the singular-value barrier guards.
        inverse: largest gain of the generative model, 1 / sigma_min(I - M), median.
        update: sigma_max(I + M), the largest gain of the map that the network applies.
        whole: root mean square gain of I + M, the gain of noise in a random direction.
    """

    arm: str
    smallest: float
    inverse: float
    update: float
    whole: float


@torch.no_grad()
def layer_gains(model: CharacterGPT, tokens: Tensor) -> tuple[float, float, float, float]:
    r"""Measure the singular values of I - M and I + M on the residual stream.

    Args:
        model: model.
        tokens: characters, ``(N, T)``.

    Returns:
        Medians over layers and tokens of sigma_min(I - M), its reciprocal, sigma_max(I + M) and the root mean square
        of the singular values of I + M.
    """
    model = model.double()
    streams = forward_with_streams(model, model.embed(tokens))[1]
    blocks = torch.cat(
        [residual_attention(model, number).mean_jacobian(u).flatten(0, 1) for number, u in enumerate(streams)]
    )
    eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
    smallest = torch.linalg.svdvals(eye - blocks)[:, -1]
    update = torch.linalg.svdvals(eye + blocks)
    whole = update.square().mean(-1).sqrt()
    found = (smallest, 1 / smallest, update[:, 0], whole)
    first, second, third, fourth = (float(values.median()) for values in found)
    return first, second, third, fourth


def measure_gains(folder: Path, arms: Sequence[Arm], study: Study, corpus: Corpus, seeds: Sequence[int]) -> list[Gains]:
    """Measure the gains of the models that a study left in its folder.

    Args:
        folder: folder of the runs.
        arms: arms of the study.
        study: sizes.
        corpus: text.
        seeds: seeds; those without weights are left out.

    Returns:
        One entry per arm that has weights.
    """
    tokens = corpus.windows(study.context, heldout=True).inputs[:_WINDOWS]
    found = []
    for arm in arms:
        each = [layer_gains(model, tokens) for model in read_models(folder, arm, study, corpus, seeds).values()]
        if each:
            found.append(Gains(arm.name, *(sum(values) / len(each) for values in zip(*each, strict=True))))
    return found


def rank_correlations(gains: Sequence[Gains], harm: Mapping[str, float]) -> dict[str, float]:
    """Rank arms by each gain and by what noise costs them.

    Args:
        gains: gains by arm.
        harm: loss under noise minus clean loss, by arm.

    Returns:
        Spearman's rank correlation over arms by the name of the gain; NaN for fewer than three arms or equal values.
    """
    shown = [found for found in gains if found.arm in harm]
    result: dict[str, Any] = {}
    for name in ("smallest", "inverse", "update", "whole"):
        values = [getattr(found, name) for found in shown]
        costs = [harm[found.arm] for found in shown]
        varied = len(shown) >= 3 and len(set(values)) > 1 and len(set(costs)) > 1
        result[name] = float(stats.spearmanr(values, costs).statistic) if varied else math.nan
    return result
