"""The README: its code runs as printed, its make targets and links exist."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from probattn.errors import SeveralSolutionsWarning

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


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
    makefile = (Path(__file__).parents[1] / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    for link in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link
