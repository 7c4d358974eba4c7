"""Diagnosis of a fit: numbers, words, a remedy for each finding, and one verdict."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from probattn.inference.methods.importance import RELIABLE
from probattn.inference.results.comparison import LEAST_DRAWS, leave_one_out, standard_error
from probattn.inference.results.contraction import contraction, logit_spread, scale_words
from probattn.inference.results.fit_file import Fit
from probattn.inference.results.posterior import REGIMES

__all__ = ["Diagnosis", "Finding", "Level", "diagnose"]

Array = NDArray[Any]
Level = Literal["good", "note", "warning", "problem"]
_VERDICTS = {
    "good": "reliable",
    "note": "reliable",
    "warning": "usable with care",
    "problem": "not reliable",
}
_PARAMETERS = ("qk_matrix", "ov_matrix", "strength", "inverse_temperature", "noise_scale", "logit_change")
_JUDGED = (*_PARAMETERS, "smallest_margin")
_AGREE, _DISAGREE = 1.01, 1.05  # R-hat up to which chains agree, and beyond which they do not (Vehtari et al., 2021)
_ENOUGH = 100  # effective draws per chain (Vehtari et al., 2021, arXiv 1903.08008)
_HARDLY = 10  # effective draws per chain below which no interval can be read
_DIVERGENT = 0.01  # share of divergences that is a problem rather than a warning
_BFMI = 0.3  # fraction of missing information on energies that is low (Betancourt, 2016, arXiv 1604.00695)
_SATURATED = 0.01  # share of trajectories ended by their depth that is worth a warning
_CLOSE = 0.5  # k-hat up to which importance weights have a finite variance (Vehtari et al., 2024, arXiv 1507.02646)
_FOLDED = 0.05  # share of folded draws that is a problem rather than a warning
_SENSITIVE = 0.05  # power-scaling sensitivity that matters (Kallioinen et al., 2024, arXiv 2107.14054)
_NEAR = 0.05  # |det J| below which a draw counts as at the boundary
_FOR_SENSITIVITY = 100  # draws per chain below which sensitivities are noise
_FOR_CONTRACTION = 50  # draws in all below which their widths are noise


@dataclass(frozen=True)
class Finding:
    """Result of one diagnostic.

    Attributes:
        about: name of the diagnostic.
        level: "good", "note" (worth knowing), "warning" or "problem".
        words: result in words and, unless it is good, the remedy.
    """

    about: str
    level: Level
    words: str


@dataclass(frozen=True)
class Diagnosis:
    """All findings and the verdict.

    Attributes:
        findings: findings in the order in which they were made.
        numbers: numbers behind them, by name.
    """

    findings: list[Finding]
    numbers: dict[str, float]

    @property
    def verdict(self) -> str:
        """Verdict by the worst level, one of "reliable", "usable with care" and "not reliable"."""
        worst = max(self.findings, key=lambda finding: list(_VERDICTS).index(finding.level))
        return _VERDICTS[worst.level]

    def __str__(self) -> str:
        lines = [f"{finding.level:>7}  {finding.about}: {finding.words}" for finding in self.findings]
        return "\n".join([*lines, f"verdict  {self.verdict}"])

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; a number that is not finite is null."""
        numbers = {name: value if np.isfinite(value) else None for name, value in self.numbers.items()}
        return {"verdict": self.verdict, "findings": [vars(finding) for finding in self.findings], "numbers": numbers}


def diagnose(fit: Fit) -> Diagnosis:
    """Judge a fit by what its method allows to check.

    Checked are: R-hat, bulk and tail ESS and MCSE of what is identified; divergences and how near det J = 0 they end;
    E-BFMI; saturated trees; k-hat of an approximation; convergence of SVI; the regime at the data; the order of heads;
    the scale of the data; what was learned of each parameter; sensitivity to the prior by power scaling;
    leave-one-sequence-out. Remedies are options of the method that made the fit.

    Args:
        fit: fit with the groups of :func:`probattn.inference.results.posterior.assemble`.
    """
    numbers: dict[str, float] = {}
    findings: list[Finding] = []
    if fit.method == "map":
        words = "a point: it says nothing of how sure it is; use --method nuts, svi or laplace for that."
        findings += [Finding("uncertainty", "warning", words), *_approximation(fit, numbers)]
    elif fit.method == "nuts":
        findings += _chains(fit, numbers)
        findings += _transitions(fit, numbers)
    else:
        findings += _approximation(fit, numbers)
    findings += _regime(fit, numbers)
    share = 100 * float(fit.attributes.get("heads_reordered", 0.0))
    if share > 0:
        findings.append(
            Finding("heads", "note", f"their order differed in {share:.0f} % of the draws and was matched.")
        )
    findings += _scale(fit, numbers)
    if fit.method != "map":
        findings += _learned(fit, numbers)
        findings += _prior(fit, numbers)
        findings += _leave_one_out(fit, numbers)
    return Diagnosis(findings, numbers)


def _scalars(fit: Fit) -> Iterator[tuple[str, Array]]:
    """Every judged number by name, ``(chain, draw)`` each."""
    for name in _JUDGED:
        if name in fit.groups["posterior"]:
            values = np.asarray(fit.groups["posterior"][name])
            if name == "smallest_margin" and np.ptp(values) == 0:
                continue  # repulsion on a line: no token has a smaller margin than the first, whatever the parameters
            for index in np.ndindex(*values.shape[2:]):
                label = f"{name}[{', '.join(map(str, index))}]" if index else name
                yield label, values[(slice(None), slice(None), *index)]


def _chains(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    from arviz_stats.base import array_stats

    named = dict(_scalars(fit))
    chains, draws = next(iter(named.values())).shape
    worst = {}
    level: Level
    for name, ary in named.items():
        worst[name] = {
            "rhat": float(array_stats.rhat(ary, chain_axis=0, draw_axis=1)) if chains > 1 else np.nan,
            "bulk": float(array_stats.ess(ary, chain_axis=0, draw_axis=1, method="bulk")),
            "tail": float(array_stats.ess(ary, chain_axis=0, draw_axis=1, method="tail", prob=(0.05, 0.95))),
            "mcse": float(array_stats.mcse(ary, chain_axis=0, draw_axis=1)) / max(float(ary.std()), 1e-300),
        }
    if chains > 1:
        # One that is not defined, of a chain that does not move, comes before any number.
        at = max(worst, key=lambda name: np.nan_to_num(worst[name]["rhat"], nan=np.inf))
        rhat = numbers["rhat"] = worst[at]["rhat"]
        if rhat <= _AGREE:
            yield Finding("R-hat", "good", f"at most {rhat:.3f} ({at}): the chains agree.")
        else:
            remedy = "run longer (--warmup, --draws); if it stays, look for several modes or reduce --heads."
            level = "warning" if rhat <= _DISAGREE else "problem"
            yield Finding("R-hat", level, f"{rhat:.3f} for {at}: the chains do not agree; {remedy}")
    else:
        yield Finding("R-hat", "warning", "one chain cannot be compared with others; use --chains 4.")
    for kind in ("bulk", "tail"):
        # One that is not defined comes before any number.
        at = min(worst, key=lambda name: np.nan_to_num(worst[name][kind], nan=-1.0))
        size = numbers[f"ess_{kind}"] = worst[at][kind]
        if not np.isfinite(size):
            yield Finding(f"{kind} ESS", "warning", f"not defined for {draws} draws per chain ({at}): raise --draws.")
            continue
        enough = size >= _ENOUGH * chains
        words = f"at least {size:.0f} of {chains * draws} draws ({at})"
        needed = int(1.2 * _ENOUGH * draws * chains / size)
        remedy = "" if enough else f"; fewer than {_ENOUGH} per chain: raise --draws to about {needed}"
        level = "good" if enough else "warning" if size >= _HARDLY * chains else "problem"
        yield Finding(f"{kind} ESS", level, f"{words}{remedy}.")
    at = max(worst, key=lambda name: worst[name]["mcse"])
    numbers["mcse_over_sd"] = worst[at]["mcse"]
    yield Finding("MCSE", "good", f"a mean is off by at most {100 * worst[at]['mcse']:.1f} % of its deviation ({at}).")


def _transitions(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    from arviz_stats.base import array_stats

    stats = fit.groups["sample_stats"]
    diverging = np.asarray(stats["diverging"], dtype=bool)
    count = numbers["divergences"] = int(diverging.sum())
    if count and "smallest_abs_det" not in fit.groups["posterior"]:
        level: Level = "problem" if count > _DIVERGENT * diverging.size else "warning"
        yield Finding("divergences", level, f"{count}; raise --target-accept to 0.95.")
    elif count:
        gaps = np.asarray(fit.groups["posterior"]["smallest_abs_det"])[diverging]
        near = numbers["divergences_near_boundary"] = int((gaps < _NEAR).sum())
        place = f"{near} of them end within {_NEAR} of det J = 0"
        if 2 * near >= count:
            words = "at the fold boundary"
            remedy = f"the data reach the degeneracy boundary: {_tighter(fit)}or raise --target-accept"
        else:
            words = "away from the boundary"
            remedy = "raise --target-accept to 0.95"
        level = "problem" if count > _DIVERGENT * diverging.size else "warning"
        yield Finding("divergences", level, f"{count} {words}: {place}; {remedy}.")
    else:
        yield Finding("divergences", "good", "none.")
    if "energy" in stats:
        fraction = numbers["ebfmi"] = float(np.min(array_stats.bfmi(np.asarray(stats["energy"]))))
        fine = fraction >= _BFMI
        remedy = "" if fine else ": the momenta explore the energies slowly; run longer (--draws)"
        yield Finding("E-BFMI", "good" if fine else "warning", f"at least {fraction:.2f}{remedy}.")
    if "tree_depth" in stats:
        deepest = np.asarray(stats["tree_depth"])
        share = numbers["saturated_trees"] = float((deepest >= fit.attributes.get("max_depth", 10)).mean())
        if share > _SATURATED:
            words = f"{100 * share:.0f} % of the trajectories ended by their depth; raise --max-depth{_rescale(fit)}."
            yield Finding("trees", "warning", words)


def _approximation(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    info = fit.attributes
    if info.get("stopped") == "steps":
        yield Finding("convergence", "warning", "the step limit ended the fit, not the rule; raise --steps.")
    elif "stopped" in info:
        yield Finding("convergence", "good", f"the rule ended the fit after {info['steps']} steps.")
    flat = int(info.get("flat_directions", 0))
    if flat:
        remedy = "check with --method nuts"
        words = f"{flat} directions do not change the density and were left out; k-hat is not defined: {remedy}."
        yield Finding("flat directions", "warning", words)
    if "khat_guide" not in info:
        return
    guide = numbers["khat_guide"] = float(info["khat_guide"])
    if info.get("corrected"):
        numbers["khat"], numbers["importance_ess"] = float(info["khat"]), float(info["importance_ess"])
        words = (
            f"{guide:.2f} for the approximation alone, {numbers['khat']:.2f} after correction by importance "
            f"resampling; its draws are worth {numbers['importance_ess']:.0f} independent ones."
        )
        few = numbers["importance_ess"] < _ENOUGH
        yield Finding("k-hat", "warning" if few else "good", words + (" Raise --draws." if few else ""))
    else:
        level: Level = "good" if guide <= _CLOSE else "warning" if guide <= RELIABLE else "problem"
        remedy = {
            "good": "the approximation is close",
            "warning": "usable for means, not for tails",
            "problem": f"the approximation is not the posterior; use {_closer(fit)}",
        }[level]
        yield Finding("k-hat", level, f"{guide:.2f}: {remedy}.")


def _regime(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    if "regime" not in fit.groups.get("tokens", {}):
        return
    codes = np.asarray(fit.groups["tokens"]["regime"])
    shares = {name: float((codes == k).mean()) for k, name in enumerate(REGIMES)}
    numbers |= {f"share_{name}": share for name, share in shares.items()}
    words = ", ".join(f"{100 * share:.0f} % {name}" for name, share in shares.items())
    if shares["folded"] > 0:
        draws = (codes == REGIMES.index("folded")).reshape(codes.shape[0] * codes.shape[1], -1).any(-1)
        numbers["folded_draws"] = int(draws.sum())
        where = f"{int(draws.sum())} of {len(draws)} draws fold at one of the {codes[0, 0].size} sequences looked at"
        words += f"; {where}: there the likelihood is not a density and the posterior has no meaning"
        remedy = f"; {_tighter(fit) or 'infer with smaller --context '}or leave these draws out of any conclusion"
        level: Level = "problem" if shares["folded"] > _FOLDED else "warning"
        yield Finding("regime at the data", level, f"{words}{remedy}.")
    else:
        yield Finding("regime at the data", "good" if shares["certified"] == 1 else "note", f"{words}.")


def _from_text(fit: Fit) -> bool:
    """True if the data are embeddings of a text, whose prior comes with the language model."""
    return fit.attributes.get("source") == "text"


def _tighter(fit: Fit) -> str:
    return "" if _from_text(fit) else "tighten the prior (--prior-scale) "


def _rescale(fit: Fit) -> str:
    return "" if _from_text(fit) or fit.attributes.get("standardised") else ", or use --standardise"


def _closer(fit: Fit) -> str:
    """Options that come closer to the posterior than the method of a fit does."""
    if fit.method != "svi":
        return "--method svi or nuts"
    guides = {"full_rank": "--guide flow", "flow": ""}
    better = guides.get(str(fit.attributes.get("guide")), "--guide full_rank or flow")
    return f"{better}, or --method nuts" if better else "--method nuts"


def _scale(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    prior, u = fit.groups.get("prior", {}), fit.groups.get("observed_data", {}).get("u")
    if "qk_matrix" not in prior or u is None:
        return
    spread = numbers["prior_logit_spread"] = logit_spread(_flat(prior["qk_matrix"]), np.asarray(u))
    rms = numbers["data_rms"] = float(np.sqrt(np.square(u).mean()))
    words = scale_words(spread, rms, standardise=bool(_rescale(fit)))
    if words:
        yield Finding("scale of the data", "warning", f"{words}.")


def _learned(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    """Contraction of each parameter by the data."""
    posterior, prior = fit.groups["posterior"], fit.groups.get("prior", {})
    for name in _PARAMETERS:
        if name not in posterior or name not in prior:
            continue
        draws = _flat(posterior[name])
        if len(draws) < _FOR_CONTRACTION:
            words = f"{len(draws)} draws are too few to compare with the prior; take at least {_FOR_CONTRACTION}."
            yield Finding(f"learned of {name}", "note", words)
            continue
        found = contraction(draws, _flat(prior[name]))
        numbers[f"contraction_{name}"] = float(found.contraction.mean())
        unlearned = found.unlearned
        count, total = int(unlearned.sum()), unlearned.size
        mean = f"mean contraction {numbers[f'contraction_{name}']:.2f}"
        about = f"learned of {name}"
        if found.nothing:
            words = f"nothing: the posterior is the prior in {count} of {total} entries ({mean})"
            yield Finding(about, "problem", f"{words}; more or longer sequences, or data of another scale, are needed.")
        elif count:
            named = [f"[{', '.join(map(str, index))}]" for index in np.argwhere(unlearned)[:3]]
            more = ", ..." if count > len(named) else ""
            words = f"{count} of {total} entries are as the prior has them: {', '.join(named)}{more} ({mean})"
            level: Level = "warning" if 2 * count >= total else "note"
            yield Finding(about, level, f"{words}; do not read them as found in the data.")
        else:
            yield Finding(about, "good", f"every entry is narrower than its prior, or elsewhere ({mean}).")


def _flat(values: Array) -> Array:
    """Draws of all chains, ``(S, *event)``."""
    values = np.asarray(values)
    return values.reshape(-1, *values.shape[2:])


def _prior(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    from arviz_stats import psense

    present = [name for name in _PARAMETERS if name in fit.groups["posterior"]]
    scored = np.asarray(fit.groups["log_likelihood"]["u"]).shape[1]
    if scored < np.asarray(fit.groups["posterior"][present[0]]).shape[1]:  # some of the draws alone have one
        return
    if np.asarray(fit.groups["posterior"][present[0]]).shape[1] < _FOR_SENSITIVITY:
        return
    tree = fit.to_datatree()
    moved = {group: psense(tree, var_names=present, group=group) for group in ("prior", "likelihood")}
    largest = {group: max(float(found[name].max()) for name in present) for group, found in moved.items()}
    numbers["prior_sensitivity"] = largest["prior"]
    sensitive = [name for name in present if float(moved["prior"][name].max()) > _SENSITIVE]
    if not sensitive:
        yield Finding("prior", "good", f"power-scaling sensitivity at most {largest['prior']:.3f}.")
        return
    names = " and ".join(sensitive)
    if any(float(moved["likelihood"][name].max()) > _SENSITIVE for name in sensitive):
        words = f"{names} move when it is scaled, and so with the likelihood: prior and data may conflict"
    else:
        words = f"{names} move when it is scaled and hardly with the likelihood: the data say little of them"
    remedy = "" if _from_text(fit) else "; report the result under another --prior-scale too"
    yield Finding("prior", "warning", f"{words}{remedy}.")


def _leave_one_out(fit: Fit, numbers: dict[str, float]) -> Iterator[Finding]:
    if float(fit.attributes.get("power", 1.0)) != 1:
        yield Finding("leave-one-out", "note", "the likelihood is raised to a power; there is no predictive density.")
        return
    if not fit.attributes.get("jacobian", 1):
        words = "without its Jacobian the likelihood is no density of the sequences; the posterior has no meaning"
        yield Finding("likelihood", "problem", f"{words}, and is here to be compared: omit --no-jacobian.")
        return
    pointwise = np.asarray(fit.groups["log_likelihood"]["u"])
    sequences = pointwise.shape[-1]
    if sequences < 2:
        words = "one sequence only: leaving it out leaves nothing; give more sequences for model comparison."
        yield Finding("leave-one-out", "note", words)
        return
    if pointwise[..., 0].size < LEAST_DRAWS:
        words = f"{pointwise[..., 0].size} draws are too few to fit the tail of the weights: take {LEAST_DRAWS} in all."
        yield Finding("leave-one-out", "note", words)
        return
    elpd, khat = leave_one_out(pointwise)
    numbers["elpd_loo"], numbers["elpd_loo_se"] = float(elpd.sum()), standard_error(elpd)
    bad = numbers["loo_khat_bad"] = int((khat > RELIABLE).sum())
    words = f"elpd {numbers['elpd_loo']:.1f} +- {numbers['elpd_loo_se']:.1f} over {sequences} sequences"
    if bad == sequences:
        words += (
            f"; every one decides too much to be left out by weights (k-hat > {RELIABLE}), and this number means "
            "little: give more sequences, or fewer parameters "
            "(--rank, --heads; of a layer --update-rank, --update-heads)"
        )
    elif bad:
        words += f"; {bad} of them decide too much to be left out by weights (k-hat > {RELIABLE}): refit without them"
    yield Finding("leave-one-sequence-out", "note" if bad else "good", f"{words}.")
