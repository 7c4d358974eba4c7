"""The verification report: one HTML file that holds the text, the figures and the verdicts, and needs no network."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from scipy.optimize import minimize_scalar
from torch import Tensor

from probattn import plotting
from probattn.barrier import BarrierKind, log_barrier, stability_margin, support_tokens
from probattn.folds.mass import next_token_density, scalar_mass
from probattn.folds.regime import regime
from probattn.inference.claims.claim import Claim, Subject, verdict_in_words
from probattn.inference.runtime.files import write_figure
from probattn.models.corpus import Corpus
from probattn.models.scalar import scalar_attention
from probattn.solve.context import Context

__all__ = ["draw_figures", "render_report", "save_figures"]

_SUPPORT = 5
_WINDOWS = 12
_LINE = 8
_GREYED = {" ": " ", "\n": "\u21b5", "\t": "\u21e5"}


@dataclass(frozen=True)
class _Cell:
    character: str
    background: str
    ink: str
    support: bool
    note: str


def draw_figures(subject: Subject, corpus: Corpus, history: Mapping[str, Sequence[float]]) -> dict[str, Figure]:
    """Draw the figures of the report that belong to no claim.

    Args:
        subject: the fitted model and held-out text.
        corpus: the text, for its vocabulary.
        history: metrics of the fit at each evaluation, by name.

    Returns:
        Figures by file name, without suffix.
    """
    attention, u = subject.attention, subject.tokens(1)[0]
    kinds = ("determinant", "spectral", "singular_value")
    margins = {kind: stability_margin(attention, u, kind).numpy() for kind in kinds}  # type: ignore[arg-type]
    support = support_tokens(attention, u, min(_SUPPORT, len(u))).positions.tolist()
    characters = [corpus.vocabulary[index] for index in subject.inputs[0].tolist()]
    line = _line(subject)
    critical = critical_slope(line)
    return {
        "margins": plotting.plot_margins(margins, characters, support),
        "conditional": plotting.plot_conditional([_panel(line, factor * critical, critical) for factor in (0.7, 1.6)]),
        "mass": _mass_figure(line, critical),
        "barriers": _barrier_figure(),
        "training": plotting.plot_training(history),
    }


def critical_slope(tokens: Tensor) -> float:
    r"""Find the slope a at which the residual map of a one-dimensional past first folds, a sup_x Var_x = 1.

    The supremum runs over all tilts x = a u of the past, so it does not depend on a. Derived here.

    Args:
        tokens: the past, (n,).

    Returns:
        The critical slope.

    Example:
        >>> round(critical_slope(torch.tensor([-1.0, 1.0], dtype=torch.float64)), 6)
        1.0
    """
    context = Context.of(scalar_attention(1.0), tokens.unsqueeze(-1))  # the slope of its mean is the variance

    def minus_variance(tilt: float) -> float:
        return -float(context.line_cumulants(torch.tensor([tilt], dtype=tokens.dtype))[1])

    spread = float(tokens.max() - tokens.min())
    grid = np.linspace(-40 / spread, 40 / spread, 801)
    best = grid[int(np.argmin([minus_variance(tilt) for tilt in grid]))]
    step = grid[1] - grid[0]
    result = minimize_scalar(minus_variance, bounds=(best - step, best + step), method="bounded")
    return float(-1 / result.fun)


def save_figures(figures: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Write PNG files and return them as data URIs.

    Args:
        figures: figures by file name, without suffix.
        folder: folder for the files; it is created if needed.

    Returns:
        Data URIs by the same names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    for name, figure in figures.items():
        path = folder / f"{name}.png"
        write_figure(path, figure)
        images[name] = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return images


def render_report(
    subject: Subject,
    corpus: Corpus,
    claims: Sequence[Claim],
    images: Mapping[str, str],
    config: Mapping[str, Any],
    history: Mapping[str, Sequence[float]],
) -> str:
    """Render the report as HTML; the template engine escapes every text.

    Args:
        subject: the fitted model and held-out text.
        corpus: the text, for its name and vocabulary.
        claims: the claims in the order of the report.
        images: figures as data URIs, by file name; those of a claim are named "claim-NAME".
        config: contents of ``config.json``.
        history: metrics of the fit at each evaluation, by name.

    Returns:
        A page that needs no other file.
    """
    attention = subject.attention
    u = subject.tokens(min(_WINDOWS, len(subject.inputs)))
    margins = stability_margin(attention, u)
    support = support_tokens(attention, u, min(_SUPPORT, u.shape[-2]))
    low, high = float(margins.min()), float(margins.max())
    rows = []
    counts: Counter[str] = Counter()
    for window, row, chosen in zip(subject.inputs, margins, support.positions, strict=False):
        text = [corpus.vocabulary[index] for index in window.tolist()]
        marked = set(chosen.tolist())
        counts.update(text[position] for position in marked)
        rows.append(
            [_cell(c, float(m), k in marked, low, high) for k, (c, m) in enumerate(zip(text, row, strict=True))]
        )
    regimes = regime(attention, u)
    named = [regimes] if not isinstance(regimes, list) else regimes
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("probattn.inference.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("verify.html").render(
        claims=[
            {**claim.as_dict(), "words": verdict_in_words(claim), "figures": list(claim.figures)} for claim in claims
        ],
        images=images,
        config=config,
        corpus=corpus.name,
        rows=rows,
        scale=[_background(position)[0] for position in np.linspace(0, 1, 9)],
        low=low,
        high=high,
        support=_SUPPORT,
        frequent=[(_label(character), number) for character, number in counts.most_common(8)],
        regimes=Counter(str(found) for found in named),
        evidence=getattr(named[0], "evidence", ""),
        last={name: values[-1] for name, values in history.items()},
        first={name: values[0] for name, values in history.items()},
    )


def _cell(character: str, margin: float, support: bool, low: float, high: float) -> _Cell:
    background, ink = _background((margin - low) / (high - low) if high > low else 1.0)
    return _Cell(
        _GREYED.get(character, character), background, ink, support, f"{_label(character)}  margin {margin:.4f}"
    )


def _label(character: str) -> str:
    return {" ": "space", "\n": "newline", "\t": "tab"}.get(character, character)


def _background(position: float) -> tuple[str, str]:
    """Return the colour of a margin, from the smallest (0, dark) to the largest (1, light), and a readable ink."""
    red, green, blue, _ = colormaps["cividis"](position)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return (
        f"#{round(red * 255):02x}{round(green * 255):02x}{round(blue * 255):02x}",
        "#000" if luminance > 0.45 else "#fff",
    )


def _line(subject: Subject) -> Tensor:
    """Project the first characters on the first principal axis of their embeddings, standardised, at most (8,)."""
    u = subject.tokens(1)[0, :_LINE]
    centred = u - u.mean(0)
    line: Tensor = centred @ torch.linalg.svd(centred, full_matrices=False)[2][0]
    return (line - line.mean()) / line.std()


def _panel(tokens: Tensor, a: float, critical: float, noise_scale: float = 0.7) -> dict[str, Any]:
    past = Context.of(scalar_attention(a), tokens.unsqueeze(-1))
    reach = float(tokens.abs().max()) + 3 * noise_scale
    u = torch.linspace(-reach, reach, 1200, dtype=torch.float64)
    mass = scalar_mass(past, noise_scale)
    plain = next_token_density(past, u, noise_scale, jacobian=False)
    return {
        "title": f"a = {a:.3f} = {a / critical:.1f} x boundary: {'no fold' if a < critical else 'folded'}",
        "u": u.numpy(),
        "residual": (u - past.mean(u.unsqueeze(-1)).squeeze(-1)).numpy(),
        "density": next_token_density(past, u, noise_scale).abs().numpy(),
        "plain": plain.numpy(),
        "mass": mass.absolute,
        "plain_mass": scalar_mass(past, noise_scale, jacobian=False).signed,
        "turning_points": mass.turning_points,
    }


def _mass_figure(tokens: Tensor, critical: float) -> Figure:
    slopes = np.linspace(0.2 * critical, 3 * critical, 40)
    pasts = [Context.of(scalar_attention(float(a)), tokens.unsqueeze(-1)) for a in slopes]
    return plotting.plot_mass(slopes, np.array([scalar_mass(past, 0.7).absolute for past in pasts]), critical)


def _barrier_figure() -> Figure:
    factor = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    tokens = torch.tensor([[-1.0], [1.0], [0.0]], dtype=torch.float64)
    kinds: tuple[BarrierKind, ...] = ("logdet", "one_sided", "smooth", "spectral", "singular_value")
    attention = scalar_attention(factor)
    values = {kind: log_barrier(attention, tokens, kind)[:, -1].numpy() for kind in kinds}
    return plotting.plot_barriers(factor.numpy(), 1.0, values)
