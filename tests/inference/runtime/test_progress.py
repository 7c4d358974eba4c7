"""Progress is logged, heard by whoever listens, and printed to nobody."""

import logging

import pytest

from probattn.inference.runtime.progress import LOGGER, listening, log_step

LOG = logging.getLogger(f"{LOGGER}.methods.test")


def test_records_carry_their_numbers():
    records = []
    with listening(records.append):
        log_step(LOG, "half 50 % done", 5, 10, {"loss": 0.5})
        log_step(LOG, "done", 10, 10)
    assert [record.getMessage() for record in records] == ["half 50 % done", "done"]
    assert [(record.step, record.total, record.metrics) for record in records] == [(5, 10, {"loss": 0.5}), (10, 10, {})]
    assert records[0].levelno == logging.INFO
    assert records[0].funcName == "test_records_carry_their_numbers"


def test_nothing_is_printed_and_nothing_stays(capsys):
    logger = logging.getLogger(LOGGER)
    before = (logger.level, list(logger.handlers))
    log_step(LOG, "unheard", 1, 1)
    with pytest.raises(ZeroDivisionError), listening(lambda record: 1 / 0):
        log_step(LOG, "heard", 1, 1)  # what listens may end the work
    assert (logger.level, logger.handlers) == before
    assert capsys.readouterr() == ("", "")


def test_listening_to_some_and_to_debug_messages():
    heard, all_heard = [], []
    other = logging.getLogger(f"{LOGGER}.studies.test")
    with listening(all_heard.append), listening(heard.append, f"{LOGGER}.studies"):
        log_step(LOG, "a fit", 1, 1)
        log_step(other, "a study", 1, 1)
        LOG.debug("a detail")
    assert [record.getMessage() for record in heard] == ["a study"]
    assert [record.getMessage() for record in all_heard] == ["a fit", "a study"]


def test_a_more_talkative_level_is_kept(caplog):
    caplog.set_level(logging.DEBUG, LOGGER)
    heard = []
    with listening(heard.append):
        assert logging.getLogger(LOGGER).level == logging.DEBUG
        LOG.debug("a detail")
    assert heard == []
    assert logging.getLogger(LOGGER).level == logging.DEBUG
