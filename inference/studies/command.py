"""Command line of a study, ``python -m probattn.inference.studies.NAME``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from cyclopts import App, Parameter

from probattn.errors import InputError

__all__ = ["run_command"]


def run_command(name: str, words: str | None, run: Callable[..., int]) -> None:
    """Read the command line, run the study, and exit with its status; an input error is one line and status 2.

    Args:
        name: name of the study's package.
        words: help of the command.
        run: takes the options, a dataclass by the name of its one argument, and returns the exit status.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    several = Parameter(consume_multiple=True, negative_iterable=())  # --seeds 0 1 2
    app = App(name=f"python -m probattn.inference.studies.{name}", help=words, default_parameter=several)
    app.default(run)
    try:
        status = app(sys.argv[1:], result_action="return_value")
    except InputError as error:
        print(error, file=sys.stderr)
        status = 2
    sys.exit(status)
