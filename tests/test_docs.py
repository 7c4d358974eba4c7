"""The pages of the site: their code runs, their links lead somewhere, their numbers exist, and nothing is missing."""

import ast
import doctest
import importlib
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
# Blocks whose libraries are not among the dependencies; they run where these are installed.
OPTIONAL_CODE = re.compile(r"^```py\n(.*?)^```", re.DOTALL | re.MULTILINE)
# Pages on which comments at the end of a block are what it prints.
PRINTING = ("five-minutes.md", "how-to/arviz.md", "how-to/language-models.md")
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
def extensions():
    """The extensions of Sphinx, by name."""
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DOCS / "_ext")
        return {path.stem: importlib.import_module(path.stem) for path in sorted((DOCS / "_ext").glob("*.py"))}


@pytest.fixture(scope="module")
def ledger(extensions):
    """The extension that reads the committed results."""
    return extensions["ledger"]


@pytest.fixture
def _usual_precision():
    """Pages may change the default; the next test has the usual one."""
    yield
    torch.set_default_dtype(torch.float32)


# These pages fit several models and draw many figures.
LONG = ("how-to/arviz.md", "gallery.md")
WITH_CODE = [
    pytest.param(page, marks=[pytest.mark.slow] * (name(page) in LONG), id=name(page))
    for page in PAGES
    if CODE.search(page.read_text(encoding="utf-8"))
]


@pytest.mark.usefixtures("_usual_precision")
@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs" / "verify").mkdir(parents=True)
    shutil.copy(LEDGER, tmp_path / "runs" / "verify" / "claims.json")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SeveralSolutionsWarning)
        for code in CODE.findall(page.read_text(encoding="utf-8")):
            capsys.readouterr()
            exec(compile(code, name(page), "exec"), names)
            if name(page) in PRINTING:
                assert capsys.readouterr().out.splitlines() == re.findall(r"^# (.*)", code, re.MULTILINE)


def test_pages_whose_output_is_compared_print_something():
    for page in PRINTING:
        blocks = CODE.findall((DOCS / page).read_text(encoding="utf-8"))
        assert any(re.search(r"^# ", code, re.MULTILINE) for code in blocks), page


@pytest.mark.slow
def test_the_plots_of_arviz_run(tmp_path, monkeypatch):
    pytest.importorskip("arviz_plots", reason="arviz-plots is not a dependency")
    import xarray

    page = (DOCS / "how-to" / "arviz.md").read_text(encoding="utf-8")
    fitted, (plots,) = CODE.findall(page)[0], OPTIONAL_CODE.findall(page)
    monkeypatch.chdir(tmp_path)
    exec(compile(fitted, "arviz.md", "exec"), {})
    with xarray.open_datatree("runs/one/fit.nc", engine="h5netcdf") as tree, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of another library
        exec(compile(plots, "arviz.md", "exec"), {"tree": tree})
    assert {path.name for path in tmp_path.glob("*.png")} == {"trace.png", "forest.png", "prior.png"}


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


@pytest.mark.parametrize("module", ["formulas", "ledger", "machine_index"])
def test_the_examples_of_the_extensions_run(extensions, module):
    result = doctest.testmod(extensions[module])
    assert result.failed == 0
    assert result.attempted


def test_programs_find_every_claim(extensions):
    content = extensions["machine_index"].claims_and_names({"results/ledger": ("Ledger", "All claims.")})
    assert [claim["id"] for claim in content["claims"]] == list(extensions["ledger"].claims())
    assert all(claim["verdict_in_words"] and claim["statement"] for claim in content["claims"])
    assert all((DOCS / claim["page"]).with_suffix(".md").exists() for claim in content["claims"])
    assert content["public"] == [f"probattn.{name}" for name in probattn.__all__]
    assert content["results"] == [{"title": "Ledger", "page": "results/ledger.html"}]
    json.dumps(content, allow_nan=False)
    listed = extensions["machine_index"].page_list({"theory": ("Theory", "Derives."), "claims/margin": ("Margin", "")})
    assert "- [Theory](theory.html): Derives.\n" in listed
    assert "- [Margin](claims/margin.html)\n" in listed


def formulas(as_displayed):
    """TeX of all pages, notebooks and docstrings, each with whether it is displayed."""
    tokens = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    tokens.use(importlib.import_module("mdit_py_plugins.dollarmath").dollarmath_plugin, double_inline=True)
    tokens.use(importlib.import_module("mdit_py_plugins.amsmath").amsmath_plugin)

    def walk(found):
        for token in found:
            if token.type.startswith(("math", "amsmath")):
                displayed = token.type != "math_inline"
                own = token.type == "amsmath"
                yield (as_displayed(token.content, own) if displayed else token.content), displayed
            yield from walk(token.children or [])

    for page in PAGES:
        yield from walk(tokens.parse(page.read_text(encoding="utf-8")))
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                yield from walk(tokens.parse("".join(cell["source"])))
    for module in sorted(all_modules()):
        text = inspect.getsource(importlib.import_module(module))
        yield from ((tex, False) for tex in re.findall(r":math:`([^`]+)`", text))
        for _, tex in re.findall(r"^( *)\.\. math::(.*\n(?:(?:\1 +.*)?\n)*)", text, re.MULTILINE):
            yield as_displayed(inspect.cleandoc(tex)), True


def test_every_formula_is_typeset_by_what_ships_with_the_site(extensions, offline):
    """In a browser, as for a reader, without a network; KaTeX refuses what it does not know."""
    context, asked = offline
    wanted = list(formulas(extensions["formulas"].as_displayed))
    assert len(wanted) > 800
    page = context.new_page()
    page.goto("about:blank")
    page.add_script_tag(content=(DOCS / "_static" / "katex" / "katex.min.js").read_text(encoding="utf-8"))
    refused = page.evaluate(
        """all => all.filter(([tex, displayMode]) => {
            try { katex.renderToString(tex, {displayMode, strict: false}); return false } catch { return true }
        })""",
        [*wanted, (r"\nosuchcommand{x}", False)],
    )
    assert refused == [[r"\nosuchcommand{x}", False]]
    assert asked == []


@pytest.fixture
def offline(chromium):
    """A window of a browser without a network, and the list of what it asked of one."""
    asked = []

    def answer(route):
        local = route.request.url.startswith(("file:", "data:", "about:"))
        if not local:
            asked.append(route.request.url)
        route.continue_() if local else route.abort()

    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.route("**/*", answer)
    yield context, asked
    context.close()


def test_fonts_of_the_formulas_are_there_with_their_licence():
    folder = DOCS / "_static" / "katex"
    wanted = set(re.findall(r"url\(([^)]+)\)", (folder / "katex.min.css").read_text(encoding="utf-8")))
    assert wanted
    assert all((folder / font).exists() for font in wanted)
    assert "MIT License" in (folder / "LICENSE").read_text(encoding="utf-8")
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 2_000_000


def test_how_numbers_are_written(ledger, monkeypatch):
    measured = {"small": 1.9e-14, "zero": 0.0, "negative": -14.63, "power": 1e-6, "count": 12345.0, "endless": "inf"}
    monkeypatch.setattr(ledger, "claims", lambda: {"one": {"measured": measured}})
    written = {
        "small:.1e": "1.9 × 10⁻¹⁴",
        "small": "1.9 × 10⁻¹⁴",
        "zero": "0",
        "negative:.1f": "−14.6",
        "power:.0e": "10⁻⁶",
        "count": "12,345",
        "endless": "∞",
    }
    assert {key: ledger.measured(f"one:{key}") for key in written} == written


def test_a_difference_of_a_study_is_written_with_its_interval(ledger):
    found = ledger.study(ledger.EARLIER).arms["embeddings logdet 0.05"].differences["absolute noise"]
    low, high = found.interval()
    assert low < found.mean < high < 0
    words = ledger.measured("robustness-earlier:embeddings logdet 0.05 on absolute noise:+.4f")
    assert words == f"−{-found.mean:.4f} [−{-low:.4f}, −{-high:.4f}]"


@pytest.mark.parametrize("wrong", ["jacobian:nothing", "nothing:max_abs_error", "robustness:plain on nothing"])
def test_a_number_that_does_not_exist_fails_the_build(ledger, wrong):
    with pytest.raises((KeyError, ValueError)):
        ledger.measured(wrong)


def test_the_study_of_robustness_takes_the_place_of_the_claim_that_was_not_run(ledger):
    assert {name: claim["verdict"] for name, claim in ledger.claims().items()}.keys() == CLAIMS.keys()
    assert ledger.claims()["robustness"]["verdict"] == "supported_within"
    assert ledger.claims()["robustness"]["condition"] == "the corruption is noise of a fixed size on the embeddings"
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
def test_the_site_builds_without_a_warning(tmp_path, offline):
    for needed in ("sphinx", "myst_nb", "furo", "sphinx_copybutton"):
        pytest.importorskip(needed, reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", str(tmp_path / "doctrees")]
    result = subprocess.run(
        [*command, str(DOCS), str(tmp_path / "html")], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert result.returncode == 0, result.stderr
    for page in PAGES:
        assert (tmp_path / "html" / name(page)).with_suffix(".html").exists()
    built = tmp_path / "html"
    content = json.loads((built / "index.json").read_text(encoding="utf-8"))
    assert {claim["id"] for claim in content["claims"]} == set(CLAIMS)
    linked = re.findall(r"\]\(([^)]+)\)", (built / "llms.txt").read_text(encoding="utf-8"))
    assert len(linked) > len(PAGES)
    assert all((built / target).exists() for target in linked)
    context, asked = offline
    page = context.new_page()
    page.goto((built / "theory.html").as_uri())
    page.wait_for_selector(".katex")
    assert page.locator(".katex").count() > 150
    assert page.locator(".katex-error").count() == 0
    assert asked == []
    html = (built / "claims" / "jacobian.html").read_text(encoding="utf-8")
    assert 'class="verdict verdict-supported"' in html
    assert "{measured}" not in html
