"""``probattn support``: the tokens of a text that are nearest to the boundary."""

from __future__ import annotations

from probattn.cli.command import command
from probattn.inference.support import SupportOptions, support

__all__ = ["OPTIONS", "app", "run"]


def run(options: SupportOptions) -> None:
    """Show which tokens of a text a model holds nearest to the boundary: support.html, and support.json beside it.

    Exit status: 0 done, 2 bad usage or input.
    """
    support(options)
    print(f"page: {options.out / 'support.html'}, numbers: {options.out / 'support.json'}")


OPTIONS = SupportOptions
app = command("support", OPTIONS, run)
