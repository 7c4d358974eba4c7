r"""Cost of a contraction: bits per character of character models with and without one.

Two questions. *As a prior*: the language model of :class:`~probattn.models.language.LanguageModel` without a prior on
its embeddings, with the literal one through an unbounded stage, and with the same through a stage that is a contraction
for every past. *In the model itself*: the transformer of :class:`~probattn.models.gpt.CharacterGPT` whose own attention
has :math:`\kappa < 1` in every layer, between its ordinary form and one with a memory radius but no limit. All arms of
a seed start from the same initial values and see the same batches, so that differences are paired.

``python -m probattn.inference.studies.bounded_cost FOLDER`` measures what is missing in a folder and prints the table;
``--minutes M`` begins no run after M minutes. Each run is one file, so that a stopped study goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor

from probattn.barrier import log_barrier, stability_margin
from probattn.errors import InputError, require_choice
from probattn.inference.language import LanguageFit, fit_language
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import prepare_folder, write_json
from probattn.inference.runtime.progress import log_step
from probattn.inference.studies.robustness.arms import Arm, Study
from probattn.inference.studies.robustness.training import one_thread, train
from probattn.models.corpus import Corpus, load_corpus
from probattn.models.gpt import GPTConfig
from probattn.models.language import LanguageConfig, LanguageModel

__all__ = ["OWN", "PRIORS", "Sizes", "compare", "measure_run", "run_study", "table"]

_LOG = logging.getLogger(__name__)

#: Options of the stage by arm: no prior, the literal prior, the same with a contraction for every past. Its radius is
#: the norm of a token whose entries have size one.
PRIORS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "no prior": {"weight": 0.0},
        "prior, unbounded": {"weight": 0.05},
        "prior, κ < 0.9": {"weight": 0.05, "stage_contraction": 0.9},
    }
)
#: Options of the model's own attention by arm; the radius is the norm of a token whose 64 entries have size one.
OWN: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "ordinary": {},
        "radius, no limit": {"memory_radius": 8.0},
        "κ < 0.99": {"memory_radius": 8.0, "contraction": 0.99},
        "κ < 0.9": {"memory_radius": 8.0, "contraction": 0.9},
        "κ < 0.5": {"memory_radius": 8.0, "contraction": 0.5},
    }
)


@dataclass(frozen=True)
class Sizes(Study):
    """Sizes of the study, and what bounds the model's own attention.

    Attributes:
        steps: number of optimiser steps of the transformer, whose own attention is bounded.
        batch: number of windows per step.
        learning_rate: peak learning rate of the transformer; the language model has that of its fit.
        windows: largest number of held-out windows to evaluate.
        prior_steps: number of optimiser steps of the language model with a prior.
        prior_dim: size of its embeddings; smaller, as a step takes three times as long.
        prior_context: number of characters in its windows.
        memory_radius: radius of every attention of the transformer; None for its ordinary form.
        contraction: limit of every attention of the transformer; None for none.
    """

    steps: int = 600
    prior_steps: int = 400
    prior_dim: int = 32
    prior_context: int = 32
    batch: int = 16
    learning_rate: float = 4e-3
    windows: int = 256
    memory_radius: float | None = None
    contraction: float | None = None

    def gpt(self, vocabulary: int) -> GPTConfig:
        """Return the sizes of the transformer.

        Args:
            vocabulary: number of characters.
        """
        sizes = super().gpt(vocabulary)
        return replace(sizes, memory_radius=self.memory_radius, contraction=self.contraction)


def measure_run(arm: str, seed: int, corpus: Corpus, sizes: Sizes) -> dict[str, float]:
    """Train one model and measure it on held-out text.

    Args:
        arm: name from :data:`PRIORS` or :data:`OWN`.
        seed: random seed of initial values and batches.
        corpus: text.
        sizes: sizes; the arm decides about radius and limit.

    Returns:
        ``bits`` per character and ``accuracy`` of the next one, by name; with a prior also the mean ``barrier`` per
        token and the smallest singular value ``sigma_min`` of its blocks, for a bounded model the largest
        ``contraction`` of its layers.

    Raises:
        InputError: an unknown arm, or a run whose objective is not finite.
    """
    require_choice("arm", arm, (*PRIORS, *OWN))
    with one_thread():
        return (_as_prior if arm in PRIORS else _in_the_model)(arm, seed, corpus, sizes)


def _as_prior(arm: str, seed: int, corpus: Corpus, sizes: Sizes) -> dict[str, float]:
    options: dict[str, Any] = dict(PRIORS[arm])
    if "stage_contraction" in options:
        options["stage_radius"] = math.sqrt(sizes.prior_dim)
    config = LanguageConfig(
        len(corpus.vocabulary),
        context=sizes.prior_context,
        dim=sizes.prior_dim,
        layers=sizes.layers,
        decoder_heads=sizes.heads,
        stage_rank=sizes.rank,
        **options,
    )
    model = LanguageModel(config)
    fit = LanguageFit(steps=sizes.prior_steps, batch=sizes.batch, patience=0, seed=seed)
    values, _ = fit_language(model, tuple(corpus.windows(config.context)), fit)
    found = _score(
        corpus, config.context, sizes.windows, lambda inputs: model.decode(values, model.embed(values, inputs))
    )
    if config.weight > 0:
        with torch.no_grad():
            stage, u = (
                model.stage(values),
                model.embed(values, corpus.windows(config.context, heldout=True).inputs[:64]),
            )
            found["barrier"] = float(log_barrier(stage, u).mean())
            found["sigma_min"] = float(stability_margin(stage, u, "singular_value").min())
    return found


def _in_the_model(arm: str, seed: int, corpus: Corpus, sizes: Sizes) -> dict[str, float]:
    options: dict[str, Any] = dict(OWN[arm])
    trained = train(Arm("plain"), seed, corpus, replace(sizes, **options))
    if trained.diverged is not None:
        raise InputError(f"arm {arm}, seed {seed}: the objective is not finite after {trained.diverged} steps.")
    found = _score(corpus, sizes.context, sizes.windows, trained.model)
    if trained.model.config.memory_radius is not None:
        found["contraction"] = max(float(layer.contraction.detach()) for layer in trained.model.attentions())
    return found


@torch.no_grad()
def _score(corpus: Corpus, context: int, most: int, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
    windows = corpus.windows(context, heldout=True)
    loss, right, count = 0.0, 0, 0
    for inputs, targets in zip(*(part[:most].split(128) for part in windows), strict=True):
        logits = predict(inputs).flatten(0, 1)
        loss += float(F.cross_entropy(logits, targets.flatten(), reduction="sum"))
        right += int((logits.argmax(-1) == targets.flatten()).sum())
        count += targets.numel()
    return {"bits": loss / count / math.log(2), "accuracy": right / count}


def run_study(folder: Path, corpus: Corpus, sizes: Sizes, *, minutes: float = 0) -> list[dict[str, Any]]:
    """Measure every arm with every seed, seed by seed, and keep each run in a file.

    Args:
        folder: folder of the runs; those it holds are read, not measured again.
        corpus: text.
        sizes: sizes, with the seeds.
        minutes: time after which no further run begins; 0 for no limit.

    Returns:
        One record per run: arm, seed, seconds and what :func:`measure_run` returns.

    Raises:
        InputError: the folder holds runs of other sizes or another text.
    """
    prepare_folder(folder)
    begin, runs = time.monotonic(), []
    wanted = [(arm, seed) for seed in sizes.seeds for arm in (*OWN, *PRIORS)]
    for number, (arm, seed) in enumerate(wanted, 1):
        identity = _identity(arm, corpus, sizes)
        file = folder / f"{arm.replace(' ', '-').replace('<', 'below')}-{seed}.json"
        if file.exists():
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["identity"] != identity:
                raise InputError(f"{file} was measured with other sizes or another text; name another folder.")
            runs.append(record)
            continue
        if minutes and time.monotonic() - begin > 60 * minutes:
            _LOG.warning("%g minutes are over: %d of %d runs are there", minutes, len(runs), len(wanted))
            break
        start = time.process_time()
        measured = measure_run(arm, seed, corpus, sizes)
        record = {"arm": arm, "seed": seed, "measured": measured, "seconds": time.process_time() - start}
        record |= {"identity": identity, "environment": describe(torch.device("cpu"), torch.float32, seed)}
        write_json(file, record)
        runs.append(record)
        log_step(_LOG, f"{arm}, seed {seed}: {measured['bits']:.3f} bits, {measured['accuracy']:.1%}", number,
                 len(wanted))  # fmt: skip
    return runs


def _identity(arm: str, corpus: Corpus, sizes: Sizes) -> dict[str, Any]:
    """Identity of a run, with the sizes of its own kind alone."""
    fields = sizes.as_dict()
    prior = {name: fields.pop(f"prior_{name}") for name in ("steps", "dim", "context")}
    return {"corpus": corpus.digest, **fields, **(prior if arm in PRIORS else {})}


def compare(runs: Sequence[Mapping[str, Any]], arm: str, reference: str, name: str) -> tuple[float, float, float]:
    """Compare two arms over the seeds that both have.

    Args:
        runs: records of :func:`run_study`.
        arm: arm.
        reference: arm that it is compared with.
        name: name of a measured number.

    Returns:
        The mean of the paired differences, and the ends of its 95 % interval by Student's t.

    Raises:
        InputError: fewer than two seeds in common.
    """
    first, second = (
        {run["seed"]: run["measured"][name] for run in runs if run["arm"] == one} for one in (arm, reference)
    )
    differences = [first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())]
    if len(differences) < 2:
        raise InputError(f"{arm} and {reference} have {len(differences)} seeds in common; measure at least two.")
    half = float(student.ppf(0.975, len(differences) - 1)) * stdev(differences) / math.sqrt(len(differences))
    return fmean(differences), fmean(differences) - half, fmean(differences) + half


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """Write the comparison as a table of Markdown: means over seeds, and paired differences with 95 % intervals.

    Args:
        runs: records of :func:`run_study`.
    """
    lines = [
        "| model | bits per character | difference | accuracy | difference | seeds |",
        "|---|---|---|---|---|---|",
    ]
    for arms in (OWN, PRIORS):
        reference = next(iter(arms))
        for arm in arms:
            own = [run["measured"] for run in runs if run["arm"] == arm]
            if not own:
                continue
            bits, accuracy = (fmean(run[name] for run in own) for name in ("bits", "accuracy"))
            shown = ["", ""]
            if arm != reference and len(own) > 1:
                more, low, high = compare(runs, arm, reference, "bits")
                right, least, most = (100 * part for part in compare(runs, arm, reference, "accuracy"))
                shown = [f"{more:+.3f} [{low:+.3f}, {high:+.3f}]", f"{right:+.1f} [{least:+.1f}, {most:+.1f}] %"]
            lines.append(f"| {arm} | {bits:.3f} | {shown[0]} | {accuracy:.1%} | {shown[1]} | {len(own)} |")
    return "\n".join(lines)


def _main() -> None:
    parser = argparse.ArgumentParser(prog="python -m probattn.inference.studies.bounded_cost")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--corpus", default="python-docs")
    parser.add_argument("--steps", type=int, default=Sizes.steps)
    parser.add_argument("--prior-steps", type=int, default=Sizes.prior_steps)
    parser.add_argument("--seeds", type=int, default=len(Sizes.seeds))
    parser.add_argument("--minutes", type=float, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    sizes = Sizes(seeds=tuple(range(given.seeds)), steps=given.steps, prior_steps=given.prior_steps)
    runs = run_study(given.folder, load_corpus(given.corpus), sizes, minutes=given.minutes)
    write_json(given.folder / "summary.json", {"schema": 1, "sizes": asdict(sizes), "runs": runs})
    print(table(runs))


if __name__ == "__main__":
    _main()
