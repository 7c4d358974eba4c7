"""Shared by the tests of the command line."""

import warnings
from types import SimpleNamespace

import pytest

from probattn.cli.app import main


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
