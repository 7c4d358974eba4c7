"""The README: its code runs as printed, its make targets and links exist."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from probattn.errors import SeveralSolutionsWarning

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
VERDICTS = {"supported": "holds", "supported_within": "holds if ", "not_supported": "does not hold"}


def test_the_example_runs(capsys):
    torch.manual_seed(0)
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SeveralSolutionsWarning)  # the example is folded on purpose
        for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            exec(code, names)
    assert capsys.readouterr().out.strip() in ("certified", "regular", "folded")
    assert len(names["next_token"].roots(0.0)) == 3
    assert names["next_token"].mass().value == pytest.approx(2.23, abs=0.005)


def test_its_targets_and_links_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for link in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / link).exists(), link


def test_its_verdicts_are_those_of_the_committed_results():
    claims = json.loads((ROOT / "docs" / "results" / "ledger" / "claims.json").read_text(encoding="utf-8"))["claims"]
    rows = re.findall(r"^\| `([\w-]+)` \| \**([^|*]+)\**\s*\|", README, re.MULTILINE)
    assert [name for name, _ in rows] == [claim["id"] for claim in claims]
    for (name, words), claim in zip(rows, claims, strict=True):
        if claim["verdict"] == "not_run":  # measured by a study of its own
            continue
        expected = VERDICTS[claim["verdict"]]
        assert words.startswith(expected) if expected.endswith(" ") else words.strip() == expected, name
