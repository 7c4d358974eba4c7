"""The page of the site about the command line: ``python -m probattn.cli.reference > docs/api/command-line.md``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING
from importlib import import_module
from inspect import cleandoc
from typing import Any, Literal, get_args, get_origin

from probattn.cli.app import COMMANDS
from probattn.cli.command import Flag, flags, in_words

__all__ = ["options_of", "reference"]

_HEAD = """# Command line

This page is made from the options of the commands by `python -m probattn.cli.reference`, and so is the help of each,
`probattn COMMAND --help`.

Every command takes `--config FILE`, a YAML file with any of its options as keys, such as `learning_rate: 0.01`, with
`_` or `-` in their names; flags overrule the file. With `--debug` an error shows its traceback. In Python the same
options are a dataclass with the same defaults and ranges, and the same options are the same run:

```python
from probattn.inference.fit import FitOptions, LaplaceConfig

options = FitOptions(data="hidden.npz", method=LaplaceConfig(draws=500))  # for probattn.inference.fit.fit
```
"""
_TAIL = """
## Modules

```{reference} probattn.cli
```
"""


def reference() -> str:
    """Write the page as Markdown: every command with its options, their defaults and ranges."""
    return "\n".join([_HEAD, *(line for name in COMMANDS for line in _command(name)), _TAIL.strip("\n")]) + "\n"


def options_of(name: str) -> tuple[type, Callable[[Any], int | None]]:
    """The dataclass of a command's options and the function that takes them.

    Args:
        name: name of the command.
    """
    module = import_module(f"probattn.cli.{name}")
    return module.OPTIONS, module.run


def _command(name: str) -> Iterator[str]:
    options, run = options_of(name)
    summary, _, notes = cleandoc(run.__doc__ or "").partition("\n\n")
    yield from (f"## probattn {name}", "", summary, "", notes, "")
    choice = next((flag for flag in flags(options) if "choices" in flag.metadata), None)
    if choice is None:
        yield from _tables(flags(options))
        return
    field = choice.path[0]
    own = [flag for flag in flags(options) if flag.path[0] != field or len(flag.path) == 1]
    yield from _tables(own)
    for part in get_args(choice.kind):
        further = [flag for flag in flags(options, {field: part}) if flag.path[0] == field and len(flag.path) > 1]
        yield from (f"With `{choice.name} {part}`:", "", *_table(further), "")


def _tables(listed: Iterable[Flag]) -> Iterator[str]:
    headings: dict[str, list[Flag]] = {}
    for flag in listed:
        headings.setdefault(flag.heading, []).append(flag)
    for heading, group in headings.items():
        yield from ([f"{heading}:", ""] if heading else [])
        yield from (*_table(group), "")


def _table(listed: Iterable[Flag]) -> list[str]:
    rows = ["| option | default | meaning |", "|---|---|---|"]
    for flag in listed:
        names = flag.path[-1].upper() if flag.metadata.get("positional") else ", ".join(flag.names)
        default = "required" if flag.default is MISSING else in_words(flag.default)
        text = flag.help.replace("|", r"\|")
        if get_origin(flag.kind) is Literal:
            text += f" One of {', '.join(f'`{choice}`' for choice in get_args(flag.kind))}."
        if flag.limits:
            text += f" {flag.limits.capitalize()}."
        rows.append(f"| `{names}` | {f'`{default}`' if default else ''} | {text} |")
    return rows


if __name__ == "__main__":
    print(reference(), end="")
