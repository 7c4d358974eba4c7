"""Text as data: three kinds of corpus, characters as tokens, windows as sequences."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError, require_at_least
from probattn.models.reading import read_regular

__all__ = ["UNKNOWN", "Corpus", "Windows", "encode_characters", "load_corpus", "read_text"]

UNKNOWN = "\ufffd"
_LIMIT = 255
_MOST = 2**30  # bytes of a text


class Windows(NamedTuple):
    """Consecutive windows of a corpus that do not overlap.

    Attributes:
        inputs: characters y_1 to y_T, ``(N, T)``.
        targets: their successors y_2 to y_{T+1}, ``(N, T)``.
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Corpus:
    """A text, its vocabulary and its characters as integers.

    Attributes:
        name: name in reports.
        text: training text.
        heldout: evaluation text, disjoint from the training text.
        vocabulary: characters of the training text in order of falling frequency, with U+FFFD for rare and unseen ones.
    """

    name: str
    text: str
    heldout: str
    vocabulary: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 digest of both texts, which identifies the corpus."""
        return hashlib.sha256(f"{self.text}\0{self.heldout}".encode()).hexdigest()

    def encode(self, text: str) -> Tensor:
        """Encode characters as indices into the vocabulary, ``(len(text),)``."""
        return encode_characters(text, self.vocabulary)

    def windows(self, context: int, *, heldout: bool = False) -> Windows:
        """Cut the text into windows of ``context`` characters with their successors.

        Args:
            context: number T of characters in a window.
            heldout: cut the evaluation text instead of the training text.

        Returns:
            Windows, ``(N, T)``.

        Raises:
            InputError: the text does not fill one window.

        Example:
            >>> Corpus("toy", "abcabcabc", "abcab", ("a", "b", "c", UNKNOWN)).windows(4).inputs
            tensor([[0, 1, 2, 0],
                    [1, 2, 0, 1]])
        """
        part, text = ("held-out", self.heldout) if heldout else ("training", self.text)
        require_at_least("context", context)
        count = (len(text) - 1) // context
        if count < 1:
            raise InputError(
                f"corpus {self.name}: its {part} part has {len(text)} characters, too short for a context of "
                f"{context}; give a longer text or a smaller --context."
            )
        tokens = self.encode(text[: count * context + 1])
        return Windows(tokens[:-1].view(count, context), tokens[1:].view(count, context))


def encode_characters(text: str, vocabulary: Sequence[str]) -> Tensor:
    """Encode characters as indices into a vocabulary, with U+FFFD for those it lacks.

    Args:
        text: characters to encode.
        vocabulary: characters by index, U+FFFD among them.

    Returns:
        Indices, ``(len(text),)``.
    """
    index = {character: k for k, character in enumerate(vocabulary)}
    unknown = index[UNKNOWN]
    return torch.tensor([index.get(character, unknown) for character in text], dtype=torch.long)


def load_corpus(spec: str = "python-docs", *, heldout: str | None = None, fraction: float = 0.1) -> Corpus:
    """Load a corpus by name or path.

    Args:
        spec: "python-docs" for the Python language reference that ships with CPython, a path to a UTF-8 text, or
            "hf:NAME[:CONFIG]" for a data set of the ``datasets`` package, which needs a network.
        heldout: evaluation text, named in the same way; the last part of the text where None.
        fraction: fraction of the text to hold out where no evaluation text is named.

    Returns:
        The corpus.

    Raises:
        InputError: a text is missing, empty, binary, not UTF-8, above 1 GiB, no regular file, or too short
            to split.
    """
    if not 0 < fraction < 1:
        raise InputError(f"fraction is {fraction}; the fraction to hold out must lie between 0 and 1.")
    name, text = read_text(spec)
    if heldout is not None:
        evaluation = read_text(heldout)[1]
    else:
        cut = len(text) - max(1, int(len(text) * fraction))
        text, evaluation = text[:cut], text[cut:]
    if not text:
        raise InputError(f"corpus {name}: too short to hold out a part of it; give a longer text.")
    # Ties are broken by the character itself so that the vocabulary does not depend on the order of the text.
    frequency = sorted(Counter(text).items(), key=lambda item: (-item[1], item[0]))
    kept = [character for character, _ in frequency if character != UNKNOWN][:_LIMIT]
    return Corpus(name, text, evaluation, (*kept, UNKNOWN))


def read_text(spec: str) -> tuple[str, str]:
    """Read the name and the text of a corpus; :func:`load_corpus` lists the kinds and the errors."""
    if spec == "python-docs":
        return "Python language reference (pydoc_data.topics)", _python_docs()
    if spec.startswith("hf:"):
        return spec, _hugging_face(spec)
    path = Path(spec)
    try:
        data = read_regular(path, f"corpus {spec}", most=_MOST)
    except FileNotFoundError:
        raise InputError(
            f"corpus {spec}: no such file; give python-docs, a path to a UTF-8 text, or hf:NAME[:CONFIG]."
        ) from None
    if not data.strip():
        raise InputError(f"corpus {spec}: the file is empty; give a text.")
    if b"\0" in data:
        raise InputError(f"corpus {spec}: a binary file (NUL at byte {data.index(0)}); give a UTF-8 text.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"corpus {spec}: not UTF-8 (byte {error.start}: {error.reason}); convert it, for example with iconv -t "
            "UTF-8."
        ) from None
    return path.name, text.replace("\r\n", "\n")


def _python_docs() -> str:
    from pydoc_data.topics import topics

    return "\n".join(str(topics[name]) for name in sorted(topics))


def _hugging_face(spec: str) -> str:
    try:
        from datasets import load_dataset
    except ImportError:
        raise InputError(f"corpus {spec}: needs the datasets package; install probattn[lm].") from None
    name, _, config = spec.removeprefix("hf:").partition(":")
    try:
        dataset = load_dataset(name, config or None, split="train")
    except Exception as error:  # the errors of the hub have no common class
        raise InputError(f"corpus {spec}: could not be loaded ({error}); check the name and the network.") from error
    if "text" not in dataset.column_names:
        raise InputError(
            f"corpus {spec}: has the columns {', '.join(dataset.column_names)}; choose a data set with a column named "
            "text."
        )
    text = "\n".join(dataset["text"])
    if not text.strip():
        raise InputError(f"corpus {spec}: its column text is empty; choose another data set or configuration.")
    return text
