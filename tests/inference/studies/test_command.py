"""The command line that the studies share: its status, input errors in one line, other errors as they are."""

import sys
from dataclasses import dataclass

import pytest
from cyclopts import Parameter

from probattn.errors import InputError
from probattn.inference.studies.command import run_command


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    size: int = 3


def run(options: Options | None = None) -> int:
    size = (options or Options()).size
    if size == 0:
        raise InputError("size is 0; it must be positive.")
    if size < 0:
        raise ArithmeticError("a fault of the program")
    return size


@pytest.mark.parametrize(("words", "status"), [([], 3), (["--size", "7"], 7), (["--size", "0"], 2)])
def test_the_status_of_the_command(words, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["study", *words])
    with pytest.raises(SystemExit) as ended:
        run_command("any", "Words.", run)
    assert ended.value.code == status
    assert capsys.readouterr().err == ("size is 0; it must be positive.\n" if status == 2 else "")


def test_a_fault_of_the_program_is_no_input_error(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["study", "--size", "-1"])
    with pytest.raises(ArithmeticError):
        run_command("any", "Words.", run)
