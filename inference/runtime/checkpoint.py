"""Iterations that go on from where they were stopped: state on disk, read without executing anything in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from probattn.errors import InputError
from probattn.inference.runtime.distributed import rank
from probattn.inference.runtime.files import write_atomically
from probattn.inference.runtime.interrupt import deferred_interrupt

__all__ = ["Resumable", "identify", "iterate", "load_checkpoint", "save_checkpoint"]

_SCHEMA = 2


class Resumable(Protocol):
    """State of an iteration.

    Attributes:
        step: number of steps taken.
    """

    step: int

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: tensors, numbers, text, and lists and mappings of these."""

    def load_state_dict(self, content: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""


State = TypeVar("State", bound=Resumable)


def iterate(
    state: State,
    update: Callable[[State], None],
    finished: Callable[[State], bool],
    *,
    save_every: int,
    checkpoint: Path | None,
    resume: bool,
    identity: Mapping[str, Any],
) -> None:
    """Update a state until it is finished, with a checkpoint now and then, after the last step, and at Ctrl-C.

    Args:
        state: state to begin with, changed in place.
        update: one step.
        finished: test of the state, made before each step.
        save_every: number of steps between two checkpoints.
        checkpoint: file for the state; None keeps none. Under ``torchrun`` the first process writes it.
        resume: continue from the checkpoint if it exists.
        identity: names and values that tell this run from others.

    Raises:
        InputError: the checkpoint belongs to another run or cannot be read.
        KeyboardInterrupt: after Ctrl-C, once the step is complete and its state saved.
    """
    if resume and checkpoint is not None and checkpoint.exists():
        content = load_checkpoint(checkpoint, identity)
        try:
            state.load_state_dict(content["state"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"checkpoint {checkpoint}: does not fit the model ({_first_line(error)}).") from None
    with deferred_interrupt() as interrupted:
        while not finished(state):
            update(state)
            stop = interrupted.is_set()
            due = stop or state.step % save_every == 0 or finished(state)
            if due and checkpoint is not None and rank() == 0:
                save_checkpoint(checkpoint, identity, {"state": state.state_dict()})
            if stop:
                raise KeyboardInterrupt


def save_checkpoint(path: Path, identity: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Write a checkpoint atomically.

    Args:
        path: file to write; its folder exists.
        identity: names and values that tell its run from others.
        content: what is kept, by name.
    """
    write_atomically(path, partial(torch.save, {"schema": _SCHEMA, "identity": dict(identity), **content}))


def load_checkpoint(path: Path, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only``, so that nothing in it is executed.

    Args:
        path: file to read.
        identity: names and values that the checkpoint must agree with; None accepts any.

    Returns:
        Its content by name.

    Raises:
        InputError: the file is cut short, is no checkpoint, has another schema, or belongs to another run.
    """
    try:
        content = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged archive
        raise InputError(
            f"checkpoint {path}: cannot be read ({_first_line(error)}); delete it and start anew."
        ) from None
    if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
        raise InputError(f"checkpoint {path}: not a checkpoint of this version; delete it and start anew.")
    if identity is not None:
        saved = content["identity"]
        for name in sorted(set(saved) | set(identity), key=lambda name: (name != "model", name)):
            if saved.get(name) != identity.get(name):
                raise InputError(
                    f"checkpoint {path}: of another fit: {name} is {saved.get(name)!r} there and "
                    f"{identity.get(name)!r} here; use the same options, another --out, or omit --resume."
                )
    return content


def identify(model: nn.Module, data: tuple[Tensor, ...]) -> dict[str, str]:
    """Identity of a model and its data: class and plain attributes, and a digest.

    Args:
        model: module of which a checkpoint is kept.
        data: tensors that it is fitted to, any shapes.

    Returns:
        ``model`` and ``data`` as text.

    Example:
        >>> identify(nn.Identity(), (torch.zeros(2),))["model"]
        'Identity []'
    """
    plain = {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, (int, float, str)) and name[:1] != "_" and name != "training"
    }
    digest = hashlib.sha256()
    for part in data:
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        digest.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"model": f"{type(model).__name__} {sorted(plain.items())}", "data": digest.hexdigest()}


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
