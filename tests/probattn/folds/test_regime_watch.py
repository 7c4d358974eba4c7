"""A search for folds that takes long says so, once, and keeps its budget."""

import logging
import re

import pytest
import torch

from probattn import CausalAttention, regime
from probattn.folds import regime as module
from probattn.solve.context import Context
from support import tokens


def attention():
    """Attention in the plane that no bound certifies and where no fold is found."""
    return CausalAttention.from_qk_matrix(-1.5 * torch.eye(2, dtype=torch.float64))


def test_a_long_search_says_so_once_and_counts(monkeypatch, caplog):
    monkeypatch.setattr(module, "_PATIENCE", 0.0)
    batch = tokens(0, 2, 7, 2)
    with caplog.at_level(logging.INFO, logger="probattn.folds.regime"):
        found = regime(attention(), batch, search=True, budget=2000)
    assert [str(one) for one in found] == ["regular", "regular"]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1  # for both sequences together
    assert "1 of at most 5 pasts" in warnings[0].getMessage()
    steps = [(record.step, record.total) for record in caplog.records if record.levelno == logging.INFO]
    assert steps == [(2, 5), (3, 5), (4, 5), (5, 5), (1, 5), (2, 5), (3, 5), (4, 5), (5, 5)]


def test_a_quick_search_and_no_search_are_silent(monkeypatch, caplog):
    u = tokens(0, 7, 2)
    with caplog.at_level(logging.INFO, logger="probattn.folds.regime"):
        monkeypatch.setattr(module, "_PATIENCE", 1e9)
        regime(attention(), u, search=True, budget=300)
        monkeypatch.setattr(module, "_PATIENCE", 0.0)
        regime(attention(), u)
    assert caplog.records == []


def test_the_budget_is_kept_and_told():
    found = regime(attention(), tokens(0, 30, 2), search=True, budget=1000)
    assert found.evidence.endswith("no fold found at 960 points after 4 of 28 pasts, the budget")


@pytest.mark.parametrize(("length", "budget"), [(30, 240), (30, 1000), (7, 2000)])
def test_no_more_points_are_visited_than_the_budget_allows_and_as_many_as_it_says(monkeypatch, length, budget):
    """Counted where a next token's Jacobian is evaluated, not where the evidence is written."""
    visited, own = [], Context.mean_and_jacobian

    def counted(self, u):
        visited.append(len(u))
        return own(self, u)

    u = tokens(0, length, 2)
    monkeypatch.setattr(Context, "mean_and_jacobian", counted)
    regime(attention(), u)
    assert visited == []  # without a search none
    found = regime(attention(), u, search=True, budget=budget)
    assert 0 < sum(visited) <= budget
    told = re.search(r"no fold found at ([\d,]+) points", found.evidence)
    assert int(told[1].replace(",", "")) == sum(visited)
    fewer = sum(visited)
    visited.clear()
    regime(attention(), u, search=True, budget=2 * budget)
    assert sum(visited) > fewer  # the control: it is the budget that ends the search
