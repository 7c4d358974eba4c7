"""The command line: options in, one exit status and one line of error out."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from cyclopts import App, CycloptsError, UnusedCliTokensError

import probattn
from probattn.cli.output import forgiving_output, say
from probattn.cli.progress import shown_progress
from probattn.inference.runtime.interrupt import signals_interrupt

__all__ = ["COMMANDS", "app", "main"]

app = App(
    name="probattn",
    help="Causal self-attention as a generative model: its Jacobian is a log-barrier, every claim is measured.",
    version=lambda: f"probattn {probattn.__version__}",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
#: Commands with a line of help; they are imported when they are called, so that `probattn --help` is quick.
COMMANDS = {
    "verify": "Fit a model, measure every claim, write a report.",
    "fit": "Infer attention parameters behind hidden states.",
    "train": "Train a language model with the log-barrier.",
    "support": "Show the tokens of a text nearest to the boundary.",
    "explore": "See it in the browser; begin here.",
    "bench": "Measure costs as ratios (ten minutes).",
}
for _place, (_name, _text) in enumerate(COMMANDS.items()):
    app.command(f"probattn.cli.{_name}:app", name=_name, help=_text, sort_key=_place)

_INTERRUPTED = 130  # what a shell reports for Ctrl-C
_RESUMABLE = ("verify", "fit", "train")  # which have the flag --resume

# Bars and advice of other libraries, which would run into the command's own; whoever sets one of these has it.
_QUIET = {
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    The status is 0 when done, 1 where an identity that must hold did not, 2 for bad usage or input, 3 for an unexpected
    failure, and 130 after Ctrl-C, SIGTERM or SIGHUP. A reader of the output that goes away ends nothing.

    Args:
        arguments: words of the command line; those of the process where it is None.
    """
    with forgiving_output():
        _main(arguments)


def _main(arguments: Sequence[str] | None) -> NoReturn:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    if not debug:
        warnings.formatwarning = lambda message, category, *_: f"{category.__name__}: {message}\n"
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    try:
        with signals_interrupt(), shown_progress():
            status = app(words, exit_on_error=False, print_error=False)
    except CycloptsError as error:
        _fail(f"{_words(error)} See probattn {' '.join([*_command(words), '--help'])}.", 2)
    except KeyboardInterrupt:
        resumes = any(word in _RESUMABLE for word in words[:1])
        remedy = "run the same command with --resume to go on from the last checkpoint" if resumes else "run it again"
        _fail(f"interrupted; {remedy}.", _INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        from probattn.errors import InputError  # brings torch, which --help and --version do without

        if isinstance(error, InputError):
            _fail(str(error), 2)
        _fail(f"{type(error).__name__}: {error} (a traceback with --debug)", 3)
    sys.exit(status or 0)


def _words(error: CycloptsError) -> str:
    if isinstance(error, UnusedCliTokensError):
        return f"{(error.unused_tokens or [''])[0]!r} belongs to no option."
    return str(error)


def _command(words: Sequence[str]) -> list[str]:
    return [word for word in words[:1] if word in app]


def _fail(message: str, status: int) -> NoReturn:
    say(f"probattn: {' '.join(message.split())}", sys.stderr)
    sys.exit(status)
