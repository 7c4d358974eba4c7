r"""Claim: a language model is implemented as one distribution, with the same probabilities however they are computed.

On paper P(y_1..n) is consistent, :math:`\sum_{y_{n+1}} P(y_{1..n+1}) = P(y_{1..n})`, because every factor is a softmax.
What can fail is the program: a cache, a mask, a position, a padded batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.claims.claim import Claim, Subject, judge, worst
from probattn.models.discrete import HuggingFaceModel, NextTokenModel, OwnModel, Side
from probattn.numerics.random import isolated_seed

__all__ = [
    "ROUNDINGS",
    "check_language_model",
    "implementation_claim",
    "implementation_numbers",
    "rounding_bounds",
]

# Units of rounding, each as large as the largest logit, by which two orders of the same computation may differ. A
# logit is the end of some dozen rounded operations per layer, and a fault in a cache, a mask or a position is larger by
# many orders of magnitude: there is room for deep models. In bfloat16, with its two or three digits, there is none: the
# bound excludes gross faults only, and the number itself is the result.
ROUNDINGS: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float64: 128.0, torch.float32: 128.0, torch.bfloat16: 32.0}
)
_CHECKS = ("steps", "batch", "padding", "causality", "normalisation", "chain")
_ROWS, _LENGTH = 6, 24
_GPT2 = {"vocab_size": 61, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}


def check_language_model(model: NextTokenModel, tokens: Tensor, *, seed: int = 0) -> dict[str, float]:
    r"""Measure by how much log-probabilities differ that should be the same, whichever way they are computed.

    .. math::
        |\log P_{pass} - \log P_{steps}|, \quad |1 - \sum_y P(y | y_{1..n})|, \quad
        |\log \sum_{y} P(y_{1..n}, y) - \log P(y_{1..n})|

    Args:
        model: the language model, in any dtype; log-probabilities are taken from its logits in double precision.
        tokens: rows of tokens to check it on, (N, T) with N and T at least 2.
        seed: random seed for the tokens that stand for padding and for another future.

    Returns:
        ``steps``: one pass against decoding step by step, padded or not. ``batch``: a row alone against the row in the
        batch. ``padding``: a padded row against the row alone. ``causality``: before and after the future is changed.
        ``normalisation``: of softmax in the model's own dtype. ``chain``: the sum over the next token, by V longer
        passes, against the shorter pass. ``chain_length``: factors in the longest chain. ``scale``: the largest
        absolute logit.

    Raises:
        InputError: fewer than two rows or tokens; tokens that the model refuses.

    Example:
        >>> from probattn.models.language import LanguageConfig, LanguageModel
        >>> model = LanguageModel(LanguageConfig(5, context=4, dim=4, layers=1, decoder_heads=2))
        >>> found = check_language_model(OwnModel(model, model.initial_values(0)), torch.tensor([[0, 3, 1], [2, 2, 4]]))
        >>> max(found[name] for name in ("steps", "batch", "padding", "causality", "normalisation", "chain")) < 1e-12
        True
    """
    if tokens.dim() != 2 or min(tokens.shape) < 2:
        raise InputError(
            f"tokens have shape {tuple(tokens.shape)}; they must be (N, T) with N and T at least 2: in one row or at "
            "one position there is nothing to compare."
        )
    logits = model.logits(tokens)
    reference = _log_probability(logits)
    generator = torch.Generator().manual_seed(seed)
    alone = [_log_probability(model.logits(row[None]))[0] for row in tokens]
    padding, padded_steps = [], []
    for padded, mask in _padded(model, tokens, generator):
        full = _log_probability(model.logits(padded, mask))
        padded_steps.append(_gap(full[mask], _log_probability(model.steps(padded, mask))[mask]))
        for row, shown, own in zip(padded, mask, full, strict=True):
            padding.append(_gap(own[shown], _log_probability(model.logits(row[shown][None]))[0]))
    causality = []
    for cut in range(1, tokens.shape[1]):
        other = torch.cat([tokens[:, :cut], _random_like(tokens[:, cut:], model.vocabulary, generator)], dim=1)
        causality.append(_gap(reference[:, :cut], _log_probability(model.logits(other))[:, :cut]))
    lengths = sorted({1, tokens.shape[1] // 2, tokens.shape[1] - 1})
    return {
        "steps": worst(_gap(reference, _log_probability(model.steps(tokens))), *padded_steps),
        "batch": worst(*(_gap(own, single) for own, single in zip(reference, alone, strict=True))),
        "padding": worst(*padding),
        "causality": worst(*causality),
        "normalisation": _gap(logits.softmax(-1).double().sum(-1), torch.ones(())),
        "chain": worst(*(_chain(model, tokens[0, :length]) for length in lengths)),
        "chain_length": float(lengths[-1]),
        "scale": float(logits.abs().max()),
    }


def rounding_bounds(found: Mapping[str, float], dtype: torch.dtype) -> dict[str, float]:
    r"""Bound the differences of :func:`check_language_model` that rounding can explain.

    .. math::
        c\, \varepsilon \max(1, \max |\mathrm{logit}|), \qquad c = \mathrm{ROUNDINGS}[\mathrm{dtype}]

    for one log-probability, that times the number of factors for a chain, and c ε for the sum of a softmax.

    Args:
        found: the measured numbers, of which ``scale`` and ``chain_length`` are used.
        dtype: the precision in which the model computed.

    Raises:
        InputError: a dtype for which no bound is stated.

    Example:
        >>> rounding_bounds({"scale": 4.0, "chain_length": 10.0}, torch.float64)["steps"] == 4 * 128 * 2.0**-52
        True
    """
    if dtype not in ROUNDINGS:
        raise InputError(f"dtype is {dtype}; bounds are stated for {', '.join(map(str, ROUNDINGS))}: use one of them.")
    unit = ROUNDINGS[dtype] * torch.finfo(dtype).eps
    one = unit * max(1.0, found["scale"])
    return {**dict.fromkeys(_CHECKS, one), "normalisation": unit, "chain": one * (found["chain_length"] + 1)}


def implementation_claim(subject: Subject) -> Claim:
    """Compare log-probabilities of language models across every way to compute them.

    Args:
        subject: the fitted model, whose passes, caches, batches, padding and precisions are compared.
    """
    measured, bound, control, words = implementation_numbers(subject)
    half = worst(*(value for name, value in measured.items() if name.endswith("bfloat16_log_probability_error")))
    measured["control_over_bound"] = control
    holds = judge(measured, bound) and control > 1
    return Claim(
        "implementation",
        "A language model assigns one probability to a text, whether it is computed in one pass, step by step with a "
        "cache, alone, in a batch or with padding, and the probabilities of the next token sum to one.",
        "identity",
        "supported" if holds else "not_supported",
        measured,
        bound,
        formula="Σ_y P(y_1..n, y) = P(y_1..n)",
        control=words,
        finding=f"The bounds are those of rounding, which moves a log-probability in bfloat16 by up to {half:.2g}.",
    )


def implementation_numbers(subject: Subject) -> tuple[dict[str, float], dict[str, float], float, str]:
    """Measure this package's model on the subject's text and, where transformers is installed, a random GPT-2.

    In double precision every check has its own bound. In single precision and bfloat16 the bounded number is the
    largest ratio of a check to its bound; the largest difference of log-probabilities stands beside it without a bound.

    Args:
        subject: the fitted model and its text.

    Returns:
        Measured numbers, their bounds, the smallest error of a negative control divided by the bound that it must
        exceed, and a sentence about the controls.
    """
    length = min(_LENGTH, subject.inputs.shape[1])
    tokens = subject.inputs[:_ROWS, :length]
    measured: dict[str, float] = {}
    bound: dict[str, float] = {}
    makers: dict[str, tuple[Callable[[torch.dtype], NextTokenModel], Tensor]] = {
        "own": (lambda dtype: OwnModel(subject.model, subject.values, dtype=dtype), tokens)
    }
    broken: list[tuple[str, NextTokenModel, Tensor]] = [
        ("a prefix without its first token", _ForgetsFirst(subject.model, subject.values), tokens)
    ]
    gpt2 = _random_gpt2(subject.seed)
    if gpt2 is not None:
        generator = torch.Generator().manual_seed(subject.seed)
        random = torch.randint(_GPT2["vocab_size"], (_ROWS, _LENGTH), generator=generator)  # type: ignore[call-overload]
        makers["gpt2"] = (lambda dtype: HuggingFaceModel(gpt2, dtype=dtype), random)
        broken.append(("cached positions one too large", _PositionsOff(gpt2, dtype=torch.float64), random))
    for name, (maker, rows) in makers.items():
        for dtype in ROUNDINGS:
            found = check_language_model(maker(dtype), rows, seed=subject.seed)
            limits = rounding_bounds(found, dtype)
            if dtype == torch.float64:
                measured |= {f"{name}_{check}": found[check] for check in _CHECKS}
                bound |= {f"{name}_{check}": limits[check] for check in _CHECKS}
                continue
            label = f"{name}_{str(dtype).removeprefix('torch.')}"
            measured[f"{label}_log_probability_error"] = worst(
                *(found[check] for check in _CHECKS if check != "normalisation")
            )
            measured[f"{label}_share_of_bound"] = worst(*(found[check] / limits[check] for check in _CHECKS))
            bound[f"{label}_share_of_bound"] = 1.0
    controls = []
    for what, model, rows in broken:
        logits = model.logits(rows)
        error = _gap(_log_probability(logits), _log_probability(model.steps(rows)))
        limit = rounding_bounds({"scale": float(logits.abs().max()), "chain_length": 0.0}, torch.float64)["steps"]
        controls.append((error / limit, f"{what}: log-probabilities off by {error:.2g}"))
    sentence = f"Decoding with a fault made on purpose ({'; '.join(text for _, text in controls)}) is detected."
    return measured, bound, min(ratio for ratio, _ in controls), sentence


class _ForgetsFirst(OwnModel):
    """A model that decodes as if its memory dropped the first token."""

    def steps(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        first = self.logits(tokens[:, :1])
        return torch.cat([first, super().steps(tokens[:, 1:], None if mask is None else mask[:, 1:])], dim=1)


class _PositionsOff(HuggingFaceModel):
    """A model that decodes with every position after the first one too large."""

    def cached_positions(self, mask: Tensor) -> Tensor:
        positions = self.positions(mask)
        return positions + (positions > 0)


def _random_gpt2(seed: int) -> Any:
    """Build a small GPT-2 with random weights, without a download; None if transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    with isolated_seed(seed):
        model: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **_GPT2))  # type: ignore[arg-type]
        return model.double().eval()


def _log_probability(logits: Tensor) -> Tensor:
    return logits.double().log_softmax(-1)


def _gap(first: Tensor, second: Tensor) -> float:
    gap = float((first - second).abs().max())
    return math.nan if math.isnan(gap) else gap


def _random_like(tokens: Tensor, vocabulary: int, generator: torch.Generator) -> Tensor:
    return torch.randint(vocabulary, tokens.shape, generator=generator)


def _padded(model: NextTokenModel, tokens: Tensor, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of unequal lengths, padded with random tokens on each side that the model accepts, and their masks."""
    count, length = tokens.shape
    places = torch.arange(length)
    sides: tuple[Side, ...] = model.padding
    for side in sides:
        cut = (torch.arange(count) % min(4, length - 1))[:, None]  # padding in each row
        mask = places >= cut if side == "left" else places < length - cut
        yield torch.where(mask, tokens, _random_like(tokens, model.vocabulary, generator)), mask


def _chain(model: NextTokenModel, prefix: Tensor) -> float:
    """Compute ``|log sum_y P(prefix, y) - log P(prefix)|`` given the first token, by passes over V + 1 sequences."""
    longer = torch.cat([prefix.expand(model.vocabulary, -1), torch.arange(model.vocabulary)[:, None]], dim=1)
    sums = _log_joint(model, longer).logsumexp(0)
    return _gap(sums, _log_joint(model, prefix[None])[0])


def _log_joint(model: NextTokenModel, tokens: Tensor) -> Tensor:
    """Return the log-probability of y_2..n given y_1 for each row, (N,)."""
    chosen = _log_probability(model.logits(tokens))[:, :-1].gather(-1, tokens[:, 1:, None])
    return chosen.sum((-2, -1))
