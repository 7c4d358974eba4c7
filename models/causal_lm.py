"""Causal language models of ``transformers`` with their tokenisers: small ones from scratch, or from a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from probattn.errors import InputError, require_choice
from probattn.models.corpus import UNKNOWN, encode_characters

__all__ = [
    "Architecture",
    "CharacterTokeniser",
    "PieceTokeniser",
    "Split",
    "Tokeniser",
    "build_causal_lm",
    "load_causal_lm",
]

Architecture = Literal["gpt2", "llama", "mistral", "gemma2", "qwen3"]
_VOCABULARY = "vocabulary.json"
_REACH = 16  # number of preceding tokens on which the decoding of a token may depend
_BROKEN = "\ufffd"  # what bytes that are no whole character decode to


class Split(NamedTuple):
    """A text in tokens, each with the place in the text that it stands for.

    Attributes:
        tokens: token ids, ``(n,)``.
        spans: first character, and one more than the last, of each token. Tokens that share a character, as the bytes
            of one do, have the same span; a token that stands for no text, such as one that begins a text, has an empty
            one.
    """

    tokens: Tensor
    spans: list[tuple[int, int]]


class Tokeniser(Protocol):
    """Text to tokens, with their places in the text."""

    @property
    def size(self) -> int:
        """Number of tokens that it knows."""

    def encode(self, text: str) -> Tensor:
        """Encode text as tokens, ``(n,)``."""

    def split(self, text: str) -> Split:
        """Encode text as tokens, and find the characters of each."""

    def name(self, token: int) -> str:
        """Name of a token in the vocabulary, for those that stand for no text."""

    def save(self, folder: Path) -> None:
        """Write the tokeniser into the folder of a model."""


class CharacterTokeniser:
    """Tokeniser with one token per character.

    Args:
        characters: characters by token, 0 to V - 1, with U+FFFD among them for all others.

    Raises:
        InputError: an entry is not a single character, or U+FFFD is missing.

    Example:
        >>> CharacterTokeniser(("a", "b", UNKNOWN)).encode("bax")
        tensor([1, 0, 2])
    """

    def __init__(self, characters: tuple[str, ...]) -> None:
        self._characters = characters
        if UNKNOWN not in characters or any(len(character) != 1 for character in characters):
            raise InputError(
                f"characters has {len(characters)} entries; each must be a single character, with U+FFFD among them."
            )

    @property
    def size(self) -> int:
        """Number of characters that it knows, U+FFFD included."""
        return len(self._characters)

    def encode(self, text: str) -> Tensor:
        """Encode text as tokens, ``(n,)``."""
        return encode_characters(text, self._characters)

    def split(self, text: str) -> Split:
        """Encode text as tokens; the token i stands for the character i, whether it is known or not."""
        return Split(self.encode(text), [(place, place + 1) for place in range(len(text))])

    def name(self, token: int) -> str:
        """The character of a token."""
        return self._characters[token]

    def save(self, folder: Path) -> None:
        """Write ``vocabulary.json``."""
        content = json.dumps({"schema": 1, "characters": list(self._characters)}, ensure_ascii=False)
        (folder / _VOCABULARY).write_text(content + "\n", encoding="utf-8")


class PieceTokeniser:
    """Tokeniser of ``transformers``.

    Args:
        tokenizer: the library's object.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @property
    def size(self) -> int:
        """Number of tokens that it knows, added ones included."""
        return len(self._tokenizer)

    def encode(self, text: str) -> Tensor:
        """Encode text as tokens, ``(n,)``, with those that the model's family puts around a text."""
        return torch.tensor(self._tokenizer.encode(text, verbose=False), dtype=torch.long)

    def split(self, text: str) -> Split:
        """Encode text as tokens, and find the characters of each."""
        if getattr(self._tokenizer, "is_fast", False):
            found = self._tokenizer(text, return_offsets_mapping=True, verbose=False)
            spans = [(int(first), int(last)) for first, last in found["offset_mapping"]]
            return Split(torch.tensor(found["input_ids"], dtype=torch.long), spans)
        tokens = self.encode(text)
        return Split(tokens, _spans_by_decoding(self._tokenizer, tokens.tolist(), text))

    def name(self, token: int) -> str:
        """The token as the vocabulary writes it."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def save(self, folder: Path) -> None:
        """Write the library's files."""
        self._tokenizer.save_pretrained(folder)


def _spans_by_decoding(tokenizer: Any, tokens: list[int], text: str) -> list[tuple[int, int]]:
    """The characters that each token adds to the text before it, where the library does not tell.

    Decoding token by token would lose the spaces between words. A token that leaves a character incomplete shares it
    with those that follow. What is not found in the text, as after a change of case, gets an empty span.
    """
    spans: list[tuple[int, int]] = []
    place, waiting = 0, 0
    for end in range(1, len(tokens) + 1):
        begin = max(0, end - 1 - waiting - _REACH)
        before, whole = (tokenizer.decode(tokens[begin:stop]) for stop in (end - 1 - waiting, end))
        if whole.endswith(_BROKEN) and end < len(tokens):
            waiting += 1
            continue
        piece = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(tokens[end - 1 - waiting : end])
        first = text.find(piece, place) if piece else -1
        span = (first, first + len(piece)) if first >= 0 else (place, place)
        spans += [span] * (waiting + 1)
        place, waiting = span[1], 0
    return spans


def build_causal_lm(
    architecture: Architecture,
    vocabulary: int,
    layers: int = 2,
    dim: int = 64,
    heads: int = 4,
    context: int = 64,
    *,
    dropout: float = 0.0,
) -> Any:
    """Build a model with random weights, drawn from torch's global random state.

    Args:
        architecture: one of the five names of ``Architecture``.
        vocabulary: number V of tokens.
        layers: number of layers.
        dim: size of the hidden states; the inner layers of the perceptrons are four times as wide.
        heads: number of attention heads, a divisor of dim.
        context: largest number of tokens in a sequence.
        dropout: dropout probability of the attention weights, and in GPT-2 of residuals and embeddings too.

    Returns:
        A causal language model of ``transformers``.

    Raises:
        InputError: the architecture is not among the five, or ``transformers`` is not installed.
    """
    require_choice("architecture", architecture, get_args(Architecture))
    transformers = _transformers()
    sizes: dict[str, Any] = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if architecture == "gpt2":
        sizes |= {"n_embd": dim, "n_layer": layers, "n_head": heads, "n_positions": context}
        sizes |= dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), dropout)
        return transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(**sizes))
    sizes |= {
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": dim // heads,
        "max_position_embeddings": context,
        "attention_dropout": dropout,
    }
    kind = {"llama": "Llama", "mistral": "Mistral", "gemma2": "Gemma2", "qwen3": "Qwen3"}[architecture]
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**sizes))


def load_causal_lm(folder: Path) -> tuple[Any, Tokeniser]:
    """Load a model and its tokeniser from a local folder, without downloads and without running code in it.

    Args:
        folder: folder written by ``save_pretrained`` or by ``probattn train``.

    Returns:
        The model and its tokeniser.

    Raises:
        InputError: the folder does not exist or lacks a configuration, weights (safetensors) or a tokeniser, or
            ``transformers`` is not installed.
    """
    transformers = _transformers()
    if not folder.is_dir():
        raise InputError(f"--model {folder}: no such folder; name the folder of a local checkpoint.")
    if not (folder / "config.json").is_file():
        raise InputError(f"--model {folder}: holds no config.json; name the folder of a local checkpoint.")
    chatter = transformers.utils.logging
    shown = chatter.is_progress_bar_enabled()
    chatter.disable_progress_bar()
    try:
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # the errors that a damaged folder causes in the readers have no common class
        raise InputError(
            f"--model {folder}: cannot be loaded ({_first_line(error)}); give a complete checkpoint."
        ) from None
    finally:
        if shown:
            chatter.enable_progress_bar()
    lacking = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if lacking:  # the library fills them with random numbers
        raise InputError(
            f"--model {folder}: lacks {len(lacking)} weights of its architecture, such as {lacking[0]}; give a "
            "complete checkpoint."
        )
    vocabulary = folder / _VOCABULARY
    try:
        if vocabulary.is_file():
            characters = json.loads(vocabulary.read_text(encoding="utf-8"))["characters"]
            return model, CharacterTokeniser(tuple(characters))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise InputError(
            f"--model {folder}: has no tokeniser that can be read ({_first_line(error)}); save one beside the model."
        ) from None
    if len(tokenizer) < 2 or not tokenizer.encode("a text"):  # without files the library makes an empty one
        raise InputError(f"--model {folder}: has no tokeniser; save one beside the model.")
    return model, PieceTokeniser(tokenizer)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError("transformers is not installed, and language models need it; install probattn[lm].") from None
    return transformers


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
