"""The command line as a user runs it: in another process, on real text, with things going wrong."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import xarray
from forked import Forked

from probattn.errors import InputError
from probattn.inference.claims import CLAIMS, jacobian

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = {"--steps": "24", "--context": "16", "--dim": "8", "--layers": "1", "--batch": "8"}
# Where the command line is under test and not the claims.
QUICK = {**SMALL, "--claims": "jacobian"}
PROBATTN = [sys.executable, "-m", "probattn"]


def words(options):
    return [word for pair in options.items() for word in pair]


def run(*arguments, cwd=None, **options):
    return subprocess.run([*PROBATTN, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in a process of its own, with three claims of the three kinds of work."""
    folder = tmp_path_factory.mktemp("verify")
    result = run(
        "verify", *words({**SMALL, "--claims": "jacobian,objective,barrier-training"}), "--out", "out", cwd=folder
    )
    assert result.returncode == 0, result.stderr
    return result, folder / "out"


@pytest.fixture(scope="module")
def complete(tmp_path_factory, quietly):
    """A run with every claim."""
    folder = tmp_path_factory.mktemp("complete")
    result = quietly("verify", *words(SMALL), "--out", "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "out"


def test_verify_writes_everything(finished):
    result, out = finished
    assert sorted(entry.name for entry in out.iterdir()) == [
        "checkpoint.pt",
        "claims.json",
        "config.json",
        "figures",
        "fit.nc",
        "report.html",
    ]
    assert len(list((out / "figures").glob("*.png"))) >= 8
    assert [claim["id"] for claim in json.loads((out / "claims.json").read_text())["claims"]] == [
        "jacobian",
        "barrier-training",
        "objective",
    ]
    assert "claim objective: holds (" in result.stdout
    assert "map step 24: objective " in result.stdout
    assert ", cross entropy " in result.stdout
    assert result.stderr == ""


@pytest.mark.slow
def test_claims_follow_their_schema(complete):
    figures = {path.name for path in (complete / "figures").glob("*.png")}
    assert figures >= {"conditional.png", "training.png", "mass.png", "claim-published.png"}
    assert len(figures) > 20
    content = json.loads((complete / "claims.json").read_text())
    assert content["schema"] == 1
    assert [claim["id"] for claim in content["claims"]] == list(CLAIMS)
    for claim in content["claims"]:
        assert claim["kind"] in ("identity", "statistical", "empirical")
        assert claim["verdict"] in ("supported", "supported_within", "not_supported", "not_run")
    held = [claim for claim in content["claims"] if claim["verdict"] in ("supported", "supported_within")]
    assert len(held) >= 10
    for claim in held:
        for name, bound in claim["bound"].items():
            assert claim["measured"][name] <= bound


def test_the_fit_opens_with_plain_xarray(finished):
    with xarray.open_datatree(finished[1] / "fit.nc") as tree:
        assert tree["posterior"]["qk_matrix"].dims == ("chain", "draw", "head", "key_feature", "query_feature")
        assert tree["tokens"]["margin"].shape == (1, 1, 64, 16)
        assert "history_objective" in tree["constant_data"]
        assert tree.attrs["version_torch"]


def test_the_record_says_how_it_was_made(finished):
    record = json.loads((finished[1] / "config.json").read_text())
    assert "verify" in record["environment"]["command"]
    assert record["environment"]["versions"]["pyro-ppl"]
    assert record["model"]["kind"] == "logdet"
    assert record["options"]["fit"]["steps"] == 24
    assert record["fit"]["steps_taken"] == 24
    assert len(record["corpus"]["sha256"]) == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--corpus", "missing.txt"], "corpus missing.txt: no such file"),
        (["--corpus", "binary.bin"], "a binary file"),
        (["--corpus", "empty.txt"], "the file is empty"),
        (["--context", "9999999"], "too short for a context of 9999999"),
        (["--kind", "log"], 'Invalid value "log" for --kind. Choose from: "logdet", "one_sided"'),
        (["--prior", "none"], 'Invalid value "none" for --prior. Choose from: "full", "margin"'),
        (["--weight", "0"], "weight is 0, which omits the attention prior"),
        (["--weight", "-1"], 'Invalid value "-1.0" for --weight. It must be at least 0'),
        (["--dtype", "half"], 'Invalid value "half" for --dtype. Choose from: "float32", "float64"'),
        (["--device", "tpu"], 'Invalid value "tpu" for --device. Choose from: "auto", "cpu", "cuda"'),
        (["--steps", "many"], 'Invalid value for --steps: unable to convert "many" into int'),
        (["--colour", "red"], "Unknown option: --colour."),
        (["--claims", "truth"], "claim is 'truth'; use one of 'jacobian', 'barrier'"),
        (["--out", "empty.txt"], "--out empty.txt: cannot be written"),
        (["--out", "damaged", "--resume"], "checkpoint damaged/checkpoint.pt: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_status_two(tmp_path, here, arguments, message):
    (tmp_path / "binary.bin").write_bytes(b"\0\1\2" * 50)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "checkpoint.pt").write_bytes(b"PK")
    before = sorted(tmp_path.rglob("*"))
    given = {name: value for name, value in QUICK.items() if name not in arguments}
    result = here("verify", *words(given), *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("probattn: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    made = [path for path in sorted(tmp_path.rglob("*")) if path not in before]
    assert all(path.is_dir() for path in made), "half a result was left behind"


def test_cuda_without_cuda(here, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    result = here("verify", "--device", "cuda", cwd=tmp_path)
    assert result.returncode == 2
    assert "torch finds no CUDA device; use --device cpu or auto" in result.stderr


def test_a_traceback_only_with_debug(tmp_path, here):
    """The error leaves ``main`` as it is, and Python prints it; without the flag it is one line, as above."""
    with pytest.raises(InputError, match="corpus missing: no such file"):
        here("verify", "--corpus", "missing", "--debug", cwd=tmp_path)


def test_a_broken_identity_is_status_one(tmp_path, here, monkeypatch):
    monkeypatch.setattr(jacobian, "BOUND", {**jacobian.BOUND, "max_abs_error": -1.0})
    result = here("verify", *words(QUICK), "--out", "out", cwd=tmp_path)
    assert result.returncode == 1
    assert "an identity that must hold did not: jacobian" in result.stderr
    assert (tmp_path / "out" / "report.html").exists()


def contents(path):
    with xarray.open_datatree(path) as tree:
        return [tree[group].to_dataset().load() for group in ("posterior", "constant_data")]


RESUMED = ["verify", *words({**QUICK, "--steps": "160"})]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, quietly):
    folder = tmp_path_factory.mktemp("unbroken")
    result = quietly(*RESUMED, "--out", "out", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "out"


# Kills at random moments are in tests/faults; with the fast tests `fit` is killed and `train` is interrupted.
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_killed_and_resumed_is_the_unbroken_run(tmp_path, here, unbroken, number):
    checkpoint = tmp_path / "broken" / "checkpoint.pt"
    with Forked(*RESUMED, "--out", "broken", cwd=tmp_path) as process:
        process.until(checkpoint.exists)
        process.send_signal(number)
        assert process.wait() == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    if number == signal.SIGINT:
        assert "--resume" in process.errors
    assert not (tmp_path / "broken" / "report.html").exists(), "the run ended before it was killed"
    resumed = here(*RESUMED, "--out", "broken", "--resume", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert "map step 50:" not in resumed.stdout  # it did go on instead of starting anew
    for group, expected in zip(contents(tmp_path / "broken" / "fit.nc"), contents(unbroken / "fit.nc"), strict=True):
        xarray.testing.assert_equal(group, expected)


def test_wikitext(tmp_path):
    text = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2" / "valid.txt"
    if not text.exists():
        pytest.skip("WikiText-2 is not here; it is data, not part of the repository")
    result = run(
        "verify",
        *words(QUICK),
        "--corpus",
        str(text),
        "--heldout",
        str(text.with_name("test.txt")),
        "--out",
        "out",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr


def test_help_and_version(here, tmp_path):
    assert "verify" in here("--help", cwd=tmp_path).stdout
    assert "verify" in here(cwd=tmp_path).stdout
    assert run("--version").stdout.startswith("probattn 0.")
