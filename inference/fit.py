"""One question, one command: the posterior of attention parameters given sequences, with diagnostics and figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from probattn.attention import Mask
from probattn.errors import InputError, require_choice
from probattn.inference.methods.draws import Draws, feasible_start
from probattn.inference.methods.laplace import LaplaceConfig, fit_laplace
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import MapConfig, fit_map
from probattn.inference.methods.mcmc import fit_nuts
from probattn.inference.methods.nuts import NutsConfig
from probattn.inference.methods.svi import SviConfig, fit_svi
from probattn.inference.results.comparison import AS_ASKED, Compared, compare, variants
from probattn.inference.results.diagnosis import Diagnosis, diagnose
from probattn.inference.results.fit_file import Fit
from probattn.inference.results.posterior import assemble
from probattn.inference.runtime.checkpoint import identify
from probattn.inference.runtime.distributed import process_group, rank, world_size
from probattn.inference.runtime.environment import describe
from probattn.inference.runtime.files import finite_or_null, prepare_folder, write_figure, write_json, write_text
from probattn.models.corpus import load_corpus
from probattn.models.embedding import EmbeddingModel, Parameters
from probattn.models.hidden_states import load_hidden_states
from probattn.models.language import LanguageConfig, LanguageModel
from probattn.plotting import plot_chains, plot_comparison, plot_margin_bands, plot_posterior

__all__ = ["FitOptions", "Method", "fit"]

Method = Literal["nuts", "svi", "laplace", "map"]
Report = Callable[[str], None]


@dataclass(frozen=True)
class FitOptions:
    """What to infer, from what, how, and where to write.

    Attributes:
        out: output folder.
        data: hidden states, see :func:`probattn.models.hidden_states.load_hidden_states`; or
        corpus: a text, see :func:`probattn.models.corpus.load_corpus`: a language model is fitted by MAP and the
            posterior is that of its attention stage, given the rest.
        array: which array of the file.
        sequences: use so many at most, from the beginning; 0 takes all.
        standardise: subtract the mean of all tokens and divide by their root mean square, one number each.
        method: "nuts", "svi", "laplace" or "map".
        heads, rank, value_dim, mask, prior_scale, jacobian: of the :class:`EmbeddingModel`. Without rank and value_dim
            the QK matrix itself is the parameter, with either its factors are.
        nuts, svi, map, language: options of the methods and of the language model. Their seed is ``seed``.
        laplace_draws: draws of the Laplace approximation.
        compare: fit these variants too and compare them by leave-one-sequence-out: of "jacobian", "mask", "heads".
        correct: whether approximations are corrected by importance resampling.
        seed: of everything random.
        device: where to compute.
        dtype: precision.
        resume: go on from the checkpoint in ``out``.
    """

    out: Path
    data: Path | None = None
    corpus: str | None = None
    array: str | None = None
    sequences: int = 0
    standardise: bool = False
    method: Method = "nuts"
    heads: int = 1
    rank: int | None = None
    value_dim: int | None = None
    mask: Mask = "strict"
    prior_scale: float = 1.0
    jacobian: bool = True
    nuts: NutsConfig = field(default_factory=NutsConfig)
    svi: SviConfig = field(default_factory=SviConfig)
    map: MapConfig = field(default_factory=lambda: MapConfig(learning_rate=0.03, patience=10, tolerance=1e-6, shards=2))
    language: Mapping[str, Any] = field(default_factory=dict)
    laplace_draws: int = 2000
    correct: bool = True
    compare: tuple[str, ...] = ()
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float64
    resume: bool = False

    def __post_init__(self) -> None:
        if (self.data is None) == (self.corpus is None):
            raise InputError("give either --data with hidden states or --corpus with a text, not both and not neither.")
        require_choice("--method", self.method, get_args(Method))
        if self.compare and (self.method == "map" or self.corpus is not None):
            raise InputError("--compare needs draws of a likelihood: --data, and --method nuts, svi or laplace.")
        if self.sequences < 0:
            raise InputError(f"--sequences is {self.sequences}; it must be at least 1, or 0 for all.")

    @property
    def parameters(self) -> Parameters:
        """What the sites of the model are."""
        return "qk_matrix" if self.rank is None and self.value_dim is None else "factors"


def fit(options: FitOptions, report: Report | None = None) -> tuple[Fit, Diagnosis]:
    """Infer, judge and write ``fit.nc``, ``diagnosis.json``, ``summary.csv``, ``config.json`` and ``figures/*.png``.

    Args:
        options: see :class:`FitOptions`.
        report: called with a line now and then.

    Returns:
        The fit and its diagnosis. Under ``torchrun`` all processes return the same and the first one writes.

    Raises:
        InputError: input that cannot be used.
    """
    report = report or (lambda line: None)
    with process_group():
        if world_size() > 1 and options.method in ("nuts", "laplace"):
            raise InputError(
                f"--method {options.method} runs in one process and {world_size()} were started; use svi or map, or "
                "start it plainly (nuts with --chain-method process takes several cores)."
            )
        model, u, facts = _problem(options, report)
        target = LogDensity(model, u)
        others = variants(model, options.compare)  # refused before the work, not after it
        draws = _infer(options, target, report)
        record = {
            "schema": 1,
            "environment": describe(options.device, options.dtype, options.seed),
            "processes": world_size(),
            "data": facts,
            "model": {name: value for name, value in vars(model).items() if isinstance(value, (int, float, str))},
            "method": {"name": draws.method, **draws.notes},
        }
        found = assemble(target, draws, seed=options.seed, attributes=_attributes(options, model, record))
        diagnosis = diagnose(found)
        compared = _compare(options, others, draws, u, report) if options.compare else []
        if rank() == 0:
            _write(options.out, found, diagnosis, record)
            if compared:
                _write_comparison(options.out, compared)
    return found, diagnosis


def _problem(options: FitOptions, report: Report) -> tuple[EmbeddingModel, Tensor, dict[str, Any]]:
    """The model, its sequences (N, T, p), and what is to be recorded of them."""
    if options.corpus is not None:
        return _stage_of_language_model(options, report)
    assert options.data is not None  # FitOptions has seen to it
    u = load_hidden_states(options.data, array=options.array)
    u = u[: options.sequences or None]
    facts: dict[str, Any] = {"name": options.data.name, "shape": list(u.shape), "rms": float(u.square().mean().sqrt())}
    if options.standardise:
        centre, scale = float(u.mean()), float(u.std())
        if scale == 0:
            raise InputError(f"data {options.data}: all numbers are equal; there is nothing to infer.")
        u = (u - centre) / scale
        facts |= {"subtracted": centre, "divided_by": scale}
    prepare_folder(options.out)
    model = EmbeddingModel(
        u.shape[1],
        u.shape[2],
        heads=options.heads,
        rank=options.rank,
        value_dim=options.value_dim,
        prior_scale=options.prior_scale,
        mask=options.mask,
        parameters=options.parameters,
        jacobian=options.jacobian,
    )
    return model.to(options.device, options.dtype), u.to(options.device, options.dtype), facts


def _stage_of_language_model(options: FitOptions, report: Report) -> tuple[EmbeddingModel, Tensor, dict[str, Any]]:
    """The attention stage of a language model at MAP, as a model of its embeddings with a tempered likelihood."""
    assert options.corpus is not None
    corpus = load_corpus(options.corpus)
    config = LanguageConfig(vocabulary=len(corpus.vocabulary), mask=options.mask, **options.language)
    if config.context < 3:
        raise InputError(f"--context is {config.context}; with fewer than 3 tokens no token has a past that varies.")
    windows = corpus.windows(config.context)
    prepare_folder(options.out)
    language = LanguageModel(config).to(options.device, options.dtype)
    result = fit_map(
        language,
        tuple(part.to(options.device) for part in windows),
        MapConfig(steps=options.map.steps, batch=options.map.batch, shards=options.map.shards, seed=options.seed),
        initial_values=language.initial_values(options.seed),
        identity={"corpus": corpus.digest, **config.as_dict(), "dtype": str(options.dtype)},
        checkpoint=options.out / "language.pt",
        resume=options.resume,
        report=lambda step, metrics: report(f"language model step {step}: objective {metrics['objective']:.4f}"),
    )
    kept = options.sequences or 32
    with torch.no_grad():
        u = language.embed(result.values, windows.inputs[:kept].to(options.device))
    model = EmbeddingModel(
        config.context,
        config.dim,
        heads=config.stage_heads,
        rank=config.stage_rank,
        prior_scale=config.prior_scale * config.dim**0.5,
        mask=config.mask,
        noise_scale=config.noise_scale,
        # The windows that are kept stand for all.
        power=config.weight * len(windows.inputs) / len(u),
        jacobian=options.jacobian,
    )
    facts = {"name": corpus.name, "sha256": corpus.digest, "shape": list(u.shape), "windows": len(windows.inputs)}
    return model.to(options.device, options.dtype), u, facts


def _compare(
    options: FitOptions, models: Mapping[str, EmbeddingModel], own: Draws, u: Tensor, report: Report
) -> list[Compared]:
    def infer(name: str, target: LogDensity) -> Draws:
        if name == AS_ASKED:
            return own
        report(f"fitting {name}")
        return _infer(options, target, report, name.replace(" ", "-"))

    compared = compare(models, u, infer)
    for entry in compared:
        report(f"compared  {entry}")
    return compared


def _infer(options: FitOptions, target: LogDensity, report: Report, variant: str = "") -> Draws:
    described = json.dumps({**identify(target.model, target.data), "device": options.device.type}, sort_keys=True)
    checkpoint = options.out / f"{'-'.join(filter(None, (options.method, variant)))}.pt"
    if options.method == "laplace":
        return fit_laplace(
            target, LaplaceConfig(draws=options.laplace_draws, seed=options.seed, correct=options.correct)
        )
    keep: dict[str, Any] = {"checkpoint": checkpoint, "resume": options.resume}
    if options.method == "nuts":

        def transitions(done: int, of: int) -> None:
            if done % 50 == 0 or done == of:
                report(f"nuts transition {done} of {of}")

        return fit_nuts(target, options.nuts, identity=described, report=transitions, **keep)
    if options.method == "svi":
        report_loss = lambda step, loss: report(f"svi step {step}: objective {loss:.4f}")  # noqa: E731
        return fit_svi(target, options.svi, identity=described, report=report_loss, **keep)
    start = target.constrain(feasible_start(target, 1, options.seed)[0])
    result = fit_map(
        target.model,
        target.data,
        options.map,
        initial_values=start,
        report=lambda step, metrics: report(f"map step {step}: objective {metrics['objective']:.6f}"),
        **keep,
    )
    z = target.unconstrain(result.values)[None, None]
    notes: dict[str, str | int | float] = {"steps": result.steps, "stopped": result.stopped}
    return Draws("map", z, {"lp": target.evaluate(z[0])["lp"].unsqueeze(0)}, notes)


def _attributes(options: FitOptions, model: EmbeddingModel, record: Mapping[str, Any]) -> dict[str, Any]:
    environment = record["environment"]
    return {
        "data": str(record["data"]["name"]),
        "mask": model.mask,
        "power": model.power,
        "jacobian": int(model.jacobian),
        "max_depth": options.nuts.max_depth,
        "seed": options.seed,
        "command": environment["command"],
        "date": environment["date"],
        "dtype": environment["dtype"],
        "hardware": f"{environment['processor']}; {environment['device']}",
        **{f"version_{name}": version for name, version in environment["versions"].items()},
    }


def _write(out: Path, found: Fit, diagnosis: Diagnosis, record: dict[str, Any]) -> None:
    from arviz_stats import summary

    found.save(out / "fit.nc")
    names = [name for name in _SUMMARISED if name in found.groups["posterior"]]
    kind = "stats" if found.method == "map" else "all"
    table = summary(found.to_datatree(), var_names=names, kind=kind, round_to=None)
    write_text(out / "summary.csv", table.to_csv())
    write_json(out / "diagnosis.json", {"schema": 1, **diagnosis.as_dict()})
    write_json(out / "config.json", finite_or_null(record))
    folder = prepare_folder(out / "figures")
    for name, figure in _figures(found).items():
        write_figure(folder / f"{name}.png", figure)


def _write_comparison(out: Path, compared: list[Compared]) -> None:
    write_json(out / "comparison.json", {"schema": 1, "models": [vars(entry) for entry in compared]})
    differences = {entry.name: (entry.difference, entry.difference_se) for entry in compared}
    write_figure(out / "figures" / "comparison.png", plot_comparison(differences))


_SUMMARISED = ("qk_matrix", "ov_matrix", "noise_scale", "smallest_margin")


def _figures(found: Fit) -> dict[str, Any]:
    posterior, prior = found.groups["posterior"], found.groups["prior"]
    shown: dict[str, np.ndarray[Any, Any]] = {}
    before: dict[str, np.ndarray[Any, Any]] = {}
    for name in _SUMMARISED:
        values = np.asarray(posterior.get(name, np.zeros((1, 1, 0))))
        for index in list(np.ndindex(*values.shape[2:]))[:16]:
            at = (slice(None), slice(None), *index)
            label = f"{name}{list(index) if index else ''}"
            shown[label] = values[at]
            if name in prior:
                before[label] = np.asarray(prior[name])[at].ravel()
    chains = np.asarray(posterior["margin"])
    margin = chains[:, :, 0].reshape(-1, chains.shape[-1])
    logabs = np.asarray(posterior["log_abs_det"])[:, :, 0].reshape(margin.shape)
    figures = {"margins": plot_margin_bands(margin, logabs)}
    if found.method != "map":
        figures["posterior"] = plot_posterior({label: values.ravel() for label, values in shown.items()}, before)
    if found.method == "nuts":
        figures["chains"] = plot_chains(shown, np.asarray(found.groups["sample_stats"]["diverging"], dtype=bool))
    return figures
