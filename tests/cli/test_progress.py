"""Progress: plain lines where nobody watches, a bar on a terminal, silence from the other processes."""

import io
import logging

import pytest

from probattn.cli.progress import Progress, shown_progress
from probattn.inference.runtime.progress import log_step

LOG = logging.getLogger("probattn.inference.methods.map")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def attached():
    """Attaches a handler with its stream; detached at the end."""
    logger, handlers = logging.getLogger("probattn"), []

    def attach(stream):
        handlers.append(Progress(stream))
        logger.addHandler(handlers[-1])
        logger.setLevel(logging.INFO)
        return handlers[-1]

    yield attach
    for handler in handlers:
        handler.close()
        logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_plain_lines_carry_the_metrics_that_the_message_does_not_name(capsys):
    with shown_progress():
        LOG.info("going on from %s", "map.pt")
        log_step(LOG, "map step 5: objective 1.250000", 5, 10, {"objective": 1.25, "cross_entropy": 2.0})
        LOG.debug("nobody asked")
    assert capsys.readouterr().out == "going on from map.pt\nmap step 5: objective 1.250000, cross entropy 2\n"
    LOG.info("after the command")
    assert capsys.readouterr().out == ""


def test_a_terminal_shows_a_bar_and_ends_it_before_a_line(attached):
    stream = Terminal()
    attached(stream)
    for step in (5, 10):
        log_step(LOG, f"map step {step}: objective 1", step, 10, {"objective": 1.0})
    shown = stream.getvalue()
    assert shown.count("map:") == 1 + 2  # one bar, drawn when it begins and at each record
    assert shown.index(" 5/10") < shown.index(" 10/10")
    assert "objective=1" in shown
    assert "map step" not in stream.getvalue()
    LOG.info("claim jacobian: holds")
    assert stream.getvalue().endswith("claim jacobian: holds\n")
    log_step(logging.getLogger("probattn.inference.methods.svi"), "svi step 5", 5, 10)
    assert "svi: " in stream.getvalue()


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
