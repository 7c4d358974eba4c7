"""Lines that the layout of the code does not cross."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "probattn"


def sources(*folders):
    for folder in folders:
        yield from sorted((ROOT / folder).rglob("*.py"))


def called(tree):
    """Names of all functions that a module calls, without the objects that they belong to."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            yield function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def defined(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name


def test_few_modules_lie_directly_in_the_package():
    assert len(list(PACKAGE.glob("*.py"))) <= 16


def test_newton_iteration_is_in_one_module():
    found = {
        str(path.relative_to(ROOT))
        for path in sources("probattn", "models", "inference")
        if any("newton" in name.lower() for name in defined(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == {"probattn/solve/newton.py"}


# Attention weights of whole sequences, of a character model, and of figures that teach: no next token among them.
WEIGHTS_ELSEWHERE = {
    "probattn/attention.py",  # weights(u), which are what is asked for
    "probattn/teach/exercises.py",
    "inference/claims/stationarity.py",  # the control takes another token's query on purpose
    "inference/claims/objective.py",  # the objective written by hand, to compare with
    "inference/bench/density.py",  # competitors
    "inference/bench/penalty.py",
    "inference/bench/posterior.py",
    "inference/studies/robustness/regularisers.py",  # a competitor that penalises the weights themselves
}


def forms_weights(path):
    return bool({"softmax", "attention_weights"} & set(called(ast.parse(path.read_text(encoding="utf-8")))))


@pytest.mark.parametrize("folder", ["probattn", "models", "inference"])
def test_attention_weights_of_a_next_token_are_formed_in_two_rooms(folder):
    rooms = ("probattn/moments/", "probattn/solve/", "probattn/hf/")  # hf: the attention of other people's models
    found = {str(path.relative_to(ROOT)) for path in sources(folder) if forms_weights(path)}
    outside = {name for name in found if not name.startswith(rooms)}
    assert outside <= WEIGHTS_ELSEWHERE | PREDICTIONS


# A softmax over a vocabulary, or over scores of another kind.
PREDICTIONS = {"inference/claims/decoding.py", "inference/claims/implementation.py", "inference/claims/tightness.py"}


def test_the_control_for_weights_sees_a_softmax(tmp_path):
    module = tmp_path / "module.py"
    module.write_text("import torch\n\n\ndef f(x):\n    return torch.softmax(x, -1)\n", encoding="utf-8")
    assert forms_weights(module)


def test_no_module_is_too_long():
    long = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sources("probattn", "models", "inference")
    }
    assert {name: lines for name, lines in long.items() if lines > 450} == {}
