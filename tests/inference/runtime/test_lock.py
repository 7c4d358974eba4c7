"""One run per output folder."""

import os
import signal
import subprocess
import sys

import pytest

from probattn.errors import InputError
from probattn.inference.runtime.lock import hold_folder

HOLD = """
import sys, time
from pathlib import Path
from probattn.inference.runtime.lock import hold_folder

with hold_folder(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_and_the_first_named(tmp_path):
    out = tmp_path / "fit"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout.readline() == "held\n"
            words = rf"fit: in use by process {holder.pid} on .+; wait until that run ends"
            with pytest.raises(InputError, match=words), hold_folder(out):
                pass
        finally:
            os.kill(holder.pid, signal.SIGKILL)  # however it ends, the lock ends with it
    assert (out / ".lock").exists()
    partial = out / f".fit.nc.{'0' * 32}.partial"
    partial.write_text("half")
    with hold_folder(out):
        assert not partial.exists()
    assert not out.exists() or list(out.iterdir()) == []


def test_two_in_one_process(tmp_path):
    with (
        hold_folder(tmp_path),
        pytest.raises(InputError, match=f"in use by process {os.getpid()}"),
        hold_folder(tmp_path),
    ):
        pass
    with hold_folder(tmp_path):
        pass


def test_an_empty_folder_that_was_made_goes_again(tmp_path):
    with hold_folder(tmp_path / "a"):
        pass
    assert not (tmp_path / "a").exists()
    with hold_folder(tmp_path / "a") as folder:
        (folder / "result").write_text("x")
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["result"]
    with pytest.raises(InputError, match="cannot be written"), hold_folder(tmp_path / "a" / "result"):
        pass
