"""Reading checkpoints without executing anything in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from probattn.errors import InputError

__all__ = ["load_checkpoint"]


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
