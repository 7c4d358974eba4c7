"""Reading checkpoints without executing anything in them, and telling one fit from another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from probattn.errors import InputError

__all__ = ["identify", "load_checkpoint"]


def load_checkpoint(path: Path, identity: str | None = None) -> dict[str, Any]:
    """Read a checkpoint (``weights_only``).

    Args:
        path: the file.
        identity: what the checkpoint must be of; None takes any.

    Raises:
        InputError: the file is cut short, is no checkpoint, has another schema, or is of another run.
    """
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged archive
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"checkpoint {path}: cannot be read ({reason}); delete it and start anew.") from None
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise InputError(f"checkpoint {path}: not a checkpoint of this version; delete it and start anew.")
    if identity is not None and content["identity"] != identity:
        raise InputError(
            f"checkpoint {path}: of another run; use the same options, another --out, or leave --resume away."
        )
    return content


def identify(model: nn.Module, data: tuple[Tensor, ...]) -> dict[str, str]:
    """What a checkpoint must agree with: the model's class and plain attributes, and the data."""
    plain = {
        name: value for name, value in vars(model).items() if isinstance(value, (int, float, str)) and name[:1] != "_"
    }
    digest = hashlib.sha256()
    for part in data:
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    plain.pop("training", None)
    return {"model": f"{type(model).__name__} {sorted(plain.items())}", "data": digest.hexdigest()}
