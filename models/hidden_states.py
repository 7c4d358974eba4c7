"""Read hidden states of a model as sequences of vectors: ``.npy``, ``.npz`` and ``.safetensors``."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probattn.errors import InputError, require_finite

__all__ = ["load_hidden_states"]

_SUFFIXES = (".npy", ".npz", ".safetensors")


def load_hidden_states(path: Path, *, array: str | None = None) -> Tensor:
    """Read sequences of vectors in double precision.

    Pickled objects are refused, never executed.

    Args:
        path: file with the sequences.
        array: name of the array to read, where the file holds several.

    Returns:
        Sequences, ``(N, T, p)``, float64.

    Raises:
        InputError: the file is missing, damaged or of another kind; it holds several arrays and none is named; its
            shape is wrong or T is below 3; or it holds NaN or infinity.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "hidden.npy"
        >>> np.save(path, np.zeros((2, 5, 3)))
        >>> load_hidden_states(path).shape
        torch.Size([2, 5, 3])
    """
    if path.suffix not in _SUFFIXES:
        raise InputError(f"data {path}: the suffix is {path.suffix!r}; give one of {', '.join(_SUFFIXES)}.")
    if not path.is_file():
        raise InputError(f"data {path}: no such file; check the path.")
    try:
        found = _read(path, array)
    except InputError:
        raise
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise InputError(
                f"data {path}: holds pickled objects, which could execute anything; save plain numbers instead "
                "(numpy.save of a float array)."
            ) from None
        raise InputError(f"data {path}: cannot be read ({error}); it is damaged or of another kind.") from None
    except Exception as error:  # the errors that a damaged file causes in the readers have no common class
        raise InputError(f"data {path}: cannot be read ({error}); it is damaged or of another kind.") from None
    if not found.is_floating_point():
        raise InputError(f"data {path}: holds {found.dtype}; save floating-point numbers.")
    if found.dim() != 3 or 0 in found.shape:
        raise InputError(
            f"data {path}: has shape {tuple(found.shape)}; it must be (sequences, T, p) without an axis of size 0."
        )
    if found.shape[1] < 3:
        raise InputError(
            f"data {path}: T is {found.shape[1]}; give sequences of at least 3 tokens, since before the third no token "
            "has a past that varies and the data say nothing about the attention."
        )
    require_finite(f"data {path}, axes (sequence, token, feature)", found)
    return found.double()


def _read(path: Path, array: str | None) -> Tensor:
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    if path.suffix == ".npz":
        if not zipfile.is_zipfile(path):
            raise InputError(f"data {path}: not a complete .npz archive; it is damaged or of another kind.")
        with np.load(path, allow_pickle=False) as archive:
            return torch.from_numpy(archive[_choose(path, archive.files, array)])
    from safetensors import safe_open

    with safe_open(path, framework="pt") as archive:
        tensor: Any = archive.get_tensor(_choose(path, list(archive.keys()), array))
        return tensor  # type: ignore[no-any-return]


def _choose(path: Path, names: list[str], array: str | None) -> str:
    shown = ", ".join(sorted(names))
    if array is not None:
        if array not in names:
            raise InputError(f"data {path}: has no array {array!r}; it holds {shown}.")
        return array
    if len(names) != 1:
        raise InputError(f"data {path}: holds {len(names)} arrays ({shown}); name one with --array.")
    return names[0]
