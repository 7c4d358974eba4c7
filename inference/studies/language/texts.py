"""Texts as windows of tokens of one length: one window per article where the corpus has articles."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError, require_at_least

__all__ = ["TextWindows", "articles_of", "text_windows"]

_HEADING = re.compile(r"^ = [^=].* = \n", re.MULTILINE)  # of an article in WikiText; sections have more signs


class TextWindows(NamedTuple):
    """The beginnings of texts.

    Attributes:
        ids: tokens, ``(N, T)``.
        kind: what one window is: "article" or "stretch".
    """

    ids: Tensor
    kind: str


def articles_of(text: str) -> list[str]:
    r"""Cut a text in the format of WikiText into the bodies of its articles.

    Args:
        text: the text.

    Returns:
        Articles without their headings, in order; none where the text has no such headings.

    Example:
        >>> articles_of(" = One = \n \n First . \n = = Part = = \n More . \n = Two = \n Second . \n")
        ['First . \n = = Part = = \n More . \n', 'Second . \n']
    """
    return [part.lstrip() for part in _HEADING.split(text)[1:]]


def text_windows(text: str, encode: Callable[[str], Sequence[int]], count: int, length: int) -> TextWindows:
    """Take the first tokens of articles; of a text without articles, stretches of it that do not overlap.

    Articles are independent of each other, stretches of one text less so.

    Args:
        text: the corpus.
        encode: text to tokens.
        count: largest number N of windows.
        length: number T of tokens in a window; shorter articles are passed over.

    Returns:
        :class:`TextWindows`.

    Raises:
        InputError: the text does not fill two windows.
    """
    require_at_least("windows", count, 2)
    require_at_least("length", length, 2)
    articles = articles_of(text)
    found: list[list[int]] = []
    for article in articles:
        # No token is longer than 64 characters on average, and few are; the rest need not be encoded.
        ids = list(encode(article[: 64 * length]))[:length]
        if len(ids) == length:
            found.append(ids)
        if len(found) == count:
            break
    kind = "article"
    if len(found) < 2:
        kind = "stretch"
        ids = list(encode(text))
        step = max(1, (len(ids) // length) // count)  # spread over the text
        found = [ids[k : k + length] for k in range(0, len(ids) - length + 1, step * length)][:count]
    if len(found) < 2:
        raise InputError(f"the text does not fill two windows of {length} tokens; give a longer text.")
    return TextWindows(torch.tensor(found), kind)
