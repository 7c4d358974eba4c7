"""Words of the verification report: its summary, names of claims and numbers, and what the verdicts mean."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from probattn.inference.claims.claim import Claim, judge
from probattn.inference.reports.verify.text import SupportToken
from probattn.plotting.style import words

__all__ = ["OPTION_WORDS", "VERDICTS", "claim_title", "decided", "in_order", "summary"]

#: What the words of the verdicts mean, by verdict, in the order of the table.
VERDICTS: Mapping[str, tuple[str, str]] = {
    "not_supported": ("does not hold", "it was measured, and at least one decisive number is beyond its bound"),
    "supported_within": ("holds if \u2026", "the decisive numbers are within their bounds under the condition stated"),
    "supported": ("holds", "every decisive number is within its bound"),
    "not_run": ("not run", "it was not measured in this run, for the reason stated"),
}

#: Options of the language model in words.
OPTION_WORDS: Mapping[str, str] = {
    "vocabulary": "different characters",
    "context": "characters in a window",
    "dim": "size of the embeddings",
    "layers": "layers of the decoder",
    "decoder_heads": "heads of the decoder",
    "stage_heads": "heads of the attention stage",
    "stage_rank": "size of its queries and keys",
    "stage_radius": "radius of its memory",
    "stage_contraction": "limit of its contraction",
    "weight": "weight \u03bb of the density",
    "kind": "penalty",
    "prior": "prior",
    "noise_scale": "noise scale",
    "prior_scale": "prior scale",
    "mask": "mask",
}

_TITLES = {"barrier-training": "Barrier in training"}
_NAMES = {"certified": "no character can fold the map", "regular": "no fold was seen", "folded": "the map folds"}
_KINDS = {
    "identity": "must hold to numerical precision",
    "statistical": "a test with a stated error rate",
    "empirical": "an experiment",
}


def claim_title(name: str) -> str:
    """Return the title of a claim.

    Args:
        name: its id.

    Returns:
        Words that begin with a capital letter.

    Example:
        >>> claim_title("stationary-distribution")
        'Stationary distribution'
    """
    return _TITLES.get(name, name.replace("-", " ").capitalize())


def decided(claim: Claim) -> str:
    """Say how many of the numbers that decide a claim are within their bounds.

    Args:
        claim: a claim.

    Returns:
        A phrase; empty where no number decides.
    """
    held = [judge(claim.measured, {name: bound}) for name, bound in claim.bound.items() if name in claim.measured]
    if not held:
        return ""
    return f"{sum(held)} of {len(held)} decisive numbers within their bounds"


def in_order(claims: Sequence[Claim]) -> tuple[list[Claim], list[Claim]]:
    """Sort claims for reading: those that say something about the world, failures first, and the identities that hold.

    Args:
        claims: claims in any order.

    Returns:
        The claims to show, and those to fold away.
    """
    order = list(VERDICTS)
    folded = [claim for claim in claims if claim.kind == "identity" and claim.verdict == "supported"]
    shown = [claim for claim in claims if claim not in folded]
    return sorted(shown, key=lambda claim: order.index(claim.verdict)), folded


def summary(
    claims: Sequence[Claim],
    corpus: str,
    windows: int,
    context: int,
    regimes: Mapping[str, int],
    nearest: Sequence[SupportToken],
    last: Mapping[str, float],
) -> list[str]:
    """Write five sentences on a run of the verification.

    Args:
        claims: claims with their verdicts.
        corpus: name of the text.
        windows: number of held-out windows that are shown.
        context: characters in each.
        regimes: number of these windows by the name of their regime.
        nearest: support tokens, nearest to the boundary first.
        last: metrics at the end of the fit.

    Returns:
        The sentences.
    """
    return [
        f"A language model of characters whose prior is attention, read as a density, was fitted to {corpus}, and "
        f"{_number(len(claims), 'claim')} of the theory were tested on it.",
        _verdicts(claims),
        _identities(claims),
        _on_the_text(windows, context, regimes, nearest),
        _barrier(last["barrier"]),
    ]


def _verdicts(claims: Sequence[Claim]) -> str:
    counts = Counter(claim.verdict for claim in claims)
    failed = [claim_title(claim.id).lower() for claim in claims if claim.verdict == "not_supported"]
    named = f" ({_listed(failed)})" if failed else ""
    parts = [
        f"{counts['supported']} hold{'s' if counts['supported'] == 1 else ''}",
        f"{counts['supported_within']} under a condition that is stated",
        f"{len(failed)} do{'es' if len(failed) == 1 else ''} not{named}",
    ]
    left = f", and {counts['not_run']} could not be judged in this run" if counts["not_run"] else ""
    return f"{', '.join(parts)}{left}."


def _identities(claims: Sequence[Claim]) -> str:
    identities = [claim for claim in claims if claim.kind == "identity" and claim.verdict != "not_run"]
    broken = [claim_title(claim.id).lower() for claim in identities if claim.broken]
    if not identities:
        return "No identity was measured, so that nothing here tells whether the code is right."
    if broken:
        return f"An identity that must hold to numerical precision does not ({_listed(broken)}): the code is wrong."
    told = "The identity that must hold to numerical precision does"
    if len(identities) > 1:
        told = f"The {len(identities)} identities that must hold to numerical precision do"
    return f"{told}, beside faults made on purpose that the measurement notices."


def _on_the_text(windows: int, context: int, regimes: Mapping[str, int], nearest: Sequence[SupportToken]) -> str:
    seen = {meaning: regimes[name] for name, meaning in _NAMES.items() if regimes.get(name)}
    if len(seen) == 1:
        told = f"In {'all ' if windows > 1 else ''}{_number(windows, 'held-out window')} of {context} characters "
        told += next(iter(seen))
    else:
        named = [f"in {count} {meaning}" for meaning, count in seen.items()]
        told = f"Of {_number(windows, 'held-out window')} of {context} characters, {_listed(named)}"
    if not nearest:
        return f"{told}."
    one = nearest[0]
    there = f"{one.before}{one.sign}{one.after}".strip()
    return (
        f"{told}; nearest to the boundary is \u2018{one.name}\u2019 in \u2018{there}\u2019, at a distance of "
        f"{one.margin:.2f}, where 0 is the boundary and 1 is no attention."
    )


def _barrier(barrier: float) -> str:
    if barrier < -0.1:
        return (
            f"The mean barrier ended at {_signed(barrier)} nats per character: being negative, it rewarded the fit for "
            "expanding volume instead of keeping it away from the boundary."
        )
    return f"The mean barrier ended at {_signed(barrier)} nats per character."


def kind_in_words(kind: str) -> str:
    """Say what a kind of claim is.

    Args:
        kind: "identity", "statistical" or "empirical".
    """
    return _KINDS[kind]


def numbers_in_words(claim: Claim) -> list[tuple[str, str, str]]:
    """Name what was measured.

    Args:
        claim: a claim.

    Returns:
        Name, value and largest allowed value of each number, the decisive ones first; empty where there is no bound.
    """
    names = [*claim.bound, *(name for name in claim.measured if name not in claim.bound)]
    return [
        (words(name), _digits(claim.measured[name]), _digits(claim.bound[name]) if name in claim.bound else "")
        for name in names
        if name in claim.measured
    ]


def _digits(value: float) -> str:
    return f"{float(value):.4g}".replace("-", "\u2212").replace("inf", "\u221e")


def _signed(value: float) -> str:
    return f"{value:.2f}".replace("-", "\u2212")


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _listed(parts: Sequence[Any]) -> str:
    *some, last = map(str, parts)
    return f"{', '.join(some)} and {last}" if some else last
