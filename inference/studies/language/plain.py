"""Summaries as plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["rounded"]


def rounded(value: Any) -> Any:
    """Numbers to five digits, nested at will; tuples become lists.

    Args:
        value: number, text, or mapping, list or tuple of such.

    Example:
        >>> rounded({"share": (0.123456789, 2), "name": "text"})
        {'share': [0.12346, 2], 'name': 'text'}
    """
    if isinstance(value, Mapping):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(part) for part in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
