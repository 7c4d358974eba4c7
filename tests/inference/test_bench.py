"""The benchmark races functions that compute the same, and reports missed goals too."""

import json
import time
from pathlib import Path
from typing import get_args

import pytest
import torch

from probattn import CausalAttention
from probattn.errors import InputError
from probattn.inference.bench.density import dense_log_density, log_density
from probattn.inference.bench.harness import Row, Timing, race
from probattn.inference.bench.penalty import dense_penalty, kernel_penalty, memory
from probattn.inference.bench.run import PARTS, BenchOptions, Part, as_table, bench, broken_gates
from probattn.inference.bench.sampling import naive_sequence
from probattn.inference.runtime.environment import describe
from probattn.moments import cpu
from probattn.plotting import plot_cost


def test_a_race_takes_turns_and_keeps_the_least():
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.02)

    found = race({"fast": lambda: order.append("fast"), "slow": slow}, rounds=3, warmup=1)
    assert order == ["fast", "slow"] * 4
    assert found["slow"].least >= 0.02 > found["fast"].least
    assert found["slow"].median >= found["slow"].least
    assert found["slow"].calls == 3


def test_the_options_name_every_part():
    assert get_args(Part) == tuple(PARTS)


def test_a_turn_lasts_as_long_as_it_is_told():
    found = race({"fast": lambda: None, "slow": lambda: time.sleep(0.02)}, rounds=2, turn=0.03)
    assert found["slow"].calls == 4
    assert found["fast"].calls > 100


def test_a_race_stops_at_its_budget():
    assert race({"slow": lambda: time.sleep(0.03)}, rounds=50, warmup=0, budget=0.05)["slow"].calls < 10


@pytest.mark.parametrize(
    ("faster", "ratio", "goal", "met"),
    [(True, 5.0, 4.0, True), (True, 3.0, 4.0, False), (False, 2.0, 2.5, True), (False, 3.0, 2.5, False)],
)
def test_a_goal_is_met_or_missed(faster, ratio, goal, met):
    row = Row("work", "other", ratio, faster, goal)
    assert row.met is met
    assert row.as_dict()["goal"] == f"{'>=' if faster else '<='} {goal:g}"
    assert Row("work", "other", ratio, faster).met is None
    assert Row("work", "other", None, faster, goal).met is None


def test_the_competitors_compute_the_same():
    torch.manual_seed(0)
    parts = [torch.randn(3, 20, 4, dtype=torch.float64) for _ in range(3)]
    torch.testing.assert_close(kernel_penalty(*parts), dense_penalty(*parts), rtol=1e-10, atol=1e-10)

    matrix, u = 0.3 * torch.randn(1, 4, 4, dtype=torch.float64), torch.randn(3, 20, 4, dtype=torch.float64)
    torch.testing.assert_close(log_density(matrix, u), dense_log_density(matrix, u), rtol=1e-10, atol=1e-10)
    assert (log_density(matrix.mT, u) - dense_log_density(matrix, u)).abs().min() > 1e-3

    attention = CausalAttention.from_qk_matrix(0.2 * torch.eye(2, dtype=torch.float64))
    e = 0.5 * torch.randn(2, 8, 2, dtype=torch.float64)
    torch.testing.assert_close(attention.residual(naive_sequence(attention, e, 1e-12)), e, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_is_measured_and_linear():
    (row,) = memory((4096, 8192))  # each in a process of its own; shorter ones are lost in what a process has spare
    assert 1.1 < row.ratio < 2.6
    assert row.notes["below 2 GiB"]


def test_a_bar_in_the_name_of_a_row_ends_no_cell():
    where = describe(torch.device("cpu"), torch.float32, 0)
    table = as_table([Row("log|det|", "a pass|two", 2.0, faster=True)], where)
    (line,) = (line for line in table.splitlines() if line.startswith("| log"))
    assert line.replace(r"\|", "").count("|") == 6


def test_the_table_shows_what_was_missed_and_what_was_not_measured(monkeypatch):
    seconds = {"ours": Timing(1.0, 1.5, 3), "theirs": Timing(2.0, 2.5, 3)}
    rows = [
        Row("a", "its three matrix products, dense", 3.0, faster=False, goal=2.5, seconds=seconds),
        Row("b", "NumPyro", None, faster=True, goal=1.0, notes={"not measured": "NumPyro is not installed."}),
        Row("c", "einsum and slogdet", 0.9, faster=True, goal=5.0),
        Row("d", "torch.func.jacrev", 1234.0, faster=True),
    ]
    table = as_table(rows, describe(torch.device("cpu"), torch.float32, 0))
    assert "| a | its three matrix products, dense | 3 times the cost | <= 2.5 | **no** |" in table
    assert "| d | torch.func.jacrev | 1,230 times faster |  |  |" in table
    assert "| b | NumPyro | NumPyro is not installed. | >= 1 |  |" in table
    assert "ours 1 s (median 1.5)" in table
    assert json.dumps([row.as_dict() for row in rows])
    monkeypatch.setattr(cpu, "AVAILABLE", True)
    assert broken_gates(rows) == ["c against einsum and slogdet: 0.9 times faster, gate 1.5"]
    assert broken_gates(rows[:2]) == []
    monkeypatch.setattr(cpu, "AVAILABLE", False)  # the gates are those of the compiled kernels
    assert broken_gates(rows) == []


def test_a_run_writes_the_rows_of_its_parts(tmp_path, caplog, monkeypatch):
    def missing(device, rounds):
        raise ImportError("no module named numpyro")

    found = Row("work", "other", 3.0, faster=True, goal=2.0, seconds={"ours": Timing(1.0, 1.5, 3)})
    parts = {"memory": lambda device, rounds: [found] * rounds, "nuts": missing, "gpu": lambda device, rounds: 1 / 0}
    monkeypatch.setattr("probattn.inference.bench.run.PARTS", parts)
    with caplog.at_level("INFO", logger="probattn"):
        rows = bench(BenchOptions(out=tmp_path, device="cpu", parts=["nuts", "memory"], rounds=2))
    content = json.loads((tmp_path / "bench.json").read_text())
    assert content["schema"] == 1
    assert content["rows"] == [row.as_dict() for row in rows]
    assert [row["met"] for row in content["rows"]] == [True, True, None]
    assert "numpyro; install probattn[bench]" in content["rows"][2]["notes"]["not measured"]
    assert "| work | other | 3 times faster | >= 2 | yes |" in (tmp_path / "bench.md").read_text()
    line = "work | other: 3 times faster (goal >= 2: met)"
    assert caplog.messages[:4] == ["measuring memory", line, line, "measuring nuts"]
    assert len(caplog.messages) == 5


def test_parts_and_rounds_that_cannot_be():
    with pytest.raises(InputError, match="parts is 'speed'; use one of 'penalty'"):
        BenchOptions(parts=["speed"])
    with pytest.raises(InputError, match="at least 1"):
        BenchOptions(rounds=0)


def test_the_figure_draws_every_competitor():
    curve = {"at": [1.0, 2.0, 4.0], "exact": [0.1, 0.2, 0.4], "dense": [0.2, 0.5, 1.5]}
    figure = plot_cost({"length T": curve, "heads": curve})
    assert len(figure.axes) == 2
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines] == ["exact", "dense"]
        assert list(axis.lines[1].get_ydata()) == curve["dense"]
