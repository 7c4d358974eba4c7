"""Options in a YAML file, read with care: no references, no nesting, no large file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probattn.errors import InputError
from probattn.models.reading import read_regular

__all__ = ["read_settings"]

_MOST = 2**20  # bytes of a file of options
_DEPTH = 8  # a mapping of options, lists in it, and what is nested by mistake, which has a message of its own


def read_settings(path: Path) -> dict[str, Any]:
    """The options in a YAML file.

    Args:
        path: file with one ``option: value`` per line.

    Raises:
        InputError: no such file, no YAML, or no mapping.
    """
    import yaml

    try:
        text = read_regular(path, f"--config {path}", most=_MOST).decode("utf-8")
        _require_flat(path, text)
        content = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror}); name a YAML file.") from None
    except InputError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path}: not YAML ({' '.join(str(error).split())}).") from None
    except Exception as error:  # numbers and dates that YAML allows and Python does not
        raise InputError(f"--config {path}: holds a value that cannot be read ({error}).") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(
            f"--config {path}: holds a {type(content).__name__}; write a mapping, one option: value per line."
        )
    for key, value in content.items():
        if isinstance(value, dict):
            raise InputError(
                f"--config {path}: {key} holds a mapping; write its options on lines of their own, they are not nested."
            )
    return {str(key): value for key, value in content.items()}


def _require_flat(path: Path, text: str) -> None:
    """Refuse nesting and references, by which a small file becomes large or exhausts the stack."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise InputError(f"--config {path}: uses references (& and *); write each value out.")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH:
            raise InputError(f"--config {path}: nested more than {_DEPTH} deep; write one option: value per line.")
