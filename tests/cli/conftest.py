"""Shared by the tests of the command line."""

import contextlib
import io
import warnings
from types import SimpleNamespace

import pytest

from probattn.cli.app import main


@pytest.fixture(scope="module")
def quietly():
    """Runs a command in this process for a fixture that several tests share; returns its status and its words."""

    def run(*arguments, cwd):
        before, words, errors = warnings.formatwarning, io.StringIO(), io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(words), contextlib.redirect_stderr(errors):
            try:
                main([str(argument) for argument in arguments])
            except SystemExit as stopped:
                code = stopped.code
            finally:
                warnings.formatwarning = before
        return SimpleNamespace(returncode=code, stdout=words.getvalue(), stderr=errors.getvalue())

    return run


@pytest.fixture
def here(monkeypatch, capsys):
    """Runs a command in this process, where the libraries are loaded already; as from ``subprocess.run``."""
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which the command line changes

    def run(*arguments, cwd):
        monkeypatch.chdir(cwd)
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(returncode=stopped.value.code, stdout=captured.out, stderr=captured.err)

    return run
