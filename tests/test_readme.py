"""The README: its snippets paste into a plain prompt and print what it says, its targets and links exist."""

import code
import doctest
import importlib.util
import json
import re
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml

from probattn.errors import SeveralSolutionsWarning

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.DOTALL)
VERDICTS = {"supported": "holds", "supported_within": "holds if ", "not_supported": "does not hold"}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
SECONDS = 5.0


class Prompt(code.InteractiveConsole):
    """Python's plain prompt, fed line by line, as by pasting; what would be a traceback is kept."""

    def __init__(self):
        super().__init__()
        self.trouble = []

    def write(self, data):
        self.trouble.append(data)

    def paste(self, text):
        """Enter every line, with an empty one behind the last, and stop at the first trouble."""
        for line in [*text.splitlines(), ""]:
            waiting = self.push(line)
            if self.trouble:
                return
        assert not waiting, "the prompt waits for more"


@pytest.fixture
def prompt(monkeypatch):
    monkeypatch.setattr(sys, "displayhook", lambda value: None)  # what the prompt echoes is no part of the README
    return Prompt()


@pytest.mark.filterwarnings("ignore::probattn.errors.SeveralSolutionsWarning")  # the second example folds on purpose
def test_snippets_paste_into_a_plain_prompt_and_print_what_stands_below_them(prompt, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(SNIPPETS) >= 4
    assert issubclass(SeveralSolutionsWarning, Warning)
    for text, output in SNIPPETS:
        prompt.paste("\n".join(line for line in text.splitlines() if re.match(r"(from|import) ", line)))
        began = time.process_time()  # of this process alone, after the imports: others' work cannot make it fail
        prompt.paste(text)
        assert time.process_time() - began < SECONDS
        assert prompt.trouble == []
        printed = capsys.readouterr().out
        if output:
            assert NUMBER.sub("#", printed) == NUMBER.sub("#", output)
            found, stated = ([float(number) for number in NUMBER.findall(words)] for words in (printed, output))
            assert found == pytest.approx(stated, rel=1e-3)  # single precision, on any machine
    assert (tmp_path / "hidden.npz").exists()


def test_the_first_example_is_short_and_is_certified_for_every_past():
    text, output = SNIPPETS[0]
    assert len([line for line in text.splitlines() if line]) <= 8
    assert "for every past" in output


def test_a_snippet_that_does_not_paste_is_noticed(prompt):
    prompt.paste("for k in range(2):\n    k\nprint(k)")  # a script, but no paste: the block needs an empty line
    assert "SyntaxError" in "".join(prompt.trouble)


def test_its_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"`make (\w+)`", README)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / link).exists(), link


def test_its_verdicts_are_those_of_the_committed_results_and_failures_come_first():
    claims = json.loads((ROOT / "docs" / "results" / "ledger" / "claims.json").read_text(encoding="utf-8"))["claims"]
    rows = dict(re.findall(r"^\| `([\w-]+)` \| \**([^|*]+)\**\s*\|", README, re.MULTILINE))
    assert rows.keys() == {claim["id"] for claim in claims}
    for claim in claims:
        if claim["verdict"] == "not_run":  # measured by a study of its own
            continue
        words, expected = rows[claim["id"]].strip(), VERDICTS[claim["verdict"]]
        assert words.startswith(expected) if expected.endswith(" ") else words == expected, claim["id"]
    failed = [words.strip() == "does not hold" for words in rows.values()]
    assert failed == sorted(failed, reverse=True)


def test_the_package_index_gets_what_it_shows():
    """Plain Markdown without formulas, which an index does not typeset, and metadata that name what there is."""
    assert "$" not in re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["readme"] == "README.md"
    assert len(project["description"]) <= 200
    assert (ROOT / project["license-files"][0]).exists()


def test_links_become_absolute_for_the_index():
    spec = importlib.util.spec_from_file_location("index_readme", ROOT / ".github" / "scripts" / "index_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module).attempted == 1
    text = module.with_absolute_links(README, "https://home/blob", "https://home/raw")
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert "https://home/raw/docs/figures/conditional.png" in targets
    for target in targets:
        if target.startswith("https://home/"):
            assert (ROOT / re.sub(r"https://home/(blob|raw)/", "", target)).exists()


def test_the_workflow_builds_for_three_systems_and_checks_what_it_built():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8"))
    systems = " ".join(workflow["jobs"]["wheels"]["strategy"]["matrix"]["os"])
    assert all(name in systems for name in ("ubuntu", "macos", "windows"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "check_installed.py" in project["tool"]["cibuildwheel"]["test-command"]
    assert any("check_installed.py" in step.get("run", "") for step in workflow["jobs"]["sdist"]["steps"])
