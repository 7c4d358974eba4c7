"""What the library says of a state of the explorer, and the comparison with what is on its screen."""

import math

import pytest
import torch

from probattn import CausalAttention, log_barrier, regime, stability_margin, support_tokens
from probattn.folds.branches import Branches
from probattn.folds.line import largest_sensitivity, turning_points
from probattn.folds.mass import next_token_density, scalar_mass
from probattn.solve.bound import contraction_bound
from probattn.solve.context import Context
from probattn.solve.token import find_roots

TOLERANCE = 1e-6


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def parsed(text):
    """Numbers of a text on the screen."""
    words = text.replace("−", "-").replace("\u00a0", " ")
    for sign in "(),":
        words = words.replace(sign, " ")
    return [math.inf if word == "∞" else float(word) for word in words.split()]


def differences(shown, expected):
    """What is shown otherwise than expected: the value in full to 1e-6, its text as far as it is written."""
    wrong = []
    for name, value in expected.items():
        if isinstance(value, str):
            if shown[name]["value"] != value or shown[name]["text"] != value:
                wrong.append((name, shown[name], value))
            continue
        values = [float(x) for x in (value if isinstance(value, (list, tuple)) else [value])]
        full = [float(x) for x in shown[name]["value"].split()]
        text = parsed(shown[name]["text"]) if values else []
        close = len(full) == len(values) == len(text) and all(
            x == y == z or (abs(x - y) <= TOLERANCE * max(1, abs(y)) and abs(z - y) <= max(6e-5, 6e-4 * abs(y)))
            for x, y, z in zip(full, values, text, strict=True)
        )
        if not close:
            wrong.append((name, shown[name], values))
    return wrong


def line_expected(state):
    """What the library says of the state of the line."""
    tokens, a, sigma = tensor(state["tokens"]).unsqueeze(-1), state["a"], state["sigma"]
    attention = CausalAttention.from_qk_matrix(tensor([[a]]), memory_radius=state.get("radius") or None)
    past, u = Context.of(attention, tokens[:-1]), tokens[-1]
    mean = past.mean(u)
    weights = attention.weights(tokens)[0, -1, :-1]
    seen = regime(attention, tokens)
    branches = Branches(past, sigma)
    mass = scalar_mass(past, sigma)
    assert mass.absolute == pytest.approx(mass.roots, abs=1e-7)
    barrier = float(log_barrier(attention, tokens)[-1])
    distance = float(stability_margin(attention, tokens)[-1])
    roots = branches.roots(state["noise"]).tolist()
    return {
        "line.a": a,
        "line.sigma": sigma,
        "line.noise": state["noise"],
        "line.radius": state.get("radius", 0),
        "line.u": u,
        "line.mean": mean,
        "line.e": u - mean,
        "line.variance": (weights * (attention.remember(tokens)[:-1, 0] - mean).square()).sum(),
        "line.margin": stability_margin(attention, tokens, "determinant")[-1],
        "line.sigma_min": distance,
        "line.gain": 1 / distance,
        "line.barrier": barrier,
        "line.turning": turning_points(past).tolist(),
        "line.count": len(roots),
        "line.roots": roots,
        "line.mass": mass.absolute,
        "line.without": scalar_mass(past, sigma, jacobian=False).absolute,
        "line.density": abs(float(next_token_density(past, u, sigma)[0])),
        "line.naive": next_token_density(past, u, sigma, jacobian=False)[0],
        "line.regime": str(seen),
        "line.proved": "proved" if seen.proved else "not proved",
    }


def check_smallest(shown, state):
    """The supremum of 1 - J lies where the page says, by the library's enclosure on either side."""
    attention = CausalAttention.from_qk_matrix(tensor([[state["a"]]]), memory_radius=state.get("radius") or None)
    past = Context.of(attention, tensor(state["tokens"][:-1]).unsqueeze(-1))
    largest = 1 - float(shown["line.smallest"]["value"])
    assert largest_sensitivity(past, threshold=largest + 2 * TOLERANCE).upper < largest + 2 * TOLERANCE
    if largest > 1e-5:
        assert largest_sensitivity(past, threshold=largest - TOLERANCE).lower > largest - TOLERANCE


def plane_attention(state):
    def turn(angle):
        return tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])

    A = turn(state["left"]) @ torch.diag(tensor([state["s1"], state["s2"]])) @ turn(state["right"]).T
    return A, CausalAttention.from_qk_matrix(A)


def plane_expected(state):
    """What the library says of the state of the plane, but for the solutions."""
    A, attention = plane_attention(state)
    tokens = tensor(state["tokens"])
    mean, J = Context.of(attention, tokens[:-1]).mean_and_jacobian(tokens[-1])
    margins = {kind: stability_margin(attention, tokens, kind) for kind in ("determinant", "spectral")}
    distance = float(stability_margin(attention, tokens)[-1])
    seen = regime(attention, tokens, search=True)
    expected = {
        "plane.u": tokens[-1].tolist(),
        "plane.mean": mean.tolist(),
        "plane.e": (tokens[-1] - mean).tolist(),
        "plane.determinant": margins["determinant"][-1],
        "plane.spectral": margins["spectral"][-1],
        "plane.singular_value": distance,
        "plane.gain": 1 / distance,
        "plane.barrier": log_barrier(attention, tokens)[-1],
        "plane.bound": contraction_bound(attention, tokens)[-1],
        "plane.regime": str(seen),
        "plane.proved": "proved" if seen.proved else "not proved",
        "plane.supportCount": state["support"],
        **{f"plane.{name}": state[name] for name in ("s1", "s2", "left", "right")},
        **{f"plane.A{k}": value for k, value in enumerate(A.flatten().tolist())},
        **{f"plane.J{k}": value for k, value in enumerate(J.flatten().tolist())},
    }
    if state["support"]:
        found = support_tokens(attention, tokens, k=min(state["support"], len(tokens)), kind=state["kind"])
        expected["plane.supportMargins"] = found.margins.tolist()
    return expected


def check_support(shown, state):
    """The positions are the library's, up to margins that differ by rounding alone."""
    margins = stability_margin(plane_attention(state)[1], tensor(state["tokens"]), state["kind"])
    positions = [int(word) - 1 for word in shown["plane.support"]["value"].split()]
    smallest = margins.sort().values[: min(state["support"], len(margins))]
    assert len(set(positions)) == len(smallest)
    assert margins[positions].tolist() == pytest.approx(smallest.tolist(), abs=1e-12)


def check_solutions(shown, state):
    """Every solution shown solves, and none that the library finds is missing."""
    _, attention = plane_attention(state)
    tokens = tensor(state["tokens"])
    past = Context.of(attention, tokens[:-1])
    noise = tokens[-1] - past.mean(tokens[-1])
    roots = tensor([float(x) for x in shown["plane.roots"]["value"].split()]).view(-1, 2)
    assert len(roots) == int(shown["plane.count"]["value"])
    assert float((roots - past.mean(roots) - noise).abs().max()) < TOLERANCE
    assert float(torch.cdist(roots, roots).fill_diagonal_(1).min()) > 1e-6
    for root in find_roots(past, noise):
        assert float((roots - root).norm(dim=-1).min()) < TOLERANCE, f"{root.tolist()} is missing"
    return len(roots)
