"""``probattn support``: the tokens of a text that are nearest to the boundary."""

from __future__ import annotations

from probattn.cli.command import command
from probattn.cli.output import say
from probattn.inference.support import SupportOptions, support

__all__ = ["OPTIONS", "app", "run"]


def run(options: SupportOptions) -> None:
    """Show which tokens of a text a language model holds nearest to the boundary, in which layer, and why.

    Writes support.html, support.json beside it, and all margins as margins.nc. With the default model a sentence takes
    about half a minute; the time grows with tokens times layers, so try a long text with --limit first.

    Exit status: 0 done, 2 bad usage or input.
    """
    support(options)
    say(f"page: {options.out / 'support.html'}, numbers: {options.out / 'support.json'}, {options.out / 'margins.nc'}")


OPTIONS = SupportOptions
app = command("support", OPTIONS, run)
