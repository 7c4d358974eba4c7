"""Every number on the explorer's screen against the library, to 1e-6."""

import math
import warnings

import pytest
import torch
from explorer_numbers import (
    TOLERANCE,
    check_smallest,
    check_solutions,
    check_support,
    differences,
    line_expected,
    plane_attention,
    plane_expected,
    tensor,
)

from probattn import CausalAttention, stability_margin
from probattn.errors import SeveralSolutionsWarning
from probattn.mean_field import stationary_covariance
from probattn.models.scalar import scalar_attention
from probattn.solve.context import Context
from probattn.solve.sequence import solve_sequence


def shown_with(page, settle, **views):
    state = page.evaluate("probattn.state")
    for name, change in views.items():
        state[name] = state[name] | change
        state["view"] = name
    page.evaluate("state => probattn.setState(state)", state)
    settle(page)
    return page.evaluate("probattn.state"), page.evaluate("probattn.numbers()")


def random_line(generator):
    def uniform(low, high):
        return low + (high - low) * float(torch.rand((), generator=generator))

    count = int(torch.randint(2, 10, (), generator=generator))
    tokens = [uniform(-3, 3) for _ in range(count)]
    return {"tokens": tokens, "a": uniform(-3, 3), "sigma": uniform(0.1, 1.5), "noise": uniform(-2, 2)}


def random_plane(generator):
    def uniform(low, high):
        return low + (high - low) * float(torch.rand((), generator=generator))

    count = int(torch.randint(3, 9, (), generator=generator))
    size = uniform(0.5, 2)
    kinds = ("determinant", "spectral", "singular_value")
    return {
        "tokens": [[uniform(-size, size), uniform(-size, size)] for _ in range(count)],
        "left": uniform(-3, 3),
        "right": uniform(-3, 3),
        "s1": uniform(0, 2),
        "s2": uniform(-1.6, 1.6),
        "kind": kinds[int(torch.randint(0, 3, (), generator=generator))],
        "support": int(torch.randint(0, 5, (), generator=generator)),
    }


def test_numbers_of_the_line(open_page, settle):
    page, generator, names = open_page(), torch.Generator().manual_seed(0), set()
    for _ in range(20):
        state, shown = shown_with(page, settle, line=random_line(generator))
        assert differences(shown, line_expected(state["line"])) == []
        check_smallest(shown, state["line"])
        names.add(shown["line.regime"]["text"])
    assert names >= {"certified", "folded"}


def test_a_memory_radius_shows_the_fold_vanish(open_page, settle):
    page, line = open_page(), {"tokens": [-1, 1, 0.35], "a": 3.0, "sigma": 0.5, "noise": 0.1}
    counts = []
    for radius in (0, 2.0, 0.5):
        state, shown = shown_with(page, settle, line={**line, "radius": radius})
        assert differences(shown, line_expected(state["line"])) == []
        check_smallest(shown, state["line"])
        counts.append((shown["line.regime"]["text"], shown["line.count"]["value"]))
    assert counts == [("folded", "3"), ("folded", "3"), ("certified", "1")]
    assert "after every past" in shown["line.reason"]["text"]


def test_the_line_with_thirty_two_tokens_and_steep_attention(open_page, settle):
    page, generator = open_page(), torch.Generator().manual_seed(1)
    tokens = (6 * torch.rand(32, generator=generator) - 3).tolist()
    for a in (-10, 0, 0.3, 10):
        state, shown = shown_with(page, settle, line={"tokens": tokens, "a": a, "sigma": 0.3, "noise": 0.2})
        assert differences(shown, line_expected(state["line"])) == []


def test_a_wrong_number_is_noticed(open_page, settle):
    state, shown = shown_with(open_page(), settle, line={"a": 2.5})
    expected = line_expected(state["line"])
    assert differences(shown, expected) == []
    for name, wrong in (("line.mass", 3e-6), ("line.margin", 3e-6)):
        changed = expected | {name: float(expected[name]) + wrong}
        assert [found[0] for found in differences(shown, changed)] == [name]
    assert [found[0] for found in differences(shown, expected | {"line.regime": "certified"})] == ["line.regime"]
    assert [found[0] for found in differences(shown, expected | {"line.roots": expected["line.roots"][:1]})] == [
        "line.roots"
    ]
    blank = shown | {"line.mass": shown["line.mass"] | {"text": "1.0000"}}
    assert [found[0] for found in differences(blank, expected)] == ["line.mass"]


def test_numbers_of_the_plane(open_page, settle):
    page, generator, names, counts = open_page(), torch.Generator().manual_seed(2), set(), set()
    for _ in range(14):
        state, shown = shown_with(page, settle, plane=random_plane(generator))
        assert differences(shown, plane_expected(state["plane"])) == []
        check_support(shown, state["plane"])
        counts.add(check_solutions(shown, state["plane"]))
        names.add(shown["plane.regime"]["text"])
    assert names == {"certified", "regular", "folded"}
    assert counts >= {1, 3}


def test_the_curve_is_exact_and_the_witness_is_one(open_page, settle):
    page = open_page()
    for preset in ("plane-boundary", "plane-two-folds"):
        page.click("#tab-plane")
        page.click(f"#{preset}")
        settle(page)
        while page.is_enabled("#plane-next"):
            page.click("#plane-next")
            settle(page)
        state, points = page.evaluate("probattn.state.plane"), tensor(page.evaluate("probattn.curve()"))
        _, attention = plane_attention(state)
        past = Context.of(attention, tensor(state["tokens"][:-1]))
        assert len(points) > 200
        assert float(torch.linalg.det(past.mean_and_jacobian(points)[1]).abs().max()) < TOLERANCE
        witness = page.evaluate("probattn.witness()")
        seen = Context.of(attention, tensor(state["tokens"][: witness["position"]]))
        assert float(torch.linalg.det(seen.mean_and_jacobian(tensor(witness["at"]))[1])) < 0


@pytest.mark.parametrize(("view", "rows"), [("line", 3), ("plane", 6)])
def test_the_table_of_tokens(open_page, until, view, rows):
    page = open_page()
    page.click(f"#tab-{view}")
    page.click(f"#{view}-table summary")
    until(page, f"document.querySelectorAll('#{view}-rows tr').length === {rows}")
    state = page.evaluate(f"probattn.state.{view}")
    tokens = tensor(state["tokens"]).view(rows, -1)
    attention = CausalAttention.from_qk_matrix(tensor([[state["a"]]])) if view == "line" else plane_attention(state)[1]
    margins = stability_margin(attention, tokens, state.get("kind", "determinant"))
    weights = attention.weights(tokens)[0, -1]
    for i in range(rows):
        cells = page.eval_on_selector_all(
            f"#{view}-rows tr:nth-child({i + 1}) td", "cells => cells.map(cell => cell.dataset.value)"
        )
        expected = [*tokens[i].tolist(), *([float(weights[i])] if i + 1 < rows else []), float(margins[i])]
        assert [float(cell) for cell in cells if cell] == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("a", "level"), [(1, 0.05), (1, 0.14), (2, 0.2), (-1.5, 0.4), (0, 0.3)])
def test_a_path_solves_the_implicit_equation(open_page, settle, until, a, level):
    page = open_page()
    sigma = round(math.sqrt(level / abs(a or 1)), 3)
    state, shown = shown_with(page, settle, sequence={"a": a, "sigma": sigma, "seed": 4, "n": 300})
    until(page, "probattn.path().tokens.length === 300")
    settle(page)
    shown, path = page.evaluate("probattn.numbers()"), page.evaluate("probattn.path()")
    tokens, noise = tensor(path["tokens"]).unsqueeze(-1), tensor(path["noise"]).unsqueeze(-1)
    attention = scalar_attention(float(a))
    assert float((attention.residual(tokens) - noise).abs().max()) < TOLERANCE
    assert abs(float(noise.std()) / sigma - 1) < 0.12
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SeveralSolutionsWarning)
        solved = solve_sequence(attention, noise[:60], selection="smallest_step")
    assert float((solved - tokens[:60]).abs().max()) < TOLERANCE
    variance = float(tokens.var(correction=0))
    expected = {
        "sequence.level": a * sigma**2,
        "sequence.n": 300,
        "sequence.last": tokens[-1],
        "sequence.mean": tokens.mean(),
        "sequence.spread": variance,
        "sequence.sampled": 1 - a * variance,
        "sequence.several": path["several"],
    }
    field = stationary_covariance(attention, tensor([[sigma**2]]))
    if field is None:
        assert shown["sequence.V"]["text"] == "none: a σ² > 4/27"
        assert shown["sequence.margin"]["text"] == shown["sequence.drift"]["text"] == "none"
    else:
        V = float(field.covariance)
        expected |= {"sequence.V": V, "sequence.margin": 1 - a * V, "sequence.drift": a * V / (1 - a * V)}
        assert abs(1 - a * V) == pytest.approx(field.margin, abs=1e-9)
    assert differences(shown, expected) == []
    assert state["sequence"]["n"] == 300


def test_the_noise_is_normal_and_follows_the_seed(open_page, settle, until):
    page = open_page()
    draws = {}
    for seed in (1, 2):
        shown_with(page, settle, sequence={"a": 0, "sigma": 1, "seed": seed, "n": 1000})
        until(page, "probattn.path().tokens.length === 1000")
        draws[seed] = tensor(page.evaluate("probattn.path().noise"))
    for noise in draws.values():
        assert abs(float(noise.mean())) < 4 / math.sqrt(1000)
        assert abs(float(noise.square().mean()) - 1) < 4 * math.sqrt(2 / 1000)
        assert abs(float(noise.pow(4).mean()) - 3) < 4 * math.sqrt(96 / 1000)
    assert not torch.equal(draws[1], draws[2])
