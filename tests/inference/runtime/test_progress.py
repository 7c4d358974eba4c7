"""Progress is logged, heard by whoever listens, and printed to nobody."""

import logging

from listening import LOGGER, listening

from probattn.inference.runtime.progress import log_step

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


def test_nothing_is_printed_where_nobody_listens(capsys):
    log_step(LOG, "unheard", 1, 1)
    assert capsys.readouterr() == ("", "")
