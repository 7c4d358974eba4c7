"""The harness of faults, a few seconds of it, and the controls that it notices what it should."""

import random
import signal

import pytest
from fault_files import flip_bits, malform
from fault_kernels import build, check_kernels, report_of
from fault_runs import Runs, fill_disk, in_child, kill, unreadable
from fault_tally import Tally, attempt

from probattn.errors import InputError
from probattn.inference.runtime import checksum
from probattn.inference.runtime.files import write_bytes


def test_flipped_bits_and_malformed_inputs(tmp_path):
    tally, dice = Tally(), random.Random(0)
    flip_bits(tmp_path, tally, dice, 150)
    malform(tmp_path, tally, dice, 150)
    assert tally.faults == []
    assert tally.rounds == {"flipped bits": 150, "malformed inputs": 150}
    assert tally.outcomes["malformed inputs: refused"] > 75


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of h5py, on damaged files
def test_the_control_without_checksums_accepts_flipped_bits(tmp_path, monkeypatch):
    def blind(data, name, remedy):
        return data[: -checksum._SIZE]

    monkeypatch.setattr("probattn.inference.runtime.checkpoint.unseal", blind)
    monkeypatch.setattr("probattn.inference.results.fit_file.unseal", blind)
    tally = Tally()
    flip_bits(tmp_path, tally, random.Random(0), 60)
    assert tally.outcomes["flipped bits: accepted"] > 20


def test_outcomes_of_readers():
    def fail(error):
        raise error

    assert attempt(lambda: 1)[0] == "read"
    assert attempt(lambda: fail(InputError("one line")))[0] == "refused"
    assert attempt(lambda: fail(InputError("two\nlines")))[0] == "traceback"
    assert attempt(lambda: fail(KeyError("identity")))[0] == "traceback"


def test_a_kill_at_any_moment_of_writing_leaves_the_old_file_or_the_new(tmp_path):
    """Opened, half written, renamed: the moments are those that the harness kills runs at."""
    path, seen = tmp_path / "claims.json", set()
    for moment in range(1, 9):
        path.write_text("1", encoding="utf-8")
        status = in_child(lambda: write_bytes(path, b"[2, 3]"), out=tmp_path, kill_at=moment)
        assert status in (0, -signal.SIGKILL)
        assert unreadable(tmp_path) == []
        seen.add((status, path.read_text(encoding="utf-8")))
    assert seen == {(-signal.SIGKILL, "1"), (-signal.SIGKILL, "[2, 3]"), (0, "[2, 3]")}


def test_the_control_of_the_kills_a_file_that_is_written_in_place(tmp_path):
    path, found = tmp_path / "claims.json", []
    for moment in (1, 2, 3):
        path.write_text("1", encoding="utf-8")
        in_child(lambda: path.write_bytes(b"[2, 3]"), out=tmp_path, kill_at=moment)
        found.append(unreadable(tmp_path))
    assert found[1] == ["claims.json"]


def test_outcomes_of_children(tmp_path):
    def fail(error):
        raise error

    assert in_child(lambda: None, out=tmp_path) == 0
    assert in_child(lambda: fail(InputError("one line")), out=tmp_path) == 2
    assert in_child(lambda: fail(InputError("two\nlines")), out=tmp_path) == 3
    assert in_child(lambda: fail(KeyError("identity")), out=tmp_path) == 3
    assert in_child(lambda: signal.pause(), out=tmp_path, kill_after=0.01) == -signal.SIGKILL
    limited = in_child(lambda: write_bytes(tmp_path / "large", bytes(1000)), out=tmp_path, limit=100)
    assert limited == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nuts", "svi", "map", "train", "verify"])
def test_kills_and_full_disks(tmp_path, name):
    tally, dice, runs = Tally(), random.Random(0), Runs(tmp_path)
    for _ in range(2):
        kill(runs, name, tally, dice)
    fill_disk(runs, name, tally, dice)
    assert tally.faults == []
    assert tally.outcomes[f"runs resumed to the end: equal to the unbroken {name}"] == 2
    assert tally.outcomes[f"kills: of {name}"] >= 1


@pytest.mark.slow
def test_a_killed_run_that_differs_is_noticed(tmp_path, monkeypatch):
    runs = Runs(tmp_path)
    expected = runs.whole("train").results
    monkeypatch.setitem(expected, "metrics", expected["metrics"][:-1])
    tally = Tally()
    kill(runs, "train", tally, random.Random(0), strikes=1)
    assert "metrics differs" in tally.faults[0]


@pytest.mark.slow
def test_the_kernels_under_sanitizers(tmp_path):
    program = build(tmp_path)
    if program is None:
        pytest.skip("no GCC with sanitizers")
    tally = Tally()
    check_kernels(program, tally, random.Random(0), 300)
    assert tally.faults == []
    assert tally.rounds == {"kernels under sanitizers": 300}
    # The controls: an array one token too short, and a shift by a negative number.
    assert "heap-buffer-overflow" in report_of(program, 1, 50, "overrun")
    assert "shift exponent -1" in report_of(program, 1, 50, "shift")
