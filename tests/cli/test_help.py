"""Help and messages on narrow terminals, without colours, without UTF-8: panels, an example, words left whole."""

import io
import re

import pytest
from rich.console import Console

from probattn.cli.app import COMMANDS
from probattn.cli.command import variants
from probattn.cli.fit import PANELS
from probattn.cli.output import ForgivingStream, say, wrapped
from probattn.cli.reference import options_of

WIDTHS = (40, 80)


def shown_help(name, width, **options):
    """The help of a command, of the first of its choices."""
    kind, run = options_of(name)
    panels = PANELS if name == "fit" else None
    app = next(iter(variants(name, kind, run, panels).values()))
    console = Console(file=io.StringIO(), width=width, **options)
    app.help_print([], console=console)
    return console.file.getvalue()


def words(text):
    """The words of a help, without frames, and with what a frame cuts at a blank or hyphen put together."""
    return set(re.findall(r"[A-Za-z]{4,}", text))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", COMMANDS)
def test_no_word_is_broken(name, width):
    wide, narrow = shown_help(name, 300), shown_help(name, width)
    assert max(len(line.rstrip()) for line in narrow.splitlines()) <= width
    assert words(narrow) <= words(wide)


def test_the_check_notices_a_broken_word():
    assert not words("Show the to-\nkens near\nest to it") <= words("Show the tokens nearest to it")


def test_fit_has_panels_and_an_example():
    text = shown_help("fit", 80)
    headings = re.findall(r"^╭─ (.*?) ─+╮$", text, re.MULTILINE)
    assert headings[:3] == ["Data", "Inference", "Attention"]
    assert headings[3] == "Options of NUTS"
    assert headings[-1] == "Files and machine"
    assert re.search(r"^Example: probattn fit --data hidden\.npz", text, re.MULTILINE)
    last = text[text.index("Files and machine") :]
    assert "--out" in last and "--config" in last and "--debug" in last  # noqa: PT018  # one panel


@pytest.mark.parametrize("name", COMMANDS)
def test_a_poor_encoding_gets_a_plain_frame(name):
    class Poor(io.StringIO):
        encoding = "ascii"

    kind, run = options_of(name)
    app = next(iter(variants(name, kind, run).values()))
    console = Console(file=Poor(), width=80)
    app.help_print([], console=console)
    assert console.file.getvalue().isascii()


def test_without_colours_there_are_no_escapes(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown_help("explore", 80, force_terminal=True, no_color=True)
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", text)  # no foreground


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("width", WIDTHS)
def test_what_is_said_on_a_terminal_is_broken_between_words(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    terminal, message = Terminal(), "an identity that must hold to numerical precision did not: jacobian, barrier"
    say(message, ForgivingStream(terminal))
    assert " ".join(terminal.getvalue().split()) == message
    assert max(map(len, terminal.getvalue().splitlines())) <= width
    elsewhere = io.StringIO()
    say(message, elsewhere)
    assert elsewhere.getvalue() == f"{message}\n"


def test_wide_characters_count_twice():
    assert wrapped("token 鯖の味噌煮 of six", 12) == "token\n  鯖の味噌煮\n  of six"


def test_a_path_is_left_whole():
    path = "/a/very/long/path/to/a/folder/that/does/not/fit/report.html"
    assert wrapped(f"report: {path}", 40).split() == ["report:", path]
    assert wrapped("  ok  regime: certified\n\nverdict  good", 40) == "  ok  regime: certified\n\nverdict  good"
