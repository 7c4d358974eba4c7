"""`probattn explore`: saving, serving, and what can go wrong with either."""

import http.client
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import webbrowser

import pytest

from probattn.cli.app import main
from probattn.errors import InputError
from probattn.teach.explorer import explorer_page, serve_page

PROBATTN = [sys.executable, "-m", "probattn"]


def command(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["explore", *arguments])
    return stopped.value.code


@pytest.fixture
def taken():
    """A port in use with a free one after it, as far as can be known."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


@pytest.fixture
def running():
    """Runs the command until the address is printed; stopped at the end."""
    started = []

    def run(*arguments, **environment):
        process = subprocess.Popen(
            [*PROBATTN, "explore", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            # A test run in the background inherits "ignore".
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        lines = []
        while not any(line.startswith("explorer:") for line in lines):
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
        return process, lines

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_saving_writes_the_page(tmp_path, capsys):
    path = tmp_path / "explorer.html"
    assert command("--save", str(path)) == 0
    assert path.read_text(encoding="utf-8") == explorer_page()
    assert re.fullmatch(r"explorer: .*explorer.html \([12]\d\d KiB\); open it .*\n", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("place", "reason"), [("missing/explorer.html", "No such file"), (".", "a folder"), ("file/x.html", "Not a dir")]
)
def test_a_place_that_cannot_be_written(tmp_path, capsys, place, reason):
    (tmp_path / "file").write_text("kept")
    assert command("--save", str(tmp_path / place)) == 2
    error = capsys.readouterr().err
    assert error.startswith("probattn: --save ")
    assert reason in error
    assert error.count("\n") == 1
    assert (tmp_path / "file").read_text() == "kept"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_serving_and_stopping(running, taken):
    process, lines = running("--no-browser", "--port", str(taken))
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/ \(Ctrl-C stops it\)", lines[-1])[1])
    assert port > taken
    assert lines[0] == f"port {taken} is taken; using {port}.\n"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/")
    answer = connection.getresponse()
    assert answer.status == 200
    assert answer.getheader("Content-Type") == "text/html; charset=utf-8"
    assert answer.read().decode() == explorer_page()
    connection.request("GET", "/secrets")
    answer = connection.getresponse()
    assert answer.status == 404
    answer.read()
    connection.close()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert (process.returncode, out, error) == (0, "stopped.\n", "")


def test_without_a_browser_the_address_is_what_remains(running):
    process, _ = running("--port", "0", PATH="", BROWSER="", DISPLAY="")
    assert process.stdout.readline() == "no browser was found; open the address above in one.\n"


def test_the_browser_is_given_the_address(monkeypatch, capsys):
    opened = queue.Queue()
    seen = []
    monkeypatch.setattr(webbrowser, "open", lambda address: opened.put(address) or True)
    monkeypatch.setattr(
        "http.server.ThreadingHTTPServer.serve_forever", lambda self: seen.append(opened.get(timeout=120))
    )
    assert command("--port", "0") == 0
    assert capsys.readouterr().out == f"explorer: {seen[0]} (Ctrl-C stops it)\n"


def test_bad_ports(capsys):
    assert command("--port", "70000") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_all_ports_taken(monkeypatch):
    def refuse(*_):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr("http.server.ThreadingHTTPServer.__init__", refuse)
    with pytest.raises(InputError, match=r"--port 8000: in use, like all up to 8019; name another, or 0 for any"):
        serve_page("", 8000)


def test_the_server_answers_this_machine_alone():
    server = serve_page("page", 0)
    assert server.server_address[0] == "127.0.0.1"
    server.server_close()
