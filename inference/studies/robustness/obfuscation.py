"""Check that an arm resists attacks and does not merely hide its gradients from them.

An attack of more steps, or of several random starts, must find about as much as the study's attack does; and a text
that was made to mislead the model of another seed must not mislead more than one made for the model itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.attacks import attack_characters, attack_embeddings, window_bits
from probattn.inference.studies.robustness.corruptions import CLEAN, FAMILIES
from probattn.inference.studies.robustness.evaluation import Text
from probattn.inference.studies.robustness.rules import RELEVANT
from probattn.inference.studies.robustness.study import weights_file
from probattn.inference.studies.robustness.training import stream
from probattn.models.corpus import Corpus, Windows
from probattn.models.gpt import CharacterGPT

__all__ = ["ATTACKS", "Attacked", "attack_harder", "check_obfuscation", "read_models"]

_WINDOWS, _LONGER, _STARTS = 32, 12, 3
#: Names of the attacks, in the order of the table.
ATTACKS = ("embedding attack", "of more steps", "of random starts", "character attack", "from another seed")


class Attacked(NamedTuple):
    """Losses of an arm under stronger and transferred attacks, in bits per character, averaged over seeds.

    Attributes:
        arm: name of the arm.
        losses: losses by "clean" and :data:`ATTACKS`; no transfer with one seed.
        seeds: seeds behind them.
    """

    arm: str
    losses: Mapping[str, float]
    seeds: tuple[int, ...]

    @property
    def suspicious(self) -> bool:
        """True if another seed's text misleads more than the arm's own, a sign of hidden gradients."""
        return self.losses.get("from another seed", 0.0) > self.losses["character attack"]

    def left(self, plain: Attacked) -> float:
        """Share of the gain over plain training that the strongest attack leaves.

        NaN where the gain is below 5 % of the harm (``RELEVANT``).

        Args:
            plain: losses of plain training.
        """
        gain = plain.losses["embedding attack"] - self.losses["embedding attack"]
        harm = plain.losses["embedding attack"] - plain.losses[CLEAN]
        strongest = [max(found.losses[name] for name in ATTACKS[:3]) for found in (plain, self)]
        return (strongest[0] - strongest[1]) / gain if gain > RELEVANT * harm else float("nan")


def check_obfuscation(
    folder: Path, arms: Sequence[Arm], study: Study, corpus: Corpus, seeds: Sequence[int]
) -> list[Attacked]:
    """Attack the models that a study left in its folder.

    Args:
        folder: folder of the runs.
        arms: arms of the study.
        study: sizes.
        corpus: text.
        seeds: seeds to attack; those without weights, of diverged runs, are left out.

    Returns:
        One entry per arm that has weights.
    """
    windows = Windows(*(part[:_WINDOWS] for part in corpus.windows(study.context, heldout=True)))
    text = Text.of(corpus)
    found = []
    for arm in arms:
        models = read_models(folder, arm, study, corpus, seeds)
        if models:
            found.append(attack_harder(arm.name, models, windows, text.frequency > 0))
    return found


def read_models(folder: Path, arm: Arm, study: Study, corpus: Corpus, seeds: Sequence[int]) -> dict[int, CharacterGPT]:
    """Read the models of an arm that a study left in its folder.

    Args:
        folder: folder of the runs.
        arm: arm of the study.
        study: sizes.
        corpus: text.
        seeds: seeds; those without weights are left out.

    Returns:
        Models by seed, on the CPU, their parameters without gradients.
    """
    models = {}
    for seed in seeds:
        file = weights_file(folder, arm.name, seed)
        if file.is_file():
            model = CharacterGPT(study.gpt(len(corpus.vocabulary)))
            model.load_state_dict(torch.load(file, weights_only=True))
            models[seed] = model.requires_grad_(False)
    return models


def attack_harder(arm: str, models: Mapping[int, Any], windows: Windows, allowed: Tensor) -> Attacked:
    """Attack the models of an arm with more steps, from random starts, and with each other's texts.

    Args:
        arm: name of the arm.
        models: models by seed, their parameters without gradients.
        windows: held-out text, (W, T).
        allowed: True for the characters that may be put in, (V,).

    Returns:
        Losses averaged over seeds and windows. Time per model: about 75 forward passes.
    """
    tokens, targets = windows
    radius, count = FAMILIES["embedding attack"][-1], min(int(FAMILIES["character attack"][-1]), tokens.shape[1])
    sums: dict[str, list[float]] = {}
    texts = {}
    for seed, model in models.items():
        with torch.no_grad():
            clean = window_bits(model, model.embed(tokens), targets)
        usual = attack_embeddings(model, tokens, targets, radius)
        longer = attack_embeddings(model, tokens, targets, radius, steps=_LONGER)
        starts = [
            attack_embeddings(model, tokens, targets, radius, generator=_generator(seed, start))
            for start in range(_STARTS)
        ]
        (own,), texts[seed] = attack_characters(model, tokens, targets, [count], allowed)
        for name, bits in zip(
            (CLEAN, *ATTACKS[:4]), (clean, usual, longer, torch.stack(starts).amax(0), own), strict=True
        ):
            sums.setdefault(name, []).append(float(bits.mean()))
    seeds = list(models)
    if len(seeds) > 1:
        for one, other in pairwise([*seeds, seeds[0]]):
            with torch.no_grad():
                bits = window_bits(models[other], models[other].embed(texts[one]), targets)
            sums.setdefault(ATTACKS[4], []).append(float(bits.mean()))
    return Attacked(arm, {name: sum(values) / len(values) for name, values in sums.items()}, tuple(seeds))


def _generator(seed: int, start: int) -> torch.Generator:
    return torch.Generator().manual_seed(stream("attack from a random start", seed, start))
