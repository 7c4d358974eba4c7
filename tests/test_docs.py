"""The pages of the site: their code runs, their links lead somewhere, their numbers exist, and nothing is missing."""

import ast
import doctest
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import probattn
import probattn.inference
import probattn.models
from probattn.errors import SeveralSolutionsWarning
from probattn.inference.claims import CLAIMS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
CODE = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
LEDGER = DOCS / "results" / "ledger" / "claims.json"
# The second circle of docs/api/index.md; the first is `probattn.__all__`.
DOCUMENTED = (
    "probattn.hf",
    "probattn.testing",
    "probattn.plotting",
    "probattn.models",
    "probattn.errors",
    "probattn.inference.fit",
    "probattn.inference.results",
    "probattn.inference.training",
)
USER_PAGES = [ROOT / "README.md", *sorted((DOCS / "how-to").glob("*.md"))]


def name(page):
    return page.relative_to(DOCS).as_posix()


def prose(page):
    """The text without its blocks of code, whose brackets are no links."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def ledger():
    """The extension of Sphinx that reads the committed results."""
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    spec = importlib.util.spec_from_file_location("ledger", DOCS / "_ext" / "ledger.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", [page for page in PAGES if CODE.search(page.read_text(encoding="utf-8"))], ids=name)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    (tmp_path / "runs" / "verify").mkdir(parents=True)
    shutil.copy(LEDGER, tmp_path / "runs" / "verify" / "claims.json")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SeveralSolutionsWarning)
        for code in CODE.findall(page.read_text(encoding="utf-8")):
            exec(compile(code, name(page), "exec"), names)


def test_pages_say_what_their_code_prints(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = CODE.findall((DOCS / "faq.md").read_text(encoding="utf-8"))
    names = {}
    exec(code[0], names)
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# (.*)", code[0], re.MULTILINE)
    with pytest.warns(SeveralSolutionsWarning):
        exec(code[1], names)
    assert "solutions" in names["found"]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_images_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        if anchor:
            text = found.read_text(encoding="utf-8")
            assert f"({anchor})=" in text, f"{target}: no such anchor"


def test_external_links_are_few_and_known():
    found = {link for page in PAGES for link in re.findall(r"https?://[^)\s>]+", prose(page))}
    known = (
        "https://arxiv.org/abs/",
        "https://doi.org/10.",
        "https://transformer-circuits.pub/",
        "https://pyro.ai",
        "https://python.arviz.org",
    )
    assert not [link for link in found if not link.startswith(known)]


def test_every_page_is_in_a_table_of_contents():
    listed = {"index"}
    for page in PAGES:
        for block in re.findall(
            r"^```\{toctree\}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            if "*" in entries:  # everything beside it; notebooks as well, where there are any
                entries = [path.stem for path in page.parent.glob("*.md") if path != page]
            for entry in entries:
                target = page.parent / f"{entry}.md"
                assert target.exists(), f"{name(page)} lists {entry}"
                listed.add(name(target).removesuffix(".md"))
    assert {name(page).removesuffix(".md") for page in PAGES} == listed


@pytest.mark.parametrize("claim", sorted(CLAIMS))
def test_every_claim_has_a_page(claim):
    text = (DOCS / "claims" / f"{claim}.md").read_text(encoding="utf-8")
    assert f"```{{claim}} {claim}\n" in text
    assert "## How it is measured" in text
    assert "## Where it fails" in text
    assert claim in (DOCS / "claims" / "index.md").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_measured_numbers_exist(page, ledger):
    for target in re.findall(r"\{measured\}`([^`]+)`", page.read_text(encoding="utf-8")):
        words = ledger.measured(" ".join(target.split()))
        assert words
        assert "nan" not in words


def test_how_numbers_are_written(ledger):
    assert doctest.testmod(ledger).failed == 0
    assert ledger.measured("jacobian:above_diagonal") == "0"
    assert ledger.measured("jacobian:max_abs_error:.1e") == "1.9 × 10⁻¹⁴"
    assert ledger.measured("barrier-training:mean_on_text:.1f") == "−14.6"
    assert ledger.measured("robustness:embeddings logdet 0.05 on absolute noise:+.4f") == "−0.1809 [−0.2259, −0.1359]"
    for wrong in ("jacobian:nothing", "nothing:max_abs_error", "robustness:plain on nothing"):
        with pytest.raises((KeyError, ValueError)):
            ledger.measured(wrong)


def test_the_study_of_robustness_takes_the_place_of_the_claim_that_was_not_run(ledger):
    assert {name: claim["verdict"] for name, claim in ledger.claims().items()}.keys() == CLAIMS.keys()
    assert ledger.claims()["robustness"]["verdict"] == "not_supported"
    page = (DOCS / "results" / "robustness.md").read_text(encoding="utf-8")
    for words in ledger.claims()["robustness"]["words"].values():
        assert words.split("(")[0].split("; ")[0][1:] in page.replace("\\", "")


@pytest.mark.parametrize(
    ("page", "source", "quoted"),
    [
        ("claims/robustness.md", "results/robustness.md", ("125 runs", "1 % of")),
        ("theory.md", "results/robustness.md", ("125 runs",)),
        ("relative-to-the-paper.md", "results/robustness.md", ("125 runs",)),
        ("claims/stationarity.md", "results/ledger.md", ("120°",)),
    ],
)
def test_numbers_in_words_stand_in_the_results(page, source, quoted):
    for words in quoted:
        assert words in (DOCS / page).read_text(encoding="utf-8")
        assert words in (DOCS / source).read_text(encoding="utf-8")


def all_modules():
    """Every public module of the package, models and inference included."""
    found = {"probattn.models", "probattn.inference"}
    for package in (probattn, probattn.models, probattn.inference):
        found |= {module.name for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")}
    return {module for module in found if not any(part.startswith("_") for part in module.split("."))}


def documented_modules(text, modules):
    """Modules that a page documents: each ``automodule``, and each ``{reference}`` with all that lies under it."""
    found = set(re.findall(r"^\.\. automodule:: (\S+)", text, re.MULTILINE))
    for arguments in re.findall(r"^```\{reference\} (.+)$", text, re.MULTILINE):
        for name in arguments.split():
            found |= {module for module in modules if module == name or module.startswith(f"{name}.")} or {name}
    return found


def test_the_reference_has_every_module_and_every_public_name():
    modules = all_modules()
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    documented = documented_modules(text, modules)
    packages = {name for name in modules if hasattr(importlib.import_module(name), "__path__")}
    assert modules - packages - documented == set()  # a package without names of its own may go unmentioned
    assert documented - modules == set()
    index = (DOCS / "api" / "index.md").read_text(encoding="utf-8")
    for public in probattn.__all__:
        assert f"`probattn.{public} <" in index
    for module in DOCUMENTED:
        assert f"`{module}`" in index
        assert module in modules


def test_a_module_without_a_place_in_the_reference_is_noticed():
    modules = {"probattn.solve", "probattn.solve.newton", "probattn.folds"}
    text = "```{reference} probattn.solve\n```\n"
    assert modules - documented_modules(text, modules) == {"probattn.folds"}
    assert documented_modules("```{reference} probattn.gone\n```\n", modules) == {"probattn.gone"}


def imported_names(code):
    """(module, name) of everything that code imports from the package; the name is None for ``import probattn.x``."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "probattn":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names if alias.name.split(".")[0] == "probattn")


def is_public(module, name):
    """Whether a name belongs to the first circle, or to a module of the second that lists it in ``__all__``."""
    if module == "probattn":
        return name is None or name in probattn.__all__
    if not any(module == documented or module.startswith(f"{documented}.") for documented in DOCUMENTED):
        return False
    return name is None or name in importlib.import_module(module).__all__


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: page.stem)
def test_pages_for_users_import_public_names_only(page):
    for code in CODE.findall(page.read_text(encoding="utf-8")):
        private = [f"{module}.{name}" for module, name in imported_names(code) if not is_public(module, name)]
        assert private == []


def test_a_private_import_is_noticed():
    code = "import torch\nfrom probattn import regime\nfrom probattn.solve.context import Context\n"
    assert [found for found in imported_names(code) if not is_public(*found)] == [("probattn.solve.context", "Context")]
    assert not is_public("probattn", "attention")
    assert not is_public("probattn.errors", "torch")


def own_docstrings(module):
    """The docstrings of a module, its classes, functions and methods, private ones included."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield f"{module.__name__}: {text.splitlines()[0]}"


def test_docstrings_begin_with_a_verb_or_a_noun():
    # A noun phrase that names the value reads better than "What comes out"; a few honest questions may stay.
    found = [
        text
        for name in sorted({"probattn", *all_modules()})
        for text in own_docstrings(importlib.import_module(name))
        if re.match(r"(What|Which|Where|How|Whether)\b", text.partition(": ")[2])
    ]
    assert len(found) <= 10, "\n".join(found)


def test_what_is_read_exists():
    content = json.loads(LEDGER.read_text(encoding="utf-8"))
    assert content["schema"] == 1
    assert {claim["id"] for claim in content["claims"]} == set(CLAIMS)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for needed in ("sphinx", "myst_nb", "furo", "sphinx_copybutton"):
        pytest.importorskip(needed, reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", str(tmp_path / "doctrees")]
    result = subprocess.run(
        [*command, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    for page in PAGES:
        assert (tmp_path / "html" / name(page)).with_suffix(".html").exists()
    html = (tmp_path / "html" / "claims" / "jacobian.html").read_text(encoding="utf-8")
    assert 'class="verdict verdict-supported"' in html
    assert "{measured}" not in html
