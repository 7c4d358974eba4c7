"""Output of commands: an error in saying something never decides what a command does."""

import io
import os
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
from forked import Forked
from posteriors import sequences

from probattn.cli.app import main
from probattn.cli.output import ForgivingStream, forgiving_output
from probattn.inference.results.fit_file import Fit

pytestmark = pytest.mark.usefixtures("undrawn")

FIT = [sys.executable, "-m", "probattn", "fit", "--data", "hidden.npz", "--method", "laplace", "--draws", "40"]


@pytest.fixture
def folder(tmp_path):
    np.savez(tmp_path / "hidden.npz", u=sequences()[:3, :6].numpy())
    return tmp_path


def test_a_reader_that_goes_away_ends_nothing(folder):
    """As ``probattn fit ... | head -1``: the results are saved, the rest of the talk is dropped."""
    with subprocess.Popen(
        [*FIT, "--out", "fit"], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "")
    assert Fit.load(folder / "fit" / "fit.nc").method == "laplace"


def test_an_output_without_the_characters(folder):
    words = [*FIT, "--out", "gehört"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    result = subprocess.run(words, cwd=folder, capture_output=True, env=environment, timeout=200, check=False)
    assert result.returncode == 0, result.stderr
    assert b"geh\\xf6rt" in result.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_end_saves_and_says_how_to_resume(folder, number):
    words = [*FIT[3:6], "--method", "map", "--steps", "100000", "--patience", "0", "--out", "fit"]
    with Forked(*words, cwd=folder) as process:
        process.until((folder / "fit" / "map.pt").exists)
        process.send_signal(number)
        assert process.wait() == 130
    assert (
        process.errors
        == "probattn: interrupted; run the same command with --resume to go on from the last checkpoint.\n"
    )
    assert (folder / "fit" / "map.pt").exists()
    assert not (folder / "fit" / ".lock").exists()


class Broken(io.StringIO):
    """A stream that nobody reads."""

    def write(self, text):
        raise BrokenPipeError

    def flush(self):
        raise BrokenPipeError


def test_the_streams_are_given_back(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Broken())
    before = sys.stdout, sys.stderr
    with forgiving_output():
        print("dropped", flush=True)
    assert (sys.stdout, sys.stderr) == before
    with pytest.raises(BrokenPipeError):  # the control: without it, this is what one gets
        print("dropped", flush=True)


def test_a_closed_stream_and_a_poor_one(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with forgiving_output():
        sys.stdout.write("nowhere")
    poor = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = ForgivingStream(poor)
    stream.write("gehört")
    stream.flush()
    assert poor.buffer.getvalue() == b"geh\\xf6rt"


@pytest.mark.parametrize(("words", "quiet"), [(["--version"], True), (["--version", "--debug"], False)])
def test_other_libraries_are_quiet_unless_debugging(monkeypatch, capsys, words, quiet):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    for name in ("TQDM_DISABLE", "TRANSFORMERS_VERBOSITY"):
        os.environ.pop(name, None)
    with pytest.raises(SystemExit):
        main(words)
    assert capsys.readouterr().out.startswith("probattn ")
    assert (os.environ.get("TQDM_DISABLE") == "1") is quiet
    assert (os.environ.get("TRANSFORMERS_VERBOSITY") == "error") is quiet


def test_a_stream_tells_before_it_writes():
    told, below = [], io.StringIO()
    stream = ForgivingStream(below)
    stream.before_write = lambda: told.append(below.getvalue())
    stream.write("one")
    stream.write("two")
    assert told == ["", "one"]
