"""The benchmark of margins on a small model: rows with goals, and what is missing said."""

import pytest
import torch
from layer_zoo import tiny

from probattn.errors import InputError
from probattn.inference.bench import margins as bench
from probattn.inference.bench.run import PARTS

IDS = torch.randint(16, (1, 20), generator=torch.Generator().manual_seed(0))
CPU = torch.device("cpu")


def test_rows_speak_of_all_layers_and_say_from_which():
    rows = bench.against_forward(CPU, 1, model=tiny("llama", torch.float32), ids=IDS, layers=[1])
    assert [row.goal for row in rows] == [45.0, 80.0, 15.0, 4.0]
    assert all(row.ratio > 0 for row in rows)
    exact = rows[0]
    spent = exact.seconds["exact"].least - exact.seconds["forward"].least
    assert exact.ratio == pytest.approx(1 + 2 * spent / exact.seconds["forward"].least)  # two layers for the one
    assert exact.notes["extrapolated"] == "from layers 1 to all 2"


def test_a_jacobian_by_automatic_differentiation_is_raced():
    # At position 70 the whole Jacobian is formed, at 64 others the core.
    ids = torch.randint(16, (1, 80), generator=torch.Generator().manual_seed(0))
    (row,) = bench.against_jacrev(CPU, 1, model=tiny("llama", torch.float32), ids=ids, at=[70])
    assert row.ratio == pytest.approx(64 * row.seconds["jacrev"].least / row.seconds["exact"].least)
    assert row.goal == 30.0


def test_a_model_that_is_missing_is_said(monkeypatch):
    def missing(*arguments):
        raise InputError("not installed; get it by pip")

    monkeypatch.setattr(bench, "load_gguf", missing)
    for rows in (bench.against_forward(CPU, 1), bench.against_jacrev(CPU, 1)):
        assert [row.notes["not measured"] for row in rows] == ["not installed; get it by pip"]


def test_memory_is_measured_in_processes_of_their_own(monkeypatch):
    monkeypatch.setattr("probattn.inference.bench.memory._in_own_process", lambda peak, length: 1000 * length)
    (row,) = bench.margin_memory([8, 16, 32])
    assert row.ratio == 2
    assert row.met


@pytest.mark.slow
def test_memory_grows_with_the_length():
    (row,) = bench.margin_memory([1024, 2048, 4096])
    assert row.ratio < 2.4


def test_the_part_is_registered():
    assert "margins" in PARTS
