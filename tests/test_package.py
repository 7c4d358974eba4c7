"""The package as a whole: what it imports, what it documents, what a wheel holds."""

import doctest
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

import probattn
import probattn.inference
import probattn.models

ROOT = Path(__file__).parents[1]


def modules():
    for package in (probattn, probattn.models, probattn.inference):
        yield package.__name__
        for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not found.name.endswith(("__main__", "_compiled")):  # a library for ctypes is no module
                yield found.name


@pytest.mark.parametrize("name", sorted(set(modules())))
def test_examples_in_docstrings_run(name):
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0


def test_imports_are_light():
    program = (
        "import sys, probattn\n"
        "print([name for name in ('matplotlib', 'arviz_base', 'arviz_stats', 'transformers', 'xarray')\n"
        "    if name in sys.modules])\n"
        "import probattn.hf, probattn.inference.verify\n"
        "print([name for name in ('torch._dynamo', 'transformers') if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "[]"]


def test_importing_changes_nothing_of_torch_or_pyro():
    program = (
        "import torch, pyro\n"
        "before = (torch.distributions.Distribution._validate_args, pyro.settings.get(), torch.get_default_dtype())\n"
        "import probattn, probattn.models, probattn.inference.verify, probattn.cli.app\n"
        "after = (torch.distributions.Distribution._validate_args, pyro.settings.get(), torch.get_default_dtype())\n"
        "print(before == after)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout == "True\n"


def test_public_names():
    assert set(probattn.__all__) <= set(dir(probattn))
    for name in probattn.__all__:
        assert getattr(probattn, name).__doc__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = tmp_path_factory.mktemp("source")
    # Built from a copy: setuptools leaves a build folder behind.
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    for name in filter(None, tracked.decode().split("\0")):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    settings = (source / "pyproject.toml").read_text(encoding="utf-8")
    assert '"-O3"' in settings  # the compiler's optimisation takes longer than all the rest, and is not looked at here
    (source / "pyproject.toml").write_text(settings.replace('"-O3"', '"-O0"'), encoding="utf-8")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(folder),
            str(source),
        ],
        check=True,
        timeout=300,
    )
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_puts_one_name_into_site_packages(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"probattn"}
    for expected in (
        "probattn/py.typed",
        "probattn/models/corpus.py",
        "probattn/inference/claims/objective.py",
        "probattn/inference/reports/templates/verify.html",
        "probattn/inference/studies/results/calibration.json",
    ):
        assert expected in names
    assert not [name for name in names if "test" in name.split("/")[-1] and name != "probattn/testing.py"]


SMALL_MODEL = ["--steps", "6", "--context", "16", "--dim", "8", "--layers", "1", "--batch", "8"]
COMMANDS = {
    "verify/report.html": ["verify", *SMALL_MODEL, "--claims", "jacobian"],
    "fit/fit.nc": ["fit", "--data", "hidden.npz", "--method", "laplace", "--draws", "50"],
}


@pytest.mark.slow
def test_a_wheel_runs_from_another_folder(wheel, tmp_path):
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)
    # Both in one process: the imports take most of the time.
    program = (
        "import json, probattn, sys\n"
        "assert probattn.__file__.startswith(sys.argv[1]), probattn.__file__\n"
        "from probattn.cli.app import main\n"
        "for words in json.loads(sys.argv[2]):\n"
        "    try:\n"
        "        main(words)\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code == 0, (words, ended.code)\n"
    )
    hidden = np.random.default_rng(0).normal(size=(4, 10, 2))
    np.savez(tmp_path / "hidden.npz", hidden=hidden)
    commands = [[*words, "--out", Path(made).parts[0]] for made, words in COMMANDS.items()]
    result = subprocess.run(
        [sys.executable, "-c", program, str(target), json.dumps(commands)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(target)},
    )
    assert result.returncode == 0, result.stderr
    for made in COMMANDS:
        assert (tmp_path / made).exists()
