"""Iterations that go on from where they were stopped: state on disk, read without executing anything in it."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from probattn.errors import InputError
from probattn.inference.runtime.checksum import DamagedFileError, seal, unseal
from probattn.inference.runtime.distributed import rank
from probattn.inference.runtime.files import write_bytes
from probattn.inference.runtime.interrupt import deferred_interrupt
from probattn.models.reading import read_regular

__all__ = ["Resumable", "identify", "iterate", "load_checkpoint", "previous_checkpoint", "save_checkpoint"]

_LOG = logging.getLogger(__name__)
_SCHEMA = 3
_MOST = 2**36  # bytes of a checkpoint: more than one run writes


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

    SIGTERM and SIGHUP count as Ctrl-C. Where the last checkpoint is damaged, the one before is used, and said so.

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
        _continue_from(state, checkpoint, identity)
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
    """Write a checkpoint atomically, with its checksum, and keep the one before beside it.

    Args:
        path: file to write; its folder exists.
        identity: names and values that tell its run from others.
        content: what is kept, by name.

    Raises:
        InputError: the file cannot be written; the checkpoints are as they were.
    """
    written = io.BytesIO()
    torch.save({"schema": _SCHEMA, "identity": dict(identity), **content}, written)
    kept = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    # A second name for the old file, so that at no time the run is without a checkpoint.
    with suppress(FileNotFoundError, OSError):
        os.link(path, kept)
        kept.replace(previous_checkpoint(path))
    kept.unlink(missing_ok=True)  # of two names of one file, POSIX renames neither
    write_bytes(path, seal(written.getvalue()))


def previous_checkpoint(path: Path) -> Path:
    """Name of the checkpoint before the last.

    Args:
        path: file of the last checkpoint.

    Example:
        >>> previous_checkpoint(Path("nuts.pt")).name
        'nuts.previous.pt'
    """
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: Path, identity: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint with ``weights_only``, so that nothing in it is executed, and compare its checksum.

    Args:
        path: file to read.
        identity: names and values that the checkpoint must agree with; None accepts any.

    Returns:
        Its content by name.

    Raises:
        DamagedFileError: its bytes are not those that were written.
        InputError: the file is no checkpoint, has another schema, or belongs to another run.
    """
    remedy = "delete it and start anew"
    try:
        data = read_regular(path, f"checkpoint {path}", most=_MOST)
    except FileNotFoundError:
        raise InputError(f"checkpoint {path}: no such file; omit --resume.") from None
    written = unseal(data, f"checkpoint {path}", remedy)
    try:
        content = torch.load(io.BytesIO(written), weights_only=True)
    except Exception as error:  # torch raises many kinds for what is no archive of its own
        raise InputError(f"checkpoint {path}: cannot be read ({_first_line(error)}); {remedy}.") from None
    if not isinstance(content, dict) or content.get("schema") != _SCHEMA:
        raise InputError(f"checkpoint {path}: not a checkpoint of this version; {remedy}.")
    if identity is not None:
        saved = content.get("identity")
        if not isinstance(saved, dict):
            raise InputError(f"checkpoint {path}: does not say of which run it is; {remedy}.")
        for name in sorted({*map(str, saved), *identity}, key=lambda name: (name != "model", name)):
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


def _continue_from(state: Resumable, checkpoint: Path, identity: Mapping[str, Any]) -> None:
    """Load the last checkpoint into a state, or the one before where the last is damaged."""
    used = checkpoint
    try:
        content = load_checkpoint(used, identity)
    except DamagedFileError as damage:
        used = previous_checkpoint(checkpoint)
        if not used.exists():
            raise
        content = load_checkpoint(used, identity)
        _LOG.warning("checkpoint %s is damaged; going on from the one before, %s", checkpoint, used.name)
        _LOG.debug("%s", damage)
    fault = _difference(content.get("state"), state.state_dict(), "state")
    if fault:
        raise InputError(f"checkpoint {used}: does not fit the model ({fault}).")
    try:
        state.load_state_dict(content["state"])
    except Exception as error:  # of torch's optimisers, modules and generators: no common class
        raise InputError(f"checkpoint {used}: does not fit the model ({_first_line(error)}).") from None


def _difference(found: Any, expected: Any, name: str) -> str:
    """The first entry that is missing or of another type than a fresh state's; empty where there is none.

    Further entries may be there: lists that a fresh state does not have yet.
    """
    number = (int, float)
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping):
            return f"{name} is {type(found).__name__}, not a mapping"
        for key, value in expected.items():
            if key not in found:
                return f"{name} has no {key}"
            if words := _difference(found[key], value, f"{name}.{key}"):
                return words
        return ""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor):
            return f"{name} is {type(found).__name__}, not a tensor"
        # Chains that share a mass matrix have fewer of them later than at the start.
        if (found.dim(), found.shape[-1:], found.dtype) != (expected.dim(), expected.shape[-1:], expected.dtype):
            there, here = (f"{part.dtype} {tuple(part.shape)}" for part in (found, expected))
            return f"{name} is {there} there and {here} here"
        return ""
    if isinstance(expected, bool) or isinstance(found, bool):
        return "" if type(found) is type(expected) else f"{name} is {type(found).__name__}"
    if isinstance(expected, number) and isinstance(found, number):
        whole = isinstance(expected, int) and not isinstance(found, int)
        return f"{name} is {found!r}, not an integer" if whole else ""
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        if isinstance(expected, tuple) and len(found) != len(expected):
            return f"{name} has {len(found)} parts, not {len(expected)}"
        pairs = zip(found, expected, strict=False)
        return next(filter(None, (_difference(*pair, f"{name}[{k}]") for k, pair in enumerate(pairs))), "")
    if expected is None or isinstance(found, type(expected)):
        return ""
    return f"{name} is {type(found).__name__}, not {type(expected).__name__}"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
