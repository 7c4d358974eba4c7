"""Progress: plain lines where nobody watches, a bar and a clock on a terminal, silence from the other processes."""

import io
import logging
import re
import sys
import time

import pytest

from probattn.cli.bar import Bar, clock_line, in_time
from probattn.cli.output import ForgivingStream
from probattn.cli.progress import Progress, shown_progress
from probattn.inference.runtime.progress import log_stage, log_step

LOG = logging.getLogger("probattn.inference.methods.map")


class Terminal(io.StringIO):
    """A terminal with the text that stands on it."""

    def isatty(self):
        return True

    def lines(self):
        """The line that is seen: a carriage return goes back to the beginning of the line."""
        seen = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            seen.append(shown.rstrip())
        return seen


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def attached(monkeypatch):
    """Attaches a handler with its stream and its clock; detached at the end."""
    logger, handlers = logging.getLogger("probattn"), []
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TERM", raising=False)

    def attach(stream):
        clock = Clock()
        handlers.append(Progress(stream, clock))
        logger.addHandler(handlers[-1])
        logger.setLevel(logging.INFO)
        return handlers[-1], clock

    yield attach
    for handler in handlers:
        handler.close()
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_plain_lines_carry_the_metrics_that_the_message_does_not_name(capsys):
    with shown_progress():
        LOG.info("going on from %s", "map.pt")
        log_stage(LOG, "measuring claim barrier")
        log_step(LOG, "map step 5: objective 1.250000", 5, 10, {"objective": 1.25, "cross_entropy": 2.0})
        LOG.debug("nobody asked")
    assert capsys.readouterr().out == (
        "going on from map.pt\nmeasuring claim barrier\nmap step 5: objective 1.250000, cross entropy 2\n"
    )
    LOG.info("after the command")
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_a_bar_with_rate_and_time_left_and_ends_it_before_a_line(attached):
    stream = Terminal()
    _, clock = attached(stream)
    for step in (5, 10, 15):
        clock.now += 10
        log_step(LOG, f"map step {step}: objective 1", step, 20, {"objective": 1.0})
    (shown,) = stream.lines()
    assert re.fullmatch(r"fitting by MAP #{7}-{3} 15/20, 2 s each, 10 s left, objective 1", shown)
    assert "map step" not in stream.getvalue()
    LOG.info("claim jacobian: holds")
    assert stream.lines() == ["claim jacobian: holds", ""]
    log_step(logging.getLogger("probattn.inference.methods.svi"), "svi step 5", 5, 10)
    assert stream.lines()[-1].startswith("fitting by SVI ")


def test_between_two_steps_the_time_left_goes_on(attached):
    stream = Terminal()
    progress, clock = attached(stream)
    for step in (10, 20):
        clock.now += 10
        log_step(LOG, f"map step {step}", step, 100)
    assert "1 min 20 s left" in stream.lines()[0]
    clock.now += 7
    progress.tick()
    assert "1 min 13 s left" in stream.lines()[0]


def test_work_without_steps_has_a_clock(attached):
    stream = Terminal()
    progress, clock = attached(stream)
    log_stage(LOG, "measuring claim barrier")
    clock.now += 0.9
    progress.tick()
    assert stream.lines() == [""]  # nothing flickers for what is quick
    clock.now += 1.1
    progress.tick()
    assert stream.lines() == ["measuring claim barrier (2 s)"]
    LOG.info("claim barrier: holds")
    assert stream.lines() == ["claim barrier: holds", ""]
    clock.now += 61
    progress.tick()
    assert stream.lines()[-1] == "working (1 min 1 s)"


def test_after_the_last_step_a_clock_goes_on(attached):
    stream = Terminal()
    progress, clock = attached(stream)
    for step in (50, 100):
        clock.now += 10
        log_step(LOG, f"nuts transition {step} of 100", step, 100)
    assert stream.lines() == ["sampling by NUTS ########## 100/100, 5/s, 0 s left"]
    clock.now += 35
    progress.tick()
    assert stream.lines() == ["sampling by NUTS done, going on (35 s)"]
    log_stage(LOG, "drawing the figures")
    clock.now += 2
    progress.tick()
    assert stream.lines() == ["drawing the figures (2 s)"]


def test_where_there_is_no_room_for_the_rate_there_is_for_the_time_left():
    bar = Bar("measuring margins: 100 tokens", 3)
    bar.move(0, 0.0, {})
    bar.move(1, 20.5, {})
    assert bar.line(20.5, 60, letters=False) == "measuring margins ###------- 1/3, 20.5 s each, 41 s left"
    assert bar.line(20.5, 40, letters=False) == "measuring margins ##---- 1/3, 41 s left"


@pytest.mark.parametrize(("locale", "bar"), [("C", "#----"), ("C.UTF-8", "\u2588\u2591\u2591\u2591\u2591")])
def test_the_locale_c_gets_a_bar_of_ascii(attached, monkeypatch, locale, bar):
    """Python itself writes UTF-8 there."""
    monkeypatch.setenv("LC_ALL", locale)
    stream = Terminal()
    monkeypatch.setattr(Terminal, "encoding", "utf-8", raising=False)
    attached(stream)
    log_step(LOG, "map step 1", 2, 10)
    assert bar in stream.getvalue()


def test_a_line_that_announces_work_names_it(attached):
    stream = Terminal()
    progress, clock = attached(stream)
    LOG.info("loading a model: its weights")
    clock.now += 3
    progress.tick()
    assert stream.lines() == ["loading a model: its weights", "loading a model (3 s)"]
    LOG.info("king: a word that ends alike, and a result")
    clock.now += 3
    progress.tick()
    assert stream.lines()[-1] == "working (3 s)"


def test_before_the_first_step_is_done_the_bar_shows_that_time_passes(attached):
    stream = Terminal()
    progress, clock = attached(stream)
    log_step(LOG, "measuring margins: 69 tokens", 0, 6)
    assert stream.lines() == ["measuring margins ---------- 0/6"]
    clock.now += 12
    progress.tick()
    assert stream.lines() == ["measuring margins ---------- 0/6, for 12 s"]
    log_step(LOG, "measured up to layer 4", 1, 6)
    assert stream.lines() == ["measuring margins #--------- 1/6, 12 s each, 1 min 0 s left"]


def test_elsewhere_a_long_silence_is_broken_by_a_line(attached):
    stream = io.StringIO()
    progress, clock = attached(stream)
    log_stage(LOG, "measuring claim barrier")
    for _ in range(61):
        clock.now += 1
        progress.tick()
    assert stream.getvalue().splitlines() == [
        "measuring claim barrier",
        "measuring claim barrier (30 s)",
        "measuring claim barrier (1 min 0 s)",
    ]


def test_what_others_write_stands_on_lines_of_its_own(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setattr(sys, "stdout", ForgivingStream(terminal))
    monkeypatch.setattr(sys, "stderr", ForgivingStream(terminal))
    with shown_progress():
        log_step(LOG, "map step 5", 5, 10)
        print("UserWarning: something", file=sys.stderr)
        assert terminal.lines() == ["UserWarning: something", ""]
        log_step(LOG, "map step 6", 6, 10)
        print("report: runs/verify/report.html")
        assert terminal.lines()[1:] == ["report: runs/verify/report.html", ""]
        time.sleep(1.6)  # the command has said its last word, or waits for a browser: no clock
        assert terminal.lines()[1:] == ["report: runs/verify/report.html", ""]
    print("after the command")
    assert terminal.lines()[-2] == "after the command"


def test_a_command_that_only_begins_shows_a_clock(monkeypatch):
    terminal = Terminal()
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal)
    with shown_progress():
        time.sleep(1.8)
        assert re.fullmatch(r"starting \([12] s\)", terminal.lines()[0])
    assert terminal.lines() == [""]


@pytest.mark.parametrize("width", [12, 20, 40, 80, 200])
def test_a_bar_never_reaches_the_last_column_and_keeps_whole_words(width):
    bar = Bar("calibration of corrected Laplace: 3 of 10", 200)
    metrics = {"objective": "1.234e+05", "cross entropy": "2.718", "smallest margin": "0.1234"}
    bar.move(3, 0.0, metrics)
    bar.move(7, 9.0, metrics)
    for letters in (False, True):
        line = bar.line(9.0, width, letters)
        assert len(line) < width
        assert letters or line.isascii()
        if width >= 80:
            assert "7/200, 2.25 s each, 7 min 14 s left" in line
            assert line.count("objective") == (width == 200)


def test_times_in_words():
    assert [in_time(seconds) for seconds in (0.4, 59.4, 59.6, 3599.6)] == ["0 s", "59 s", "1 min 0 s", "1 h 0 min"]
    assert clock_line("loading a model", 3, 13) == "loading (3 s)"
    assert len(clock_line("loading a model with a long name", 3, 24)) <= 24


def test_a_dumb_terminal_gets_plain_lines(attached, monkeypatch):
    stream = Terminal()
    progress, _ = attached(stream)
    assert progress.live
    monkeypatch.setenv("TERM", "dumb")
    assert not Progress(stream).live


def test_lines_on_a_narrow_terminal_are_broken_between_words(attached, monkeypatch):
    stream = Terminal()
    attached(stream)
    monkeypatch.setenv("COLUMNS", "40")
    LOG.info("claim normalisation: holds if the residual map does not fold (12.3 s)")
    assert stream.lines() == ["claim normalisation: holds if the", "  residual map does not fold (12.3 s)", ""]


def test_the_other_processes_of_a_launcher_are_silent_but_for_warnings(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    with shown_progress():
        LOG.info("step")
        LOG.warning("checkpoint damaged")
    assert capsys.readouterr().out == "checkpoint damaged\n"


def test_the_logger_is_left_as_it_was():
    logger = logging.getLogger("probattn")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with pytest.raises(RuntimeError), shown_progress():
        raise RuntimeError
    assert (logger.level, logger.propagate, list(logger.handlers)) == before
