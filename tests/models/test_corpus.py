import os
import sys
import types

import pytest
import torch

from probattn.errors import InputError
from probattn.models.corpus import UNKNOWN, Corpus, load_corpus, read_text


def test_python_docs_need_no_download():
    corpus = load_corpus()
    assert len(corpus.text) > 300_000
    assert "expression" in corpus.text.lower()
    assert len(corpus.heldout) == pytest.approx(0.1 * (len(corpus.text) + len(corpus.heldout)), abs=1)
    assert corpus.vocabulary[0] == " "
    assert len(corpus.digest) == 64


def test_a_path_and_a_second_text(tmp_path):
    (tmp_path / "train.txt").write_text("aaaabbbccd\u00e9" * 4, encoding="utf-8-sig")
    (tmp_path / "test.txt").write_bytes(b"abc\r\nxyz")
    corpus = load_corpus(str(tmp_path / "train.txt"), heldout=str(tmp_path / "test.txt"))
    assert corpus.vocabulary == ("a", "b", "c", "d", "\u00e9", UNKNOWN)
    assert corpus.heldout == "abc\nxyz"
    assert corpus.encode("ab?").tolist() == [0, 1, 5]
    assert corpus.name == "train.txt"


def test_windows_are_disjoint_and_targets_are_the_next_characters():
    corpus = Corpus("toy", "abcdefghij", "abc", (*"abcdefghij", UNKNOWN))
    windows = corpus.windows(4)
    assert windows.inputs.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(windows.targets, windows.inputs + 1)
    assert corpus.windows(2, heldout=True).inputs.tolist() == [[0, 1]]


def test_rare_characters_share_one_index(tmp_path):
    text = "".join(chr(0x4E00 + k) for k in range(400)) + "a" * 10
    (tmp_path / "many.txt").write_text(text, encoding="utf-8")
    corpus = load_corpus(str(tmp_path / "many.txt"), fraction=0.01)
    assert len(corpus.vocabulary) == 256
    assert corpus.vocabulary[-1] == UNKNOWN
    assert int((corpus.encode(text) == 255).sum()) == 410 - len([c for c in text if c in corpus.vocabulary[:255]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; give a text"),
        (b" \n ", "the file is empty"),
        (b"abc\0def", r"a binary file \(NUL at byte 3\)"),
        (b"abc\xff", r"not UTF-8 \(byte 3: invalid start byte\); convert it"),
    ],
)
def test_unusable_files(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_corpus(str(path))


def test_missing_folder_and_short(tmp_path):
    with pytest.raises(InputError, match="no such file; give python-docs"):
        load_corpus(str(tmp_path / "none.txt"))
    with pytest.raises(InputError, match="cannot be read"):
        load_corpus(str(tmp_path))
    corpus = Corpus("toy", "abc", "a", ("a", "b", "c", UNKNOWN))
    with pytest.raises(InputError, match="its training part has 3 characters, too short for a context of 3"):
        corpus.windows(3)
    with pytest.raises(InputError, match="its held-out part has 1 characters"):
        corpus.windows(2, heldout=True)
    with pytest.raises(InputError, match="context is 0"):
        corpus.windows(0)


class TestHub:
    def test_without_the_package(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InputError, match=r"needs the datasets package; install probattn\[lm\]"):
            read_text("hf:wikitext:wikitext-2-raw-v1")

    def test_name_and_config_reach_the_loader(self, monkeypatch):
        class Rows(dict):
            column_names = ("text",)

        asked = []
        module = types.ModuleType("datasets")
        module.load_dataset = lambda *names, split: asked.append((*names, split)) or Rows(text=["one", "two"])
        monkeypatch.setitem(sys.modules, "datasets", module)
        assert read_text("hf:wikitext:wikitext-2-raw-v1") == ("hf:wikitext:wikitext-2-raw-v1", "one\ntwo")
        assert read_text("hf:wikitext")[1] == "one\ntwo"
        assert asked == [("wikitext", "wikitext-2-raw-v1", "train"), ("wikitext", None, "train")]

    def test_failures_are_one_line(self, monkeypatch):
        def fail(*_, **__):
            raise ConnectionError("no route")

        module = types.ModuleType("datasets")
        module.load_dataset = fail
        monkeypatch.setitem(sys.modules, "datasets", module)
        with pytest.raises(InputError, match=r"could not be loaded \(no route\); check the name"):
            read_text("hf:nowhere")


def test_devices_pipes_and_floods_are_refused_unread(tmp_path, monkeypatch):
    """/dev/zero never ends, and a pipe that nobody writes to never begins."""
    os.mkfifo(tmp_path / "pipe")
    for path, kind in (("/dev/zero", "a device"), (tmp_path / "pipe", "a pipe"), (tmp_path, "a folder")):
        with pytest.raises(InputError, match=f"cannot be read \\({kind}, not a regular file\\); give a file"):
            load_corpus(str(path))
    with (tmp_path / "sparse.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InputError, match=r"1,099,511,627,776 bytes; at most 1,073,741,824 are read"):
        load_corpus(str(tmp_path / "sparse.txt"))
    with pytest.raises(InputError, match="a name with a NUL character"):
        load_corpus("a\0b")
