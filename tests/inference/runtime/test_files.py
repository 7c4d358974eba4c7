"""Files are written whole or not at all, whoever else writes and whatever becomes of the writer."""

import errno
import json
import math
import os
import resource
import stat
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure

from probattn.errors import InputError
from probattn.inference.runtime.files import (
    finite_or_null,
    named_errors,
    prepare_folder,
    remove_partial_files,
    write_atomically,
    write_figure,
    write_json,
    write_text,
)


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


def test_a_writer_that_fails_leaves_nothing_behind(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("before")

    def fail(partial):
        partial.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "before"
    assert names(tmp_path) == ["result.txt"]


def test_until_the_end_there_is_the_old_file(tmp_path):
    """Seen from inside the writer, half way through, and through a second name of the old file afterwards."""
    path, other = tmp_path / "result.txt", tmp_path / "other.txt"
    path.write_text("before")
    os.link(path, other)

    def write(partial):
        partial.write_text("af")
        assert path.read_text() == "before"
        assert partial.parent == tmp_path  # one file system, or the move would be a copy
        with partial.open("a") as file:
            file.write("ter")
            file.flush()
            assert path.read_text() == "before"

    write_atomically(path, write)
    assert path.read_text() == "after"
    assert other.read_text() == "before"  # the file was replaced, not written over


def test_writers_that_race_and_readers_between_them(tmp_path):
    """Four writers and a reader: every reading is the whole of what one writer wrote."""
    path = tmp_path / "result.txt"
    texts = [letter * 200_000 for letter in "abcd"]
    write_text(path, texts[0])
    done, wrong = threading.Event(), []

    def read():
        while not done.is_set():
            text = path.read_text()
            if text not in texts:
                wrong.append((len(text), set(text)))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=lambda text=text: [write_text(path, text) for _ in range(15)]) for text in texts]
    mask = os.umask(0o022)
    os.umask(mask)
    reader.start()
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    done.set()
    reader.join()
    assert wrong == []
    assert names(tmp_path) == ["result.txt"]
    assert os.umask(mask) == mask  # the process is as it was


def test_one_writer_inside_another(tmp_path):
    path = tmp_path / "result.txt"

    def slow(partial):
        partial.write_text("slow, ")
        write_text(path, "fast")
        assert path.read_text() == "fast"
        with partial.open("a") as file:
            file.write("and whole")

    write_atomically(path, slow)
    assert path.read_text() == "slow, and whole"
    assert names(tmp_path) == ["result.txt"]


def test_a_writer_that_is_killed(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("before")
    program = """
import os, signal, sys
from pathlib import Path
from probattn.inference.runtime.files import write_atomically

def write(partial):
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

write_atomically(Path(sys.argv[1]), write)
"""
    killed = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert killed.returncode == -9
    assert path.read_text() == "before"
    write_text(path, "after")  # and what it left is in nobody's way
    assert path.read_text() == "after"


def test_files_have_the_permissions_of_the_user(tmp_path):
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "result.txt", "x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "result.txt").stat().st_mode) == 0o640


def test_json_has_null_where_it_has_no_number(tmp_path):
    path = tmp_path / "result.json"
    content = {"a": math.nan, "b": [1.5, -math.inf], "c": {"d": (math.inf, "é")}, "e": np.float64("nan"), "f": True}
    write_json(path, content)
    text = path.read_text(encoding="utf-8")
    expected = {"a": None, "b": [1.5, None], "c": {"d": [None, "é"]}, "e": None, "f": True}
    assert json.loads(text) == expected == finite_or_null(content)
    assert text.endswith("}\n")
    assert "é" in text
    assert '\n  "a"' in text


def test_figures_are_png(tmp_path):
    write_figure(tmp_path / "figure.png", Figure(figsize=(2, 1)))
    content = (tmp_path / "figure.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")) == (260, 130)


def test_folders_are_made_and_tried(tmp_path):
    folder = tmp_path / "a" / "b"
    assert prepare_folder(folder) == folder
    assert folder.is_dir()
    assert names(folder) == []
    assert prepare_folder(folder) == folder
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"--out .*file: cannot be written \(.+\); name a folder that can"):
        prepare_folder(tmp_path / "file")


def test_a_limit_on_the_size_of_files_is_named_and_nothing_lost(tmp_path):
    """RLIMIT_FSIZE stands for the full disk: the bytes do not fit, and the file is as it was."""
    path = tmp_path / "result.bin"
    path.write_bytes(b"before")
    program = """
import resource, sys
from pathlib import Path
from probattn.errors import InputError
from probattn.inference.runtime.files import write_bytes

resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_bytes(Path(sys.argv[1]), bytes(5000))
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
    assert (
        "result.bin: cannot be written: it is larger than this process may write (0.0 MiB to write, ulimit -f)"
        in done.stdout
    )
    assert path.read_bytes() == b"before"
    assert names(tmp_path) == ["result.bin"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "the disk is full (0.0 MiB to write, "), (errno.EDQUOT, "the quota of the disk is used up")],
)
def test_a_full_disk_is_named(tmp_path, monkeypatch, number, words):
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    before = path.read_bytes()

    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError) as caught:
        write_json(path, {"a": 2})
    assert words in str(caught.value)
    assert path.read_bytes() == before
    assert names(tmp_path) == ["result.json"]


@pytest.mark.parametrize(
    ("words", "limit", "free", "reason"),
    [
        ("I/O error: File too large (os error 27)", None, 2**40, "larger than this process may write"),
        ("I/O error (os error 28)", None, 2**40, "the disk is full"),
        ("basic_ios::clear: iostream error", 1000, 2**40, "larger than this process may write"),
        ("basic_ios::clear: iostream error", None, 2**20, "the disk is full (1.0 MiB free"),
        (
            "basic_ios::clear: iostream error\nand more",
            None,
            2**40,
            "cannot be written: basic_ios::clear: iostream error;",
        ),
    ],
)
def test_libraries_that_do_not_say_why_they_could_not_write(tmp_path, monkeypatch, words, limit, free, reason):
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    limits = (resource.RLIM_INFINITY if limit is None else limit,) * 2
    monkeypatch.setattr("resource.getrlimit", lambda _: limits)
    with pytest.raises(InputError) as caught, named_errors(tmp_path / "model", RuntimeError):
        raise RuntimeError(words)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(KeyError), named_errors(tmp_path / "model", RuntimeError):  # another error is left alone
        raise KeyError(words)


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "figures").mkdir()
    ours = [tmp_path / f".fit.nc.{'0f' * 16}.partial", tmp_path / "figures" / f".a.png.{'a' * 32}.partial"]
    others = [tmp_path / ".mine.partial", tmp_path / "fit.nc.partial", tmp_path / ".x.0f0f.partial"]
    for file in ours + others:
        file.write_text("half")
    assert remove_partial_files(tmp_path) == sorted(file.name for file in ours)
    assert all(file.exists() for file in others)
    assert not any(file.exists() for file in ours)
