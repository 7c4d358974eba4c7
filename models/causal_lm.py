"""Causal language models of ``transformers`` with their tokenisers: small ones from scratch, or from a local folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from probattn.errors import InputError, require_choice
from probattn.models.corpus import UNKNOWN, encode_characters

__all__ = ["Architecture", "CharacterTokeniser", "Tokeniser", "build_causal_lm", "load_causal_lm"]

Architecture = Literal["gpt2", "llama", "mistral", "gemma2", "qwen3"]
_VOCABULARY = "vocabulary.json"
_REACH = 16  # number of preceding tokens on which the decoding of a token may depend


class Tokeniser(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> Tensor:
        """Encode text as tokens, ``(n,)``."""

    def pieces(self, tokens: Tensor) -> list[str]:
        """Text of each token."""

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

    def encode(self, text: str) -> Tensor:
        """Encode text as tokens, ``(n,)``."""
        return encode_characters(text, self._characters)

    def pieces(self, tokens: Tensor) -> list[str]:
        """Characters of the tokens."""
        return [self._characters[int(token)] for token in tokens]

    def save(self, folder: Path) -> None:
        """Write ``vocabulary.json``."""
        content = json.dumps({"schema": 1, "characters": list(self._characters)}, ensure_ascii=False)
        (folder / _VOCABULARY).write_text(content + "\n", encoding="utf-8")


class _PieceTokeniser:
    """Tokeniser of ``transformers``."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Tensor:
        return torch.tensor(self._tokenizer.encode(text), dtype=torch.long)

    def pieces(self, tokens: Tensor) -> list[str]:
        # The text that each token adds; decoding token by token would lose the spaces between words.
        found = []
        for end in range(1, len(tokens) + 1):
            begin = max(0, end - _REACH)
            before, text = (self._tokenizer.decode(tokens[begin:stop].tolist()) for stop in (end - 1, end))
            alone = self._tokenizer.decode([int(tokens[end - 1])])
            found.append(text[len(before) :] if text.startswith(before) else alone)
        return found

    def save(self, folder: Path) -> None:
        self._tokenizer.save_pretrained(folder)


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
    return model, _PieceTokeniser(tokenizer)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise InputError("transformers is not installed, and language models need it; install probattn[lm].") from None
    return transformers


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
