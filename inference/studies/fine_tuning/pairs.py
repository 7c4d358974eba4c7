"""Held-out contexts, clean and corrupted, each with the continuation whose loss is measured.

A corrupted text has other tokens, so that its own loss cannot be compared; the loss of the true continuation can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.inference.studies.robustness.corruptions import (
    delete_characters,
    keyboard_neighbours,
    mistype_characters,
    substitute_characters,
    swap_characters,
)
from probattn.models.corpus import UNKNOWN, encode_characters

__all__ = ["Encode", "Pair", "corrupt_text", "cut_pairs"]

Encode = Callable[[str], Sequence[int]]
_CHARACTERS = 6  # a token has fewer on average in every language that the tokeniser was made for


class Pair(NamedTuple):
    """A context and its continuation.

    Attributes:
        text: characters of the context.
        continuation: tokens to predict, ``(C,)``.
    """

    text: str
    continuation: Tensor


def cut_pairs(text: str, encode: Encode, count: int, context: int, continuation: int) -> list[Pair]:
    """Cut a text into contexts with their continuations, evenly spread over it.

    Args:
        text: held-out text.
        encode: tokeniser.
        count: number of pairs.
        context: number of tokens of a context; it gets about six characters for each.
        continuation: number of tokens of a continuation.

    Returns:
        The pairs, which do not overlap.

    Raises:
        InputError: a text too short for them.
    """
    size, more = _CHARACTERS * context, 2 * _CHARACTERS * continuation
    step = (len(text) - size - more) // max(1, count - 1) if count > 1 else 0
    if len(text) < size + more or (count > 1 and step < size + more):
        raise InputError(
            f"the held-out text has {len(text)} characters, too few for {count} contexts of {context} tokens with "
            f"their continuations of {continuation}; give a longer text or fewer windows."
        )
    pairs = []
    for number in range(count):
        begin = number * step
        tokens = torch.tensor(list(encode(text[begin + size : begin + size + more]))[:continuation])
        if len(tokens) < continuation:
            raise InputError(f"a continuation has {len(tokens)} tokens, not {continuation}; give fewer.")
        pairs.append(Pair(text[begin : begin + size], tokens))
    return pairs


def corrupt_text(text: str, family: str, level: float, reference: str, generator: torch.Generator) -> str:
    """Corrupt the characters of a text as the study of small models does.

    Args:
        text: text, not empty.
        family: "swaps", "substitutions", "typos" or "deletions".
        level: share of the characters.
        reference: text whose frequencies substitutions follow.
        generator: random generator on the CPU.

    Returns:
        The corrupted text.

    Raises:
        InputError: another family.
    """
    vocabulary = (*sorted(set(reference) | set(text) - {UNKNOWN}), UNKNOWN)
    tokens = encode_characters(text, vocabulary)[None]
    if family == "swaps":
        found = swap_characters(tokens, level, generator)
    elif family == "substitutions":
        frequency = torch.bincount(encode_characters(reference, vocabulary), minlength=len(vocabulary))
        found = substitute_characters(tokens, level, frequency, generator)
    elif family == "typos":
        found = mistype_characters(tokens, level, keyboard_neighbours(vocabulary), generator)
    elif family == "deletions":
        moved, _, kept = delete_characters(tokens, tokens, level, generator)
        found = moved[kept][None]
    else:
        raise InputError(f"family is {family!r}; use 'swaps', 'substitutions', 'typos' or 'deletions'.")
    return "".join(vocabulary[k] for k in found[0].tolist())
