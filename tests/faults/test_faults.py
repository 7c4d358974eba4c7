"""The harness of faults, a few seconds of it, and the control that it notices what it should."""

import random

import pytest
from fault_harness import Fits, Tally, attempt, fill_disk, flip_bits, kill, malform

from probattn.errors import InputError
from probattn.inference.runtime import checksum


def test_flipped_bits_and_malformed_inputs(tmp_path):
    tally, dice = Tally(), random.Random(0)
    flip_bits(tmp_path, tally, dice, 300)
    malform(tmp_path, tally, dice, 300)
    assert tally.faults == []
    assert tally.rounds == {"flipped bits": 300, "malformed inputs": 300}
    assert tally.outcomes["malformed inputs: refused"] > 150


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of h5py, on damaged files
def test_the_control_without_checksums_accepts_flipped_bits(tmp_path, monkeypatch):
    def blind(data, name, remedy):
        return data[: -checksum._SIZE]

    monkeypatch.setattr("probattn.inference.runtime.checkpoint.unseal", blind)
    monkeypatch.setattr("probattn.inference.results.fit_file.unseal", blind)
    tally = Tally()
    flip_bits(tmp_path, tally, random.Random(0), 100)
    assert tally.outcomes["flipped bits: accepted"] > 30


def test_outcomes_of_readers():
    def fail(error):
        raise error

    assert attempt(lambda: 1)[0] == "read"
    assert attempt(lambda: fail(InputError("one line")))[0] == "refused"
    assert attempt(lambda: fail(InputError("two\nlines")))[0] == "traceback"
    assert attempt(lambda: fail(KeyError("identity")))[0] == "traceback"


@pytest.mark.slow
def test_kills_and_full_disks(tmp_path):
    tally, dice, fits = Tally(), random.Random(0), Fits(tmp_path)
    for _ in range(4):
        kill(fits, tally, dice)
        fill_disk(fits, tally, dice)
    assert tally.faults == []
    assert tally.outcomes["fits resumed to the end: equal to the unbroken one"] == 4
