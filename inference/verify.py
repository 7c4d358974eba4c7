"""Fit the language model on a text, measure every claim on it, and write the report."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from probattn.barrier import stability_margin
from probattn.errors import InputError, require_at_least
from probattn.inference.claims import Claim, Settings, Subject, require_claims, run_claims
from probattn.inference.methods.map import MapConfig, MapResult, fit_map
from probattn.inference.reports.verify import draw_figures, render_report, save_figures
from probattn.inference.results.fit_file import Fit
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import prepare_folder, write_json, write_text
from probattn.models.corpus import Corpus, Windows, load_corpus
from probattn.models.language import LanguageConfig, LanguageModel
from probattn.plotting import plot_bounds

__all__ = ["VerifyOptions", "verify"]

_EVALUATED = 64


@dataclass(frozen=True)
class VerifyOptions:
    """What to verify, on which text, and where to write.

    Attributes:
        out: output folder.
        corpus: see :func:`probattn.models.corpus.load_corpus`.
        heldout: a second text for evaluation; None holds out the end of the first.
        fit: how to optimise; its seed is the seed of everything.
        model: fields of :class:`LanguageConfig` other than the vocabulary.
        device: where to fit; claims are measured on the CPU in float64.
        dtype: precision of the fit.
        claims: which claims to measure; none: all.
        full: measure the whole of each claim instead of a representative part.
        jobs: processes that share the studies.
        resume: continue from the checkpoint in ``out``.
    """

    out: Path
    corpus: str = "python-docs"
    heldout: str | None = None
    fit: MapConfig = field(default_factory=MapConfig)
    model: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float64
    claims: tuple[str, ...] = ()
    full: bool = False
    jobs: int = 1
    resume: bool = False

    def __post_init__(self) -> None:
        require_claims(self.claims)
        require_at_least("--jobs", self.jobs)


def verify(
    options: VerifyOptions,
    *,
    report: Callable[[str], None] = lambda line: None,
    on_fit: Callable[[int, dict[str, float]], None] | None = None,
    on_claim: Callable[[Claim], None] | None = None,
) -> list[Claim]:
    """Run the verification and write the report, ``claims.json``, ``fit.nc``, ``config.json`` and ``figures/*.png``.

    Args:
        options: see :class:`VerifyOptions`.
        report: called with a line now and then while a study runs.
        on_fit: called after each evaluation of the fit.
        on_claim: called with each claim once it is judged.

    Returns:
        The claims.

    Raises:
        InputError: input that cannot be used, before anything is written.
    """
    corpus = load_corpus(options.corpus, heldout=options.heldout)
    config = LanguageConfig(vocabulary=len(corpus.vocabulary), **options.model)
    if config.weight == 0:
        raise InputError(
            "--weight 0 leaves the attention prior out, and there is nothing to verify; give a positive lambda."
        )
    if config.context < 3:
        raise InputError(
            f"--context is {config.context}; with fewer than 3 characters no token has a past that varies."
        )
    windows, heldout = corpus.windows(config.context), corpus.windows(config.context, heldout=True)
    prepare_folder(options.out)

    model = LanguageModel(config).to(options.device, options.dtype)
    result = _fit(model, corpus, windows, heldout, options, on_fit)
    values = {name: value.to("cpu", torch.float64) for name, value in result.values.items()}
    subject = Subject(
        LanguageModel(config),
        values,
        heldout.inputs[:_EVALUATED],
        heldout.targets[:_EVALUATED],
        len(windows.inputs),
        options.fit.seed,
        corpus.vocabulary.index("\n") if "\n" in corpus.vocabulary else None,
        corpus,
    )
    studies = options.out / "studies"
    if options.full:
        if not options.resume:
            shutil.rmtree(studies, ignore_errors=True)
        studies.mkdir(exist_ok=True)
    settings = Settings(full=options.full, jobs=options.jobs, folder=studies if options.full else None, report=report)
    claims = run_claims(subject, on_claim, names=options.claims, settings=settings)

    record = {
        "schema": 1,
        "environment": describe(options.device, options.dtype, options.fit.seed),
        "corpus": {
            "name": corpus.name,
            "sha256": corpus.digest,
            "characters": len(corpus.text),
            "heldout_characters": len(corpus.heldout),
            "vocabulary": len(corpus.vocabulary),
        },
        "model": config.as_dict(),
        "fit": {**vars(options.fit), "steps_taken": result.steps, "stopped": result.stopped},
    }
    claims = [replace(claim, figures=claim.figures or _bounds_figure(claim)) for claim in claims]
    figures = draw_figures(subject, corpus, result.history)
    for claim in claims:
        figures |= {f"claim-{name}": figure for name, figure in claim.figures.items()}
    images = save_figures(figures, options.out / "figures")
    _as_fit(subject, corpus, result, record).save(options.out / "fit.nc")
    write_json(options.out / "claims.json", {"schema": 1, "claims": [claim.as_dict() for claim in claims]})
    write_json(options.out / "config.json", record)
    write_text(options.out / "report.html", render_report(subject, corpus, claims, images, record, result.history))
    return claims


def _fit(
    model: LanguageModel,
    corpus: Corpus,
    windows: Windows,
    heldout: Windows,
    options: VerifyOptions,
    report: Callable[[int, dict[str, float]], None] | None,
) -> MapResult:
    shown = Windows(*(part[:_EVALUATED].to(options.device) for part in heldout))
    return fit_map(
        model,
        tuple(part.to(options.device) for part in windows),
        options.fit,
        initial_values=model.initial_values(options.fit.seed),
        evaluate=lambda values: _metrics(model, values, shown),
        identity={**model.config.as_dict(), "corpus": corpus.digest, "dtype": str(options.dtype)},
        checkpoint=options.out / "checkpoint.pt",
        resume=options.resume,
        report=report,
    )


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


def _as_fit(subject: Subject, corpus: Corpus, result: MapResult, record: Mapping[str, Any]) -> Fit:
    """The mode with what it implies on held-out text, in ArviZ's groups."""
    attention, u = subject.attention, subject.tokens(_EVALUATED)
    point = {name: value.numpy()[None, None] for name, value in subject.values.items()}
    implied = {
        "qk_matrix": attention.qk_matrix.numpy()[None, None],
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
            "posterior": {**implied, **point},
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
