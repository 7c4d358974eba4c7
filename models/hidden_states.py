"""Read hidden states of a model as sequences of vectors: ``.npy``, ``.npz`` and ``.safetensors``."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probattn.errors import InputError, require_finite

__all__ = ["load_hidden_states"]

_LOG = logging.getLogger(__name__)
_SUFFIXES = (".npy", ".npz", ".safetensors")
_LENGTHS = "lengths"
_MOST = 2**36  # bytes of an array, uncompressed


class _Found(NamedTuple):
    """Array of a file, and the lengths beside it where there are any."""

    states: Tensor
    lengths: Tensor | None


def load_hidden_states(path: Path, *, array: str | None = None) -> Tensor:
    """Read sequences of vectors in double precision.

    Pickled objects are refused, never executed. Numbers in another byte order or precision are converted, and said so
    in the log. An array ``lengths``, (N,), beside the states says how many tokens of each sequence are data; all are
    then cut to the shortest, which is exact: the first tokens of a causal process are a process of the same law.

    Args:
        path: file with the sequences.
        array: name of the array to read, where the file holds several.

    Returns:
        Sequences, ``(N, T, p)``, float64.

    Raises:
        InputError: the file is missing, damaged or of another kind; it holds several arrays and none is named; its
            shape is wrong or T is below 3; it holds NaN or infinity; or sequences end in zeros, as padding does, and no
            lengths are given.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "hidden.npy"
        >>> np.save(path, np.ones((2, 5, 3)))
        >>> load_hidden_states(path).shape
        torch.Size([2, 5, 3])
    """
    if path.suffix not in _SUFFIXES:
        raise InputError(f"data {path}: the suffix is {path.suffix!r}; give one of {', '.join(_SUFFIXES)}.")
    if not path.is_file():
        if path.exists():
            raise InputError(f"data {path}: not a regular file; save the states to one.")
        raise InputError(f"data {path}: no such file; check the path.")
    with _named_errors(path):
        found, lengths = _read(path, array)
    if found.dim() != 3 or 0 in found.shape:
        raise InputError(
            f"data {path}: has shape {tuple(found.shape)}; it must be (sequences, T, p) without an axis of size 0."
        )
    found = found.double()
    found = _refuse_padding(path, found) if lengths is None else _cut(path, found, lengths)
    if found.shape[1] < 3:
        raise InputError(
            f"data {path}: T is {found.shape[1]}; give sequences of at least 3 tokens, since before the third no token "
            "has a past that varies and the data say nothing about the attention."
        )
    require_finite(f"data {path}, axes (sequence, token, feature)", found)
    return found


def _read(path: Path, array: str | None) -> _Found:
    if path.suffix == ".npy":
        # Mapped, so that a header that promises more than the file holds costs no memory.
        return _Found(_as_tensor(path, np.load(path, mmap_mode="r", allow_pickle=False)), None)
    if path.suffix == ".npz":
        if not zipfile.is_zipfile(path):
            raise InputError(f"data {path}: not a complete .npz archive; it is damaged or of another kind.")
        _require_size(path)
        with np.load(path, allow_pickle=False) as archive:
            name = _choose(path, archive.files, array)
            lengths = archive[_LENGTHS] if _LENGTHS in archive.files and name != _LENGTHS else None
            return _Found(_as_tensor(path, archive[name]), None if lengths is None else _whole(path, lengths))
    from safetensors import safe_open

    with safe_open(path, framework="pt") as archive:
        names = list(archive.keys())
        name = _choose(path, names, array)
        tensor: Any = archive.get_tensor(name)
        if not tensor.is_floating_point():
            raise InputError(f"data {path}: holds {tensor.dtype}; save floating-point numbers.")
        beside = archive.get_tensor(_LENGTHS).numpy() if _LENGTHS in names and name != _LENGTHS else None
        return _Found(tensor, None if beside is None else _whole(path, beside))


def _as_tensor(path: Path, found: NDArray[Any]) -> Tensor:
    """Floating-point numbers of any width and byte order, as torch has them."""
    if found.dtype.kind == "V":
        what = "void data of 2 bytes, as which NumPy saves bfloat16" if found.dtype.itemsize == 2 else "records"
        raise InputError(f"data {path}: holds {what}; save float32 numbers.")
    if found.dtype.kind != "f":
        raise InputError(f"data {path}: holds {_dtype_name(found)}; save floating-point numbers.")
    if found.dtype.itemsize > 8:
        _LOG.info("%s: %s converted to float64, which rounds it", path.name, found.dtype.name)
        return torch.from_numpy(np.array(found, dtype=np.float64))
    if not found.dtype.isnative:
        _LOG.info("%s: %s in the other byte order converted", path.name, found.dtype.name)
    return torch.from_numpy(np.array(found, dtype=found.dtype.newbyteorder("=")))


def _dtype_name(found: NDArray[Any]) -> str:
    return f"torch.{found.dtype.name}" if found.dtype.kind in "iub" else found.dtype.name


def _whole(path: Path, lengths: NDArray[Any]) -> Tensor:
    if lengths.dtype.kind not in "iu" or lengths.ndim != 1:
        raise InputError(
            f"data {path}: its array lengths holds {lengths.dtype.name} of shape {lengths.shape}; it must hold one "
            "integer per sequence."
        )
    return torch.from_numpy(lengths.astype(np.int64))


def _cut(path: Path, found: Tensor, lengths: Tensor) -> Tensor:
    """All sequences cut to the shortest."""
    if len(lengths) != len(found):
        raise InputError(f"data {path}: {len(lengths)} lengths for {len(found)} sequences; give one per sequence.")
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 3 or longest > found.shape[1]:
        where = int(lengths.argmin() if shortest < 3 else lengths.argmax())
        raise InputError(
            f"data {path}: the length of sequence {where} is {int(lengths[where])}; lengths must lie between 3 and T = "
            f"{found.shape[1]}: omit shorter sequences."
        )
    if shortest < longest:
        share = shortest * len(found) / float(lengths.sum())
        _LOG.info(
            "%s: lengths from %d to %d; all sequences cut to %d tokens, which keeps %.0f %% of the data",
            *(path.name, shortest, longest, shortest, 100 * share),
        )
    return found[:, :shortest]


def _refuse_padding(path: Path, found: Tensor) -> Tensor:
    """Refuse sequences that end in tokens of exact zeros, the mark of padding."""
    zero = (found == 0).all(-1)  # (N, T)
    trailing = zero.flip(1).int().cumprod(1).sum(1)  # (N,)
    # In one dimension a zero or two may be data.
    suspect = trailing >= (3 if found.shape[-1] == 1 else 1)
    if not bool(suspect.any()):
        return found
    where = int(suspect.int().argmax())
    raise InputError(
        f"data {path}: {int(suspect.sum())} of {len(found)} sequences end in zeros (sequence {where} in "
        f"{int(trailing[where])} tokens), as padding does, which would be taken for data; save an array named lengths "
        "beside them, the number of tokens of each sequence (T where the zeros are data), in a .npz or .safetensors."
    )


def _choose(path: Path, names: list[str], array: str | None) -> str:
    shown = ", ".join(sorted(names))
    if array is not None:
        if array not in names:
            raise InputError(f"data {path}: has no array {array!r}; it holds {shown}.")
        return array
    states = [name for name in names if name != _LENGTHS] or names
    if len(states) != 1:
        raise InputError(f"data {path}: holds {len(names)} arrays ({shown}); name one with --array.")
    return states[0]


def _require_size(path: Path) -> None:
    """Refuse an archive of a few bytes that would unpack to more than any memory."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > _MOST:
        raise InputError(f"data {path}: unpacks to {size:,} bytes; at most {_MOST:,} are read: give a part of it.")


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"data {path}: larger than the memory; give a part of it.") from None
    except Exception as error:  # the errors that a damaged file causes in the readers have no common class
        words = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, ValueError) and ("pickle" in words.lower() or "Python objects" in words):
            raise InputError(
                f"data {path}: holds pickled objects, which could execute anything; save plain numbers instead "
                "(numpy.save of a float array)."
            ) from None
        raise InputError(f"data {path}: cannot be read ({words}); it is damaged or of another kind.") from None
