"""``probattn verify``: every claim measured on a model fitted to a text, and a report."""

from __future__ import annotations

import sys

from probattn.cli.command import command
from probattn.cli.output import say
from probattn.inference.verify import VerifyOptions, verify

__all__ = ["OPTIONS", "app", "run"]


def run(options: VerifyOptions) -> int:
    """Fit a model, measure every claim, write a report.

    Exit status: 0 done, 1 an identity that must hold did not, 2 bad usage or input, 130 interrupted (--resume goes on).
    """
    claims = verify(options)
    say(f"report: {options.out / 'report.html'}")
    broken = [claim.id for claim in claims if claim.broken]
    if broken:
        say(f"an identity that must hold did not: {', '.join(broken)}", sys.stderr)
    return int(bool(broken))


OPTIONS = VerifyOptions
app = command("verify", OPTIONS, run)
