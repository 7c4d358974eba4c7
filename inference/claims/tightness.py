r"""Claim: the language model puts all its mass on finite strings.

One character is taken as end of sequence: a string starts after it and ends before the next one. Then
:math:`S(n) = E\prod_{t \le n} (1 - p_t)` is the probability that a string reaches n characters, where p_t is the
probability of the end at step t. The model puts mass one on finite strings if and only if S(n) tends to 0 (Du et al.,
2023, arXiv:2212.10502). In a text longer than its context the model sees the last T characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from probattn import plotting
from probattn.errors import InputError, require_at_least
from probattn.inference.claims.claim import Claim, Settings, Subject, judge
from probattn.models.discrete import NextTokenModel, OwnModel

__all__ = ["EndProbability", "Survival", "direct_lengths", "log_end_floor", "simulate_survival", "tightness_claim"]

EndProbability = Callable[[int, Tensor], Tensor]

ERROR = 0.01
TOLERATED = 0.05  # without a proof: largest mass at the last step of a model that is called tight
_COUNT = 10  # smallest number of strings expected on either side of a tested length, for the normal approximation
_NORM, _READOUT = "decoder.layers.norm", "decoder.readout"


class Survival(NamedTuple):
    """Probabilities of the end along paths that were drawn without one.

    Attributes:
        end: p_t at every step of every path, (paths, steps).
        weights: product of 1 - p_1, ..., 1 - p_n, (paths, steps); its mean over paths is S(n) without bias.
    """

    end: Tensor
    weights: Tensor

    def mean(self) -> Tensor:
        """Return the estimates of S(1)..S(N), (steps,)."""
        return self.weights.mean(0)

    def error(self) -> Tensor:
        """Return the standard errors of the estimates, (steps,)."""
        return self.weights.std(0) / math.sqrt(len(self.weights))


def log_end_floor(values: Mapping[str, Tensor], end: int) -> float:
    r"""Bound the probability of the end from below, in every context.

    Derived here. The decoder ends in a layer norm with gain g and bias c and a linear readout w, b. The normalised
    vector z has mean 0, and :math:`|z|^2 = p\,\mathrm{var} / (\mathrm{var} + \varepsilon) < p`. So the logits satisfy,
    with P the projection that removes the mean,

    .. math::
        l_v - l_{end} = z \cdot P[g \odot (w_v - w_{end})] + (w_v - w_{end}) \cdot c + b_v - b_{end}
        \le \sqrt{p}\, |P[g \odot (w_v - w_{end})]| + (w_v - w_{end}) \cdot c + b_v - b_{end} =: m_v, \qquad
        p_{end} \ge \delta = \frac{1}{\sum_v e^{m_v}},

    where m_end = 0. Hence S(n) <= (1 - δ)^n, which tends to 0: the model is tight. With two characters δ is the
    infimum over all z.

    Args:
        values: sites of a :class:`~probattn.models.language.LanguageModel`.
        end: index of the character that ends a string.

    Returns:
        log δ; δ itself may be too small for a floating-point number.

    Raises:
        InputError: an index outside the vocabulary.

    Example:
        >>> values = {
        ...     "decoder.layers.norm.weight": torch.ones(2),
        ...     "decoder.layers.norm.bias": torch.zeros(2),
        ...     "decoder.readout.weight": torch.tensor([[0.0, 0.0], [1.0, -1.0]]),
        ...     "decoder.readout.bias": torch.zeros(2),
        ... }
        >>> round(log_end_floor(values, 0), 6) == round(-math.log(1 + math.exp(2)), 6)  # z = (1, -1)
        True
    """
    weight, bias = values[f"{_READOUT}.weight"].double(), values[f"{_READOUT}.bias"].double()
    _require_end(end, len(weight))
    gain, shift = values[f"{_NORM}.weight"].double(), values[f"{_NORM}.bias"].double()
    difference = weight - weight[end]
    slope = gain * difference
    slope = slope - slope.mean(-1, keepdim=True)
    largest = math.sqrt(len(gain)) * slope.norm(dim=-1) + difference @ shift + bias - bias[end]
    return -float(largest.logsumexp(0))


def simulate_survival(
    model: NextTokenModel,
    end: int,
    *,
    paths: int,
    length: int,
    seed: int = 0,
    end_probability: EndProbability | None = None,
) -> Survival:
    """Estimate survival with the end integrated out: paths are drawn as if no string ever ended, and weighted.

    Args:
        model: the language model.
        end: index of the character that ends a string, and after which the next one starts.
        paths: number of paths, at least 2.
        length: number of steps in each path, N.
        seed: random seed for the draws.
        end_probability: function that replaces p_t, (t, the model's p_t) -> (paths,), for t = 1, 2, ...

    Returns:
        Probabilities of the end along the paths, with the weights of the paths.

    Raises:
        InputError: an index outside the vocabulary, too few paths or steps, or a replacement that is no probability.

    Example:
        >>> from probattn.models.language import LanguageConfig, LanguageModel
        >>> model = LanguageModel(LanguageConfig(5, context=4, dim=4, layers=1, decoder_heads=2))
        >>> own = OwnModel(model, model.initial_values(0))
        >>> found = simulate_survival(own, 0, paths=8, length=6, end_probability=lambda t, p: torch.full_like(p, 0.5))
        >>> found.mean()[:3].tolist()
        [0.5, 0.25, 0.125]
    """
    _require_run(model, end, paths, length)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((paths, 1), end)
    seen = []
    for _ in range(length):
        following = _next_distribution(model, tokens)
        seen.append(following[:, end])
        others = _without(following, end)
        tokens = torch.cat([tokens, torch.multinomial(others, 1, generator=generator)], dim=1)
    return _weighted(torch.stack(seen, dim=1), end_probability)


def direct_lengths(
    model: NextTokenModel,
    end: int,
    *,
    paths: int,
    length: int,
    seed: int = 0,
    end_probability: EndProbability | None = None,
) -> Tensor:
    """Draw strings from the model itself, the end included.

    Args:
        model: the language model.
        end: index of the character that ends a string, and after which the next one starts.
        paths: number of strings, at least 2.
        length: number of characters after which a string is cut, N.
        seed: random seed for the draws.
        end_probability: as in :func:`simulate_survival`; the other characters keep their proportions.

    Returns:
        Number of characters in each string, (paths,); N for a string that was cut.

    Raises:
        InputError: an index outside the vocabulary, too few paths or steps, or a replacement that is no probability.
    """
    _require_run(model, end, paths, length)
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.full((paths,), length)
    alive, tokens = torch.arange(paths), torch.full((paths, 1), end)
    for step in range(1, length + 1):
        following = _next_distribution(model, tokens)
        if end_probability is not None:
            chosen = _replaced(end_probability, step, following[:, end])
            others = _without(following, end)
            following = others * ((1 - chosen) / others.sum(-1))[:, None]
            following[:, end] = chosen
        drawn = torch.multinomial(following, 1, generator=generator)
        going = drawn[:, 0] != end
        lengths[alive[~going]] = step - 1
        alive, tokens = alive[going], torch.cat([tokens, drawn], dim=1)[going]
        if not len(alive):
            break
    return lengths


def tightness_claim(
    subject: Subject,
    settings: Settings | None = None,
    *,
    end: int | None = None,
    paths: int | None = None,
    length: int | None = None,
    end_probability: EndProbability | None = None,
) -> Claim:
    """Prove a floor under the probability of the end, and measure survival by two estimators that must agree.

    Args:
        subject: the fitted model and its text.
        settings: ``full`` draws four times the paths.
        end: index of the character taken as end of sequence; None for the most frequent one of the subject's text.
        paths: number of paths for each estimator; None for 256, or 1024 with ``full``.
        length: number of characters, N; None for the context and 16 more, so that the window slides.
        end_probability: function that replaces the model's probability of the end. Nothing is proved then, and the
            claim is judged by the mass that is left after N characters.

    Raises:
        InputError: an index outside the vocabulary, or too few paths or steps.
    """
    model = OwnModel(subject.model, subject.values)
    chosen = int(subject.targets.flatten().bincount().argmax()) if end is None else end
    if paths is None:
        paths = 1024 if settings is not None and settings.full else 256
    length = model.context + 16 if length is None else length
    size: dict[str, int] = {"paths": paths, "length": length}
    survival = simulate_survival(model, chosen, **size, seed=subject.seed, end_probability=end_probability)
    lengths = direct_lengths(model, chosen, **size, seed=subject.seed + 1, end_probability=end_probability)
    points, scores, critical = _disagreement(survival, lengths)
    limit = _upper_limit(float(survival.mean()[-1]), paths)
    floor = log_end_floor(subject.values, chosen) if end_probability is None else -math.inf
    proved, smallest = math.isfinite(floor), float(survival.end.min())

    # The control: the same paths, with an end so rare that its probabilities have a finite sum.
    control = _weighted(survival.end, _rare)
    exact = (length + 2) / (2 * (length + 1))
    rare = direct_lengths(model, chosen, paths=128, length=length, seed=subject.seed + 2, end_probability=_rare)
    share = float((rare >= length).double().mean())
    measured = {
        "end_character": float(chosen),
        "paths": float(paths),
        "steps": float(length),
        "survival_at_last_step": float(survival.mean()[-1]),
        "survival_standard_error": float(survival.error()[-1]),
        "survival_upper_limit": limit,
        "survival_direct": float((lengths >= length).double().mean()),
        "lengths_compared": float(len(points)),
        "disagreement_excess": max((abs(score) - critical for score in scores), default=-math.inf),
        "log10_floor": floor / math.log(10),
        "log10_smallest_end_probability": math.log10(smallest) if smallest > 0 else -math.inf,
        "floor_excess": floor - math.log(max(smallest, torch.finfo(torch.double).tiny)) if proved else -math.inf,
        "infinite_mass": 0.0 if proved else limit,
        "control_survival": float(control.mean()[-1]),
        "control_survival_direct": share,
        "control_error": abs(float(control.mean()[-1]) - exact),
    }
    bound = {
        "disagreement_excess": 0.0,
        "floor_excess": 1e-9,
        "infinite_mass": 0.0 if proved else TOLERATED,
        "control_error": 1e-12,
    }
    holds = judge(measured, bound) and measured["control_survival"] > TOLERATED
    conditions = []
    if not proved:
        conditions.append(f"at most {limit:.2g} of the mass after {length} characters counts as none, without a proof")
    if not points:
        conditions.append("the two estimators need not be compared: no length was reached and missed often enough")
    supported = "supported_within" if conditions else "supported"
    return Claim(
        "tightness",
        f"With {_name(end, subject)} taken as end of sequence, "
        "the model puts all its mass on finite strings: the probability of the end has a positive lower bound in every "
        f"context, and two independent estimators of survival agree (family-wise error {ERROR:.0%}).",
        "statistical",
        supported if holds else "not_supported",  # type: ignore[arg-type]
        measured,
        bound,
        condition=" and ".join(conditions) if holds and conditions else None,
        formula="S(n) = E ∏_{t≤n} (1 − p_t) ≤ (1 − δ)ⁿ → 0,   δ = 1 / Σ_v exp( √p |P[g ⊙ (w_v − w_end)]| + "
        "(w_v − w_end)·c + b_v − b_end )",
        control="With p_t = 1/(t + 1)² for its end, the same model keeps "
        f"{measured['control_survival']:.4f} of its mass after {length} characters (exactly {exact:.4f}, in the limit "
        f"1/2; {share:.2f} of 128 strings drawn), and the claim would not hold.",
        figures={"tightness": _figure(survival, lengths, floor, control)},
    )


def _name(end: int | None, subject: Subject) -> str:
    if end is None:
        return "the most frequent character"
    return "the line feed" if end == subject.line_feed else f"character {end}"


def _rare(step: int, own: Tensor) -> Tensor:
    """Return end probabilities with a finite sum: survival is (n + 2) / (2 (n + 1))."""
    return torch.full_like(own, 1 / (step + 1) ** 2)


def _weighted(end: Tensor, end_probability: EndProbability | None) -> Survival:
    if end_probability is not None:
        end = torch.stack([_replaced(end_probability, t + 1, end[:, t]) for t in range(end.shape[1])], dim=1)
    return Survival(end, (1 - end).cumprod(1))


def _replaced(end_probability: EndProbability, step: int, own: Tensor) -> Tensor:
    chosen = end_probability(step, own.clone())
    if chosen.shape != own.shape or not bool(((chosen >= 0) & (chosen <= 1)).all()):
        raise InputError(
            f"end_probability at step {step} gave {chosen.flatten()[:1].tolist()} in shape {tuple(chosen.shape)}; it "
            f"must give {len(own)} probabilities, in [0, 1]."
        )
    return chosen


def _without(following: Tensor, end: int) -> Tensor:
    """Return the probabilities of the other characters, unnormalised; all equal if the end has probability one."""
    others = following.clamp(min=torch.finfo(following.dtype).tiny)
    others[:, end] = 0.0
    return others


def _next_distribution(model: NextTokenModel, tokens: Tensor) -> Tensor:
    """Return the probabilities of the next character after the last T, (paths, V)."""
    return model.logits(tokens[:, -model.context :])[:, -1].double().softmax(-1)


def _disagreement(survival: Survival, lengths: Tensor) -> tuple[list[int], list[float], float]:
    """Compare the two estimators at powers of two and at the last length.

    A length is compared if it is reached and missed often enough by the weighted paths alone, so that the drawn strings
    do not choose their own test.

    Returns:
        The lengths, the standardised differences there, and the bound that all of them respect with probability
        1 - ERROR.
    """
    mean, error, steps = survival.mean(), survival.error(), survival.weights.shape[1]
    fewest = min(len(lengths), len(survival.weights))
    points, scores = [], []
    for n in sorted({2**k for k in range(steps.bit_length()) if 2**k <= steps} | {steps}):
        expected = float(mean[n - 1])
        if fewest * min(expected, 1 - expected) < _COUNT:
            continue
        spread = math.sqrt(float(error[n - 1]) ** 2 + expected * (1 - expected) / len(lengths))
        points.append(n)
        scores.append((float((lengths >= n).double().mean()) - expected) / spread)
    return points, scores, NormalDist().inv_cdf(1 - ERROR / (2 * max(len(points), 1)))


def _upper_limit(mean: float, paths: int, error: float = ERROR) -> float:
    """Return an upper confidence limit for the mean of numbers in [0, 1], by Hoeffding's bound with relative entropy.

    Hoeffding, 1963, doi:10.1080/01621459.1963.10500830.
    """
    allowance = math.log(1 / error) / paths

    def divergence(limit: float) -> float:
        zero = mean * math.log(mean / limit) if mean > 0 else 0.0
        return zero + ((1 - mean) * math.log((1 - mean) / (1 - limit)) if mean < 1 else 0.0)

    low, high = mean, 1.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if middle < 1 and divergence(middle) < allowance else (low, middle)
    return high


def _require_end(end: int, vocabulary: int) -> None:
    if vocabulary < 2 or not 0 <= end < vocabulary:
        raise InputError(
            f"end is {end}; it must be one of the {vocabulary} tokens, 0..{vocabulary - 1}, and another must be left."
        )


def _require_run(model: NextTokenModel, end: int, paths: int, length: int) -> None:
    _require_end(end, model.vocabulary)
    require_at_least("paths", paths, 2)
    require_at_least("length", length)


def _figure(survival: Survival, lengths: Tensor, floor: float, control: Survival) -> Figure:
    return plotting.plot_survival(
        survival.mean().numpy(),
        survival.error().numpy(),
        lengths.numpy(),
        control.mean().numpy(),
        survival.end.numpy(),
        floor,
    )
