r"""Claim: along decoding, the next-token distribution is sensitive to noise where the stability margin is small.

A reason to expect it: :math:`du_i = J_i^{-1} d\varepsilon_i`, so that the reciprocal of the singular-value margin is
the gain from noise to token. A reason to doubt it: the decoder behind the next-token distribution is another network
than the attention stage with this margin, and a distribution without entropy hardly changes, whatever the margin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor
from torch.func import jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from probattn import plotting
from probattn.attention import CausalAttention
from probattn.barrier import MarginKind, stability_margin
from probattn.errors import InputError, require_at_least
from probattn.inference.claims.claim import Claim, Settings, Subject, Verdict

__all__ = ["Decoded", "Size", "decode_windows", "decoding_claim", "kl_divergence"]

Form = Literal["last", "all"]
Margin = Callable[[CausalAttention, Tensor, MarginKind], Tensor]
Array = NDArray[np.float64]

LEVELS = (0.1, 0.3)
PROMPT = 8
_CONTROL = 0.8  # smallest correlation of the exact local sensitivity with the measured one
_PERMUTED = 20  # permutations of the margins across steps; of their 95 % intervals a few may miss zero by chance
_HOLDING = 0.75  # smallest share of them that may contain zero: below it lies 0.03 % of Binomial(20, 0.95)
_CHUNK = 1024  # sequences in one pass of the decoder


class Size(NamedTuple):
    """Size of the experiment.

    Attributes:
        windows: largest number of held-out windows, the independent units.
        steps: number of generated positions that are examined, spread evenly.
        draws: number of noise draws.
        resamples: number of bootstrap resamples.
    """

    windows: int
    steps: int
    draws: int
    resamples: int


QUICK, FULL = Size(32, 8, 16, 500), Size(64, 16, 24, 2000)


class Decoded(NamedTuple):
    """Continuations of N prompts, with measurements at S generated positions of each.

    Attributes:
        tokens: prompt and continuation, (N, T).
        u: embeddings of the tokens, (N, T, p).
        positions: the examined positions, (S,).
        entropy: entropy of the next-token distribution in nats, (N, S).
        attention_entropy: entropy of the attention weights in nats, mean over heads, (N, S).
        norm: norm of the embedding, (N, S).
        local: exact sensitivity to small noise on the last embedding, (N, S).
        sensitivity: measured sensitivity by form of noise and level, (N, S) each.
    """

    tokens: Tensor
    u: Tensor
    positions: Tensor
    entropy: Tensor
    attention_entropy: Tensor
    norm: Tensor
    local: Tensor
    sensitivity: Mapping[tuple[Form, float], Tensor]


def kl_divergence(logits: Tensor, others: Tensor) -> Tensor:
    """Compute KL(p || q) in nats.

    Args:
        logits: logits of p, ``(*batch, V)``.
        others: logits of q, ``(*batch, V)``; the two broadcast.

    Returns:
        Divergences, at least zero, ``(*batch,)``.

    Example:
        >>> round(float(kl_divergence(torch.zeros(2), torch.tensor([0.0, 1.0]))), 4)
        0.1201
    """
    mine, theirs = logits.log_softmax(-1), others.log_softmax(-1)
    return (mine.exp() * (mine - theirs)).sum(-1).clamp(min=0)  # rounding may leave a tiny negative number


@torch.no_grad()
def decode_windows(subject: Subject, size: Size = QUICK, *, prompt: int = PROMPT) -> Decoded:
    r"""Continue prompts by ancestral sampling up to the context length, and perturb the embeddings.

    The sensitivity is the mean of :math:`KL(p(\cdot | u_{\le i}) \| p(\cdot | u_{\le i} + \delta))` over draws, with
    δ = level · rms(u) · z on the last token or on all. The draws z are matched: "last" takes the same M vectors at
    every step of every window, so that steps do not differ by chance; "all" takes the same M sequences in every window,
    of which a step sees the beginning. The noise is relative, so larger embeddings have no advantage.

    The local sensitivity is :math:`\tfrac12 \sigma^2 \mathrm{tr}(J^T F J)` at the first level, with J the Jacobian of
    the logits with respect to u_i and F = diag(p) - p p^T.

    Args:
        subject: the fitted model, and windows whose first characters are the prompts.
        size: size of the experiment.
        prompt: number of characters in a prompt.

    Returns:
        Continuations with their sensitivities and predictors of them.

    Raises:
        InputError: the context leaves no room to generate, the windows do not hold a prompt, or there are fewer than
            two windows, steps or draws, or 40 resamples.
    """
    length = subject.model.config.context
    _require_room(subject, size, prompt, length)
    generator = torch.Generator().manual_seed(subject.seed)
    values = {name: value.detach() for name, value in subject.values.items()}
    model = subject.model
    tokens = subject.inputs[: size.windows, :prompt]
    while tokens.shape[1] < length:
        following = model.decode(values, model.embed(values, tokens))[:, -1].softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(following, 1, generator=generator)], dim=1)

    u = model.embed(values, tokens)
    positions = torch.linspace(prompt, length - 1, min(size.steps, length - prompt)).round().long()
    logits = model.decode(values, u)[:, positions]  # (N, S, V)
    weights = model.stage(values).weights(u)[:, :, positions]  # (N, H, S, T)
    spread = float(u.square().mean().sqrt())
    options = {"generator": generator, "dtype": u.dtype}
    last = torch.randn(size.draws, u.shape[-1], **options)  # type: ignore[call-overload]
    whole = torch.randn(size.draws, *u.shape[1:], **options)  # type: ignore[call-overload]

    sensitivity: dict[tuple[Form, float], Tensor] = {}
    for level in LEVELS:
        found = [
            kl_divergence(logits[:, s, None], _last_logits(subject, u[:, : i + 1], level * spread * last)).mean(1)
            for s, i in enumerate(positions.tolist())
        ]
        sensitivity["last", level] = torch.stack(found, dim=1)
        passes = (model.decode(values, u + level * spread * z)[:, positions] for z in whole)
        sensitivity["all", level] = sum((kl_divergence(logits, q) for q in passes), torch.zeros(())) / size.draws
    local = torch.stack([_curvature(subject, u[:, : i + 1]) for i in positions.tolist()], dim=1)
    return Decoded(
        tokens,
        u,
        positions,
        torch.special.entr(logits.softmax(-1)).sum(-1),
        torch.special.entr(weights).sum(-1).mean(1),
        u[:, positions].norm(dim=-1),
        0.5 * (LEVELS[0] * spread) ** 2 * local,
        sensitivity,
    )


def decoding_claim(
    subject: Subject,
    settings: Settings,
    *,
    margin: Margin = stability_margin,
    size: Size | None = None,
    prompt: int = PROMPT,
) -> Claim:
    """Rank steps of decoding by their margin, and by simpler predictors, against their measured sensitivity.

    The rule was stated before anything was measured. The decisive number is Spearman's ρ(-margin, sensitivity) of the
    singular-value margin, for noise on all embeddings at a tenth of their root mean square, with its 95 % interval from
    a bootstrap of whole windows. Another seed decodes another text.

    - "not_run": a control fails, so that the experiment proves nothing.
    - "not_supported": the interval reaches down to 0.
    - "supported": the interval lies above 0, and so do those of the paired differences of ``|ρ|`` to the entropy of the
      next-token distribution and to the entropy of the attention.
    - "supported_within": the interval lies above 0, but a simpler predictor does as well or better.

    Positive control: the exact local sensitivity must reach ρ > 0.8 with noise on the last token, or no predictor could
    have been found. Negative control: margins permuted across steps must have intervals that contain 0.

    Args:
        subject: the fitted model and its text.
        settings: ``full`` takes more windows, steps and draws.
        margin: the predictor under test, (attention, u, kind) -> (N, T).
        size: size of the experiment; None for the size that the settings ask for.
        prompt: number of characters in a prompt.

    Raises:
        InputError: invalid sizes as in :func:`decode_windows`, or a ``margin`` that gives NaN or a wrong shape.
    """
    size = size or (FULL if settings.full else QUICK)
    decoded = decode_windows(subject, size, prompt=prompt)
    margins = {kind: _margin(margin, subject.attention, decoded, kind) for kind in get_args(MarginKind)}
    predictors = {f"{kind}_margin": -value for kind, value in margins.items()}
    predictors |= {"entropy": decoded.entropy, "attention_entropy": decoded.attention_entropy, "norm": decoded.norm}
    predictors["local_sensitivity"] = decoded.local
    columns = {name: value.numpy() for name, value in predictors.items()}
    columns["position"] = np.broadcast_to(decoded.positions.numpy(), columns["entropy"].shape)
    columns |= {_label(*key): value.numpy() for key, value in decoded.sensitivity.items()}
    rng = np.random.default_rng(subject.seed)
    # Permutations of the real margin, so that the control remains one if another predictor is under test.
    real = stability_margin(subject.attention, decoded.u)[:, decoded.positions].numpy()
    permuted = [f"permuted_{k}" for k in range(_PERMUTED)]
    columns |= {name: rng.permutation(real.ravel()).reshape(real.shape) for name in permuted}
    study = _Study(columns, size.resamples, rng)

    decisive, other = _label("all", LEVELS[0]), _label("last", LEVELS[0])
    measured = {"windows": float(len(decoded.u)), "steps": float(len(decoded.positions)), "draws": float(size.draws)}
    for key in decoded.sensitivity:
        for name in (*predictors, "position"):
            _record(measured, f"rho_{name}_{_label(*key)}", study.rho(name, _label(*key)))
    own = "singular_value_margin"
    for form in (decisive, other):
        best = max((f"{kind}_margin" for kind in margins), key=lambda name: abs(measured[f"rho_{name}_{form}"]))
        # The best is chosen by |ρ| on the same steps, whatever its sign, which favours the margins.
        for name, first in ((own, own), ("best_margin", best)):
            for rival in ("entropy", "attention_entropy"):
                _record(measured, f"lead_of_{name}_over_{rival}_{form}", study.lead(first, rival, form))
        _record(measured, f"partial_rho_{own}_{form}", study.partial(own, form, ("entropy", "position")))
    measured["smallest_margin"] = float(margins["singular_value"].min())
    null = [study.rho(name, decisive) for name in permuted]
    measured["control_positive_rho"] = measured[f"rho_local_sensitivity_{other}"]
    measured["control_negative_largest_rho"] = max(abs(float(found[0])) for found in null)
    held = [low <= 0 <= high for low, high in map(_interval, null)]
    measured["control_negative_holds_zero"] = float(np.mean(held))

    controlled = measured["control_positive_rho"] > _CONTROL and measured["control_negative_holds_zero"] >= _HOLDING
    above = measured[f"rho_{own}_{decisive}_low"] > 0
    rivals = [r for r in ("entropy", "attention_entropy") if not measured[f"lead_of_{own}_over_{r}_{decisive}_low"] > 0]
    verdict: Verdict = "supported" if above and not rivals else "supported_within" if above else "not_supported"
    condition = f"the margin need not predict better than {_beside(rivals)}" if verdict == "supported_within" else None
    return Claim(
        "decoding",
        "Along decoding, the smaller the stability margin at a step, the more sensitive the next-token distribution is "
        "to noise on the embeddings; and the margin predicts this better than the entropies of the next-token "
        "distribution and of the attention.",
        "empirical",
        verdict if controlled else "not_run",
        measured,
        condition=condition if controlled else "a control failed: the experiment could not have found a predictor",
        formula="ρ_S(−σ_min(J_i), E_δ KL(p(·|u_≤i) ‖ p(·|u_≤i + δ))) > 0,   δ = 0.1 · rms(u) · z",
        control="Positive: the exact local sensitivity ½ σ² tr(JᵀFJ) reaches "
        f"ρ = {measured['control_positive_rho']:.2f} with noise on the last token; it must exceed {_CONTROL}. "
        f"Negative: of {_PERMUTED} permutations of the margins across steps, "
        f"{measured['control_negative_holds_zero']:.0%} have a 95 % interval that contains 0, and none has |ρ| above "
        f"{measured['control_negative_largest_rho']:.2f}.",
        finding=_finding(measured, own, decisive, other),
        figures={"decoding": _figure(measured, decoded, margins["singular_value"])},
    )


class _Study:
    """Rank correlations of (N, S) columns, in the sample and in resamples of its N windows.

    A resample is a weight for each window; ranks are taken within the resample, and ties share their mean rank.
    """

    def __init__(self, columns: Mapping[str, Array], resamples: int, rng: np.random.Generator) -> None:
        windows, steps = next(iter(columns.values())).shape
        self.index = {name: k for k, name in enumerate(columns)}
        codes = [np.unique(column, return_inverse=True)[1].ravel() for column in columns.values()]
        draws = rng.multinomial(windows, np.full(windows, 1 / windows), size=resamples)
        weights = np.vstack([np.ones(windows), draws]).repeat(steps, axis=1)
        self.correlations = np.stack([_rank_correlations(codes, own) for own in weights])  # the sample's own first

    def rho(self, first: str, second: str) -> Array:
        """Return Spearman's correlation in the sample and in each resample, (1 + resamples,)."""
        found: Array = self.correlations[:, self.index[first], self.index[second]]
        return found

    def lead(self, first: str, second: str, target: str) -> Array:
        """Return ``|rho|`` of the first predictor minus ``|rho|`` of the second, (1 + resamples,)."""
        return np.abs(self.rho(first, target)) - np.abs(self.rho(second, target))

    def partial(self, first: str, second: str, given: tuple[str, ...]) -> Array:
        """Return the partial correlation of the ranks, given the ranks of others, (1 + resamples,)."""
        pair, rest = [self.index[first], self.index[second]], [self.index[name] for name in given]
        across = self.correlations[:, pair][:, :, rest]
        inner = np.linalg.pinv(self.correlations[:, rest][:, :, rest], hermitian=True)
        left = self.correlations[:, pair][:, :, pair] - across @ inner @ across.swapaxes(1, 2)
        size = left[:, 0, 0] * left[:, 1, 1]
        # If the others determine one of the two, nothing but rounding is left.
        return np.where(size > 1e-12, left[:, 0, 1] / np.sqrt(size.clip(1e-12)), 0.0)


def _rank_correlations(codes: list[NDArray[np.intp]], weights: Array) -> Array:
    ranks = np.empty((len(codes), len(weights)))
    for row, code in zip(ranks, codes, strict=True):
        counts = np.bincount(code, weights)
        row[:] = (counts.cumsum() - (counts - 1) / 2)[code]
    ranks -= (ranks @ weights / weights.sum())[:, None]
    products: Array = (ranks * weights) @ ranks.T
    size = np.sqrt(products.diagonal())
    scale = np.where(size > 1e-9, 1 / size.clip(1e-9), 0.0)  # a constant column orders nothing: correlation zero
    return scale[:, None] * products * scale


def _interval(found: Array) -> tuple[float, float]:
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return float(low), float(high)


def _record(measured: dict[str, float], name: str, found: Array) -> None:
    measured[name] = float(found[0])
    measured[f"{name}_low"], measured[f"{name}_high"] = _interval(found)


def _label(form: Form, level: float) -> str:
    return f"{form}_{level:g}"


def _margin(margin: Margin, attention: CausalAttention, decoded: Decoded, kind: MarginKind) -> Tensor:
    with torch.no_grad():
        found = margin(attention, decoded.u, kind)
    if found.shape != decoded.tokens.shape or bool(found[:, decoded.positions].isnan().any()):
        raise InputError(
            f"margin gave a tensor of shape {tuple(found.shape)} with {int(found.isnan().sum())} NaN for the kind "
            f"{kind!r}; it must give one number per token, {tuple(decoded.tokens.shape)}, which can be ranked."
        )
    return found[:, decoded.positions]


def _require_room(subject: Subject, size: Size, prompt: int, length: int) -> None:
    windows, width = subject.inputs[: size.windows].shape
    if not 1 <= prompt <= length - 2:
        raise InputError(
            f"context is {length} characters, too short to continue a prompt of {prompt}: at least 2 must be "
            f"generated; give a prompt from 1 to {length - 2}, or fit with a longer --context."
        )
    if width < prompt:
        raise InputError(f"inputs are {width} characters wide, fewer than the prompt of {prompt}; give a shorter one.")
    # A 95 % interval has no ends below 40 resamples.
    least = {"windows": 2, "steps": 2, "draws": 2, "resamples": 40}
    for name, count in {**size._asdict(), "windows": windows}.items():
        require_at_least(name, count, least[name])


def _last_logits(subject: Subject, u: Tensor, noise: Tensor) -> Tensor:
    """Compute logits after the last position with each noise (M, p) added to its embedding, (N, M, V)."""
    values = dict(subject.values)
    chunks = []
    for own in u.split(max(1, _CHUNK // len(noise))):
        many = own[:, None].repeat(1, len(noise), 1, 1)  # (n, M, i + 1, p)
        many[:, :, -1] += noise
        chunks.append(subject.model.decode(values, many.flatten(0, 1))[:, -1].unflatten(0, many.shape[:2]))
    return torch.cat(chunks)


def _curvature(subject: Subject, u: Tensor) -> Tensor:
    """Compute tr(J^T F J) at the last position: the variance of the logits' derivatives under p, summed over axes.

    Args:
        subject: the fitted model.
        u: embeddings up to the position, (N, i + 1, p).

    Returns:
        One number per window, (N,).
    """
    values, dim = dict(subject.values), u.shape[-1]
    found = []
    for own in u.split(max(1, _CHUNK // dim)):
        axes = torch.zeros(dim, *own.shape, dtype=u.dtype)
        axes[:, :, -1] = torch.eye(dim, dtype=u.dtype)[:, None]

        def last(tokens: Tensor) -> Tensor:
            return subject.model.decode(values, tokens)[:, -1]

        # The fused attention kernels have no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            slope = vmap(lambda axis, own=own: jvp(last, (own,), (axis,))[1])(axes)  # (p, n, V)
            p = last(own).softmax(-1)
        variance = (p * (slope - (p * slope).sum(-1, keepdim=True)).square()).sum(-1)
        found.append(variance.sum(0))
    return torch.cat(found)


def _words(measured: Mapping[str, float], name: str) -> str:
    return f"{measured[name]:.2f} [{measured[f'{name}_low']:.2f}, {measured[f'{name}_high']:.2f}]"


def _beside(rivals: list[str]) -> str:
    names = {
        "entropy": "the entropy of the next-token distribution",
        "attention_entropy": "the entropy of the attention",
    }
    return " and ".join(names[rival] for rival in rivals)


def _finding(measured: Mapping[str, float], own: str, decisive: str, other: str) -> str:
    """Describe the correlation of the margin, those of the simpler predictors, and the part that is its own."""
    return (
        f"For noise on all embeddings ρ = {_words(measured, f'rho_{own}_{decisive}')} for the margin, "
        f"{_words(measured, f'rho_entropy_{decisive}')} for the entropy of the next-token distribution and "
        f"{_words(measured, f'rho_attention_entropy_{decisive}')} for the entropy of the attention; given the first "
        f"entropy and the position, {_words(measured, f'partial_rho_{own}_{decisive}')} of the margin's is left. For "
        f"noise on the last embedding alone ρ = {_words(measured, f'rho_{own}_{other}')}, of which "
        f"{_words(measured, f'partial_rho_{own}_{other}')} is left."
    )


def _figure(measured: Mapping[str, float], decoded: Decoded, margin: Tensor) -> Figure:
    names = {
        "singular_value_margin": "− singular-value margin",
        "spectral_margin": "− spectral margin",
        "determinant_margin": "− determinant margin",
        "entropy": "next-token entropy",
        "attention_entropy": "attention entropy",
        "norm": "embedding norm",
        "position": "position",
        "local_sensitivity": "exact local sensitivity\n(control)",
    }
    towards = {"all": "all embeddings", "last": "last embedding"}

    def column(form: Form, level: float, end: str) -> Array:
        return np.array([measured[f"rho_{name}_{_label(form, level)}{end}"] for name in names])

    return plotting.plot_sensitivity(
        list(names.values()),
        {
            f"{towards[form]}, {level:g} of rms": (
                column(form, level, ""),
                column(form, level, "_low"),
                column(form, level, "_high"),
            )
            for form, level in decoded.sensitivity
        },
        margin.numpy(),
        decoded.sensitivity["all", LEVELS[0]].numpy(),
        decoded.entropy.numpy(),
    )
