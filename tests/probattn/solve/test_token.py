"""The search in several dimensions: what it reports, and what it does where the usual starts fail."""

from dataclasses import replace

import pytest
import torch

from probattn import CausalAttention
from probattn.errors import NoSolutionError
from probattn.solve import token as module
from probattn.solve.context import Context
from probattn.solve.token import find_token, solve_token, without_rival
from support import attention_like, tokens

# The first coordinate folds: at the origin u - tanh(3 u) turns over, det J = -2.
FOLDED = Context.of(
    CausalAttention.from_qk_matrix(torch.diag(torch.tensor([3.0, 0.0])).double()),
    torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64),
)
ORIGIN = torch.zeros(2, dtype=torch.float64)


def without_vertices(monkeypatch):
    """Leave the search its usual start alone, which here is the solution where the map turns over."""
    none = torch.empty(0, 2, dtype=torch.float64)
    monkeypatch.setattr(module, "vertices", lambda context: none.unsqueeze(1) if context.visible is not None else none)


def test_a_solution_where_the_map_turns_over_is_not_the_only_one(monkeypatch):
    without_vertices(monkeypatch)
    found = find_token(FOLDED, ORIGIN, "smallest_step")
    torch.testing.assert_close(found.u, ORIGIN)
    assert len(found.roots) == 1  # the search itself met no other
    assert bool(found.several)


def test_nor_is_it_alone_for_many_tokens_at_once(monkeypatch):
    without_vertices(monkeypatch)
    visible = torch.ones(1, 2, dtype=torch.bool)
    stretch = replace(FOLDED, visible=visible)
    assert not bool(without_rival(stretch, ORIGIN.unsqueeze(0), ORIGIN.unsqueeze(0)))
    beyond = torch.tensor([[2.0, 0.0]], dtype=torch.float64)  # one solution, near 3
    alone = find_token(FOLDED, beyond[0], "smallest_step").u.unsqueeze(0)
    assert bool(without_rival(stretch, beyond, alone))


def test_where_the_usual_starts_fail_the_hull_is_searched(monkeypatch):
    attention = attention_like(3, 1, 3, 3, size=1.5)
    context, noise = Context.of(attention, tokens(3, 8, 3)), tokens(4, 3)
    expected = find_token(context, noise, "smallest_step")
    calls = []

    def failing_first(context, noise, starts, newton=module.newton):
        ends = newton(context, noise, starts)
        calls.append(len(starts))
        return ends._replace(distance=torch.full_like(ends.distance, torch.inf)) if len(calls) == 1 else ends

    monkeypatch.setattr(module, "newton", failing_first)
    found = find_token(context, noise, "smallest_step")
    assert len(calls) == 2
    assert bool(found.solved)
    torch.testing.assert_close(found.u, expected.u, rtol=1e-9, atol=1e-9)

    def failing_always(context, noise, starts, newton=failing_first.__defaults__[0]):
        ends = newton(context, noise, starts)
        return ends._replace(distance=torch.full_like(ends.distance, 0.5))

    monkeypatch.setattr(module, "newton", failing_always)
    with pytest.raises(NoSolutionError, match=r"position 8, batch element \(\).*One exists"):
        solve_token(context, noise, "smallest_step", 8)


@pytest.mark.parametrize("shape", [(4,), (2, 4)])
def test_an_element_does_not_depend_on_its_neighbours(shape, monkeypatch):
    """More starts for one element are no more starts for the others."""
    attention = attention_like(3, 1, 3, 3, size=1.5)
    context, noise = Context.of(attention, tokens(3, 4, 8, 3)), tokens(4, *shape, 3)
    failing = torch.zeros(shape, dtype=torch.bool)
    failing[..., 2] = True
    calls = []

    def failing_first(context, noise, starts, newton=module.newton):
        ends = newton(context, noise, starts)
        calls.append(starts.shape)
        fails = failing if ends.distance.shape[1:] == shape else failing.new_zeros(1)
        return ends._replace(distance=ends.distance.masked_fill(fails, torch.inf))

    expected = find_token(context, noise, "smallest_step")
    monkeypatch.setattr(module, "newton", failing_first)
    found = find_token(context, noise, "smallest_step")
    assert len(calls) == 2
    assert calls[1][1:] == (int(failing.sum()), 3)  # the second search is for these alone
    assert bool(found.solved.all())
    torch.testing.assert_close(found.u[~failing], expected.u[~failing], rtol=0, atol=0)
    torch.testing.assert_close(found.valid.sum(0)[~failing], expected.valid.sum(0)[~failing])
    residual = found.u - context.mean(found.u) - noise
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-12)


def test_failures_are_reported_and_not_raised_by_find_token():
    attention = CausalAttention.from_qk_matrix(torch.tensor([[0.3]], dtype=torch.float64), mask="inclusive")
    context = Context.of(attention, torch.empty(0, 1, dtype=torch.float64))
    found = find_token(context, torch.ones(1, dtype=torch.float64), "smallest_step")  # e_1 = 0 whatever u_1
    assert not bool(found.solved)
    assert float(found.distance) == pytest.approx(1.0)
