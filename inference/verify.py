"""Fit the language model on a text, measure every claim on it, and write the report."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from probattn.barrier import stability_margin
from probattn.errors import InputError
from probattn.inference.claims import Claim, Settings, Subject, require_claims, run_claims
from probattn.inference.claims.claim import verdict_in_words
from probattn.inference.language import LanguageFit, fit_language
from probattn.inference.methods.draws import Draws
from probattn.inference.reports.verify import draw_figures, render_report, save_figures
from probattn.inference.results.fit_file import Fit
from probattn.inference.runtime.environment import describe, select_device
from probattn.inference.runtime.files import prepare_folder, write_json, write_text
from probattn.inference.runtime.lock import sole_run
from probattn.inference.runtime.progress import log_stage
from probattn.models.corpus import Corpus, Windows, load_corpus
from probattn.models.language import LanguageConfig, LanguageModel
from probattn.models.options import Device, Dtype, Range, Seed, as_plain, check_options
from probattn.plotting import plot_bounds

__all__ = ["VerifyOptions", "verify"]

_EVALUATED = 64
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifyOptions:
    """Options of ``probattn verify``.

    Attributes:
        corpus: text to fit: python-docs, the path of a UTF-8 file, or hf:NAME[:CONFIG].
        heldout: second text for evaluation; without it, the last tenth of the first.
        claims: claims to measure; none stands for all.
        full: measure the whole of each claim; a claim named in claims runs its long study as well.
        jobs: number of processes that share the studies; 0 takes one per core.
        model: language model.
        fit: fit of the language model.
        out: output folder.
        seed: random seed of everything; the fit's own gives way to it.
        device: where to fit; auto takes a GPU where there is one. Claims are measured on the CPU.
        dtype: precision of the fit; claims are measured in float64.
        resume: go on with fit and studies from what is in the output folder.
    """

    corpus: str = "python-docs"
    heldout: str | None = None
    claims: tuple[str, ...] = ()
    full: bool = False
    jobs: Annotated[int, Range(least=0)] = 0
    # The corpus says how large the vocabulary is.
    model: LanguageConfig = field(default_factory=lambda: LanguageConfig(1), metadata={"hidden": ("vocabulary",)})
    fit: LanguageFit = field(default_factory=LanguageFit)
    out: Path = Path("runs/verify")
    seed: Seed = 0
    device: Device = "auto"
    dtype: Dtype = "float64"
    resume: bool = False

    def __post_init__(self) -> None:
        check_options(self)
        require_claims(self.claims)
        object.__setattr__(self, "fit", replace(self.fit, seed=self.seed))
        if self.model.weight == 0:
            raise InputError("weight is 0, which omits the attention prior and leaves nothing to verify; raise it.")
        if self.model.context < 3:
            raise InputError(
                f"context is {self.model.context}; with fewer than 3 characters no token has a past that varies."
            )


@sole_run
def verify(options: VerifyOptions) -> list[Claim]:
    """Run the verification and write the report, ``claims.json``, ``fit.nc``, ``config.json`` and ``figures/*.png``.

    Progress is logged to the loggers below ``probattn.inference``, each claim once it is judged.

    Args:
        options: text, model, claims and where to write.

    Returns:
        The claims.

    Raises:
        InputError: input that cannot be used, before anything is written.
    """
    log_stage(_LOG, "reading the text")
    corpus = load_corpus(options.corpus, heldout=options.heldout)
    config = replace(options.model, vocabulary=len(corpus.vocabulary))
    windows, heldout = corpus.windows(config.context), corpus.windows(config.context, heldout=True)
    device, dtype = select_device(options.device), getattr(torch, options.dtype)
    prepare_folder(options.out)

    model = LanguageModel(config).to(device, dtype)
    shown = Windows(*(part[:_EVALUATED].to(device) for part in heldout))
    log_stage(_LOG, "fitting the language model")
    values, result = fit_language(
        model,
        tuple(part.to(device) for part in windows),
        options.fit,
        checkpoint=options.out / "checkpoint.pt",
        resume=options.resume,
        identity={"corpus": corpus.digest, "dtype": options.dtype},
        evaluate=lambda values: _metrics(model, values, shown),
    )
    subject = Subject(
        LanguageModel(config),
        {name: value.to("cpu", torch.float64) for name, value in values.items()},
        heldout.inputs[:_EVALUATED],
        heldout.targets[:_EVALUATED],
        len(windows.inputs),
        options.seed,
        corpus.vocabulary.index("\n") if "\n" in corpus.vocabulary else None,
        corpus,
    )
    claims = _measure(subject, options)

    record = {
        "schema": 1,
        "environment": describe(device, dtype, options.seed),
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.digest,
            "characters": len(corpus.text),
            "heldout_characters": len(corpus.heldout),
            "vocabulary": len(corpus.vocabulary),
        },
        "options": as_plain(options),
        "model": config.as_dict(),
        "fit": {**vars(options.fit), "steps_taken": result.info["steps"], "stopped": result.info["stopped"]},
    }
    log_stage(_LOG, "drawing the report")
    figures = draw_figures(subject, corpus, result.history)
    for claim in claims:
        figures |= {f"claim-{name}": figure for name, figure in claim.figures.items()}
    images = save_figures(figures, options.out / "figures")
    _as_fit(subject, corpus, result, record).save(options.out / "fit.nc")
    write_json(options.out / "claims.json", {"schema": 1, "claims": [claim.as_dict() for claim in claims]})
    write_json(options.out / "config.json", record)
    write_text(options.out / "report.html", render_report(subject, corpus, claims, images, record, result.history))
    return claims


def _measure(subject: Subject, options: VerifyOptions) -> list[Claim]:
    studies = options.out / "studies"
    if options.full:
        if not options.resume:
            shutil.rmtree(studies, ignore_errors=True)
        studies.mkdir(exist_ok=True)
    settings = Settings(
        full=options.full,
        jobs=options.jobs or os.cpu_count() or 1,
        folder=studies if options.full else None,
    )
    claims = run_claims(
        subject,
        lambda claim: _LOG.info("claim %s: %s (%.1f s)", claim.id, verdict_in_words(claim), claim.seconds),
        names=options.claims,
        settings=settings,
    )
    return [replace(claim, figures=claim.figures or _bounds_figure(claim)) for claim in claims]


def _bounds_figure(claim: Claim) -> dict[str, Figure]:
    return {claim.id: plot_bounds(claim.measured, claim.bound)} if claim.bound and claim.verdict != "not_run" else {}


def _metrics(model: LanguageModel, values: dict[str, Tensor], windows: Windows) -> dict[str, float]:
    """Held-out cross-entropy, barrier, margins and norm at the current values."""
    with torch.no_grad():
        u = model.embed(values, windows.inputs)
        logits = model.decode(values, u)
        attention = model.stage(values)
        sign, logabs = attention.logabsdet(u)
        return {
            "cross_entropy": float(F.cross_entropy(logits.flatten(0, 1), windows.targets.flatten())),
            "barrier": float(-logabs.mean()),
            "negative_determinants": float((sign < 0).sum()),
            "smallest_margin": float(stability_margin(attention, u).min()),
            "embedding_norm": float(values["embedding"].square().mean().sqrt()),
        }


def _as_fit(subject: Subject, corpus: Corpus, result: Draws, record: Mapping[str, Any]) -> Fit:
    """The mode with what it implies on held-out text, in ArviZ's groups."""
    attention, u = subject.attention, subject.tokens(_EVALUATED)
    point = {name: value.numpy()[None, None] for name, value in subject.values.items()}
    implied = {
        "log_abs_det": attention.logabsdet(u)[1].numpy()[None, None],
        "margin": stability_margin(attention, u).numpy()[None, None],
    }
    history = {f"history_{name}": np.asarray(values) for name, values in result.history.items()}
    dims = {
        "qk_matrix": ["head", "key_feature", "query_feature"],
        "log_abs_det": ["window", "token"],
        "margin": ["window", "token"],
        "embedding": ["character", "feature"],
        "position": ["token", "feature"],
        "query": ["head", "query_dim", "feature"],
        "key": ["head", "query_dim", "feature"],
        "characters": ["window", "token"],
        "inputs": ["window", "token"],
        **{name: ["evaluation"] for name in history},
    }
    environment = record["environment"]
    return Fit(
        "map",
        {
            "posterior": {"qk_matrix": attention.qk_matrix.numpy()[None, None], **point},
            "tokens": implied,
            "observed_data": {"characters": subject.targets.numpy()},
            "constant_data": {"inputs": subject.inputs.numpy(), **history},
        },
        dims,
        {"character": [f"U+{ord(character):04X}" for character in corpus.vocabulary]},
        {
            "corpus": corpus.name,
            "seed": environment["seed"],
            "date": environment["date"],
            "hardware": f"{environment['processor']}; {environment['device']}",
            **{f"version_{name}": version for name, version in environment["versions"].items()},
        },
    )
