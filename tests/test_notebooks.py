"""The notebooks as they are committed: text and outputs agree, outputs are clean, and the solved exercises pass.

Nothing is executed in a kernel here; `make test` runs all of them in their smoke form beside the tests.
"""

import ast
import io
import json
import re
import sys
from decimal import Decimal, InvalidOperation
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import xarray

from probattn.teach.exercises import Feedback

FOLDER = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
EXERCISES = next((path for path in PATHS if path.name.startswith("08")), None)

NUMBER = r"[-+−]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
TAGGED = re.compile(rf"(?:({NUMBER})[*$]*)?<!--key:(\w+)-->")
LINE = re.compile(r"^(\w+) = (\S+)$", re.MULTILINE)
TRACES = {
    "an absolute path": re.compile(r"(?<![\w.])/(?:home|root|tmp|usr|opt|work|Users|mnt|var)/|[A-Z]:\\\\"),
    "a temporary file": re.compile(r"ipykernel_\d"),
    "an address in memory": re.compile(r"0x[0-9a-f]{8,}"),
    "a warning": re.compile(r"\w*Warning\b"),
    "a date": re.compile(r"\b20\d\d-\d\d-\d\dT"),
}


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def cells(notebook, kind):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def source(cell):
    return "".join(cell["source"])


def outputs(notebook):
    return [output for cell in cells(notebook, "code") for output in cell["outputs"]]


def texts(output):
    """Everything that a reader sees of an output as text."""
    parts = [output.get("text", ""), *(v for k, v in output.get("data", {}).items() if k.startswith("text/"))]
    return ["".join(part) for part in parts]


def tags(notebook):
    """The tagged numbers of the text, (quoted, name) each; None where no number stands before the tag."""
    return [found for cell in cells(notebook, "markdown") for found in TAGGED.findall(source(cell))]


def printed(notebook):
    """The lines `name = value` of the committed outputs."""
    streams = [text for output in outputs(notebook) if output.get("name") == "stdout" for text in texts(output)]
    return dict(found for text in streams for found in LINE.findall(text))


def disagreements(notebook):
    """What is wrong with the key numbers, in words."""
    found, lines = [], printed(notebook)
    for quoted, name in tags(notebook):
        if not quoted:
            found.append(f"{name}: no number before its tag")
        elif name not in lines:
            found.append(f"{name}: no output prints it")
        elif not agree(quoted, lines[name]):
            found.append(f"{name}: the text says {quoted}, the output {lines[name]}")
    return found


def agree(quoted, value):
    """Whether a value rounds to what is quoted, at the digits quoted."""
    try:
        quoted, value = Decimal(quoted.replace("−", "-")), Decimal(value)
        return abs(value - quoted) <= Decimal(1).scaleb(quoted.as_tuple().exponent) / 2
    except InvalidOperation:
        return False


def solved():
    """The code of the exercises, cell by cell, with the hidden solutions where the answers go, and how many."""
    notebook = read(EXERCISES)
    hidden = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.DOTALL)
    solutions = [code for cell in cells(notebook, "markdown") for code in hidden.findall(source(cell))]
    codes = [source(cell) for cell in cells(notebook, "code") if "%pip" not in source(cell)]
    places = [k for k, code in enumerate(codes) if code.endswith("= None  # your code")]
    assert len(places) == len(solutions)
    for place, solution in zip(places, solutions, strict=True):
        codes[place] = solution
    return codes, len(solutions)


def feedback(codes):
    """Run cells in one namespace; what the checks say."""
    names, said = {}, []
    for code in codes:
        tree = ast.parse(code)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            said += [value] if isinstance(value, Feedback) else []
    return said


@pytest.fixture
def _no_window(monkeypatch):
    """Figures are drawn and closed."""
    plt.switch_backend("Agg")
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))


def test_there_are_nine():
    assert [path.name[:2] for path in PATHS] == [f"0{k}" for k in range(1, 10)]


def installed(session, modules, monkeypatch):
    """The line that the cell for Colab gives pip; ``session`` is what Colab says of the notebook that it has opened."""
    asked = []
    code = source(read(PATHS[0])["cells"][2])
    line = re.search(r"^( *)%pip install -q (\".*\")$", code, re.MULTILINE)
    code = code.replace(line[0], f"{line[1]}pip(f{line[2]})")  # as IPython fills in the braces
    monkeypatch.setenv("COLAB_JUPYTER_IP", "172.28.0.12")
    monkeypatch.setenv("KMP_TARGET_PORT", "9000")
    monkeypatch.setattr("urllib.request.urlopen", lambda address: io.BytesIO(session))
    for module in modules:
        monkeypatch.setitem(sys.modules, module, None)
    exec(code, {"pip": asked.append})
    return asked


def test_colab_installs_the_version_that_the_notebook_came_with(monkeypatch):
    """Before a release there is nothing else, and after one the notebook may be newer."""
    opened = b'[{"path": "fileId=https%3A%2F%2Fgithub.com%2Fsome-one%2Fprobattn%2Fblob%2Fmain%2Fnotebooks%2F01.ipynb"}]'
    wanted = "probattn[teach] @ git+https://github.com/some-one/probattn@main"
    assert installed(opened, ["google.colab"], monkeypatch) == [wanted]
    assert installed(b'[{"path": "Untitled0.ipynb"}]', ["google.colab"], monkeypatch) == ["probattn[teach]"]


def test_nothing_is_installed_elsewhere(monkeypatch):
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    assert installed(b"", [], monkeypatch) == []


def test_notebook_six_and_nine_use_public_names_only():
    documented = (
        "probattn.inference.fit",
        "probattn.inference.results",
        "probattn.models",
        "probattn.plotting",
        "probattn.hf",
    )
    for path in PATHS:
        if path.name[:2] in ("06", "09"):
            text = "\n".join(source(cell) for cell in cells(read(path), "code"))
            used = set(re.findall(r"^from (probattn[\w.]*) import", text, re.MULTILINE))
            assert used <= {"probattn", *documented}, path.name


def test_the_file_of_margins_is_small_and_says_how_it_was_made():
    path = FOLDER / "data" / "margins.nc"
    assert path.stat().st_size < 300_000
    with xarray.open_dataset(path, engine="h5netcdf") as found:
        assert "probattn support" in json.loads(found.attrs["environment"])["command"]
        assert found.attrs["model"].startswith("SmolLM2-135M")
        assert not any("/" in str(value) and "root" in str(value) for value in found.attrs.values())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_text_and_outputs_agree(path):
    notebook = read(path)
    assert disagreements(notebook) == []
    assert len(tags(notebook)) >= 3


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_an_altered_number_is_found(path):
    notebook = read(path)
    for cell in cells(notebook, "markdown"):
        text = source(cell)
        for found in TAGGED.finditer(text):
            quoted = Decimal(found[1].replace("−", "-"))
            wrong = quoted + 2 * Decimal(1).scaleb(quoted.as_tuple().exponent)
            cell["source"] = text[: found.start(1)] + str(wrong) + text[found.end(1) :]
            assert [line.partition(":")[0] for line in disagreements(notebook)] == [found[2]]
        cell["source"] = text


def test_a_tag_without_line_or_number_is_found():
    markdown = {"cell_type": "markdown", "source": ["x is 0.15<!--key:x--> and about<!--key:y--> and 2<!--key:z-->."]}
    code = {"cell_type": "code", "outputs": [{"name": "stdout", "text": ["x = 0.148\n", "y = 3\n"]}]}
    found = disagreements({"cells": [markdown, code]})
    assert found == ["y: no number before its tag", "z: no output prints it"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_outputs_are_clean(path):
    notebook = read(path)
    for output in outputs(notebook):
        assert output["output_type"] != "error"
        assert output.get("name") != "stderr"
        for text in texts(output):
            for what, pattern in TRACES.items():
                assert not pattern.search(text), f"{what}: {pattern.search(text)}"
    assert path.stat().st_size < 400_000


def test_the_traces_are_found():
    for text in ("see /home/me/x.py", "C:\\\\x", "ipykernel_17/1.py", "<a at 0x7f870f1fbfd0>", "UserWarning: no"):
        assert any(pattern.search(text) for pattern in TRACES.values()), text
    assert not any(pattern.search("1/home, f(x)/n, 3e-8") for pattern in TRACES.values())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_was_run_from_top_to_bottom(path):
    notebook = read(path)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    code = cells(notebook, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not any("execution" in cell["metadata"] for cell in code)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_it_has_the_common_shape(path):
    notebook = read(path)
    first, _, install, *_ = notebook["cells"]
    assert "**Question" in source(first)
    assert '"google.colab" in sys.modules' in source(install)
    assert source(install) == source(read(PATHS[0])["cells"][2])
    assert any('"PROBATTN_SMOKE" in os.environ' in source(cell) for cell in cells(notebook, "code"))
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    for cell in cells(notebook, "markdown"):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", source(cell)):
            assert link.startswith("https://") or (FOLDER / link).exists(), link


@pytest.mark.usefixtures("_no_window")
def test_the_solutions_pass():
    codes, count = solved()
    said = feedback(codes)
    assert count == len(said) == 8
    assert all(one.passed for one in said), said


@pytest.mark.usefixtures("_no_window")
def test_unsolved_exercises_do_not_fail():
    codes = [source(cell) for cell in cells(read(EXERCISES), "code") if "%pip" not in source(cell)]
    assert feedback(codes) == [Feedback(None, "not answered yet")] * 8


@pytest.mark.usefixtures("_no_window")
def test_wrong_answers_do_not_pass():
    """Each exercise with a wrong answer in the place of its solution."""
    wrong = {
        "block": "block = lambda A, past, u_i: torch.eye(len(u_i))",
        "whole": "whole = torch.eye(10)",
        "onset": "onset = 1.0",
        "count": "count = lambda a, eps: 1",
        "Z": "Z = 1.0",
        "A": "A = torch.zeros(2, 2)",
        "V": "V = 1.0",
        "residual": "residual = lambda A, u: u",
    }
    codes = [source(cell) for cell in cells(read(EXERCISES), "code") if "%pip" not in source(cell)]
    replaced = [wrong.get(code.removesuffix(" = None  # your code"), code) for code in codes]
    assert [one.passed for one in feedback(replaced)] == [False] * 8
