"""``probattn fit`` as processes: killed and resumed, two that share the work, two that want one folder."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import xarray
from forked import Forked
from posteriors import sequences

pytestmark = pytest.mark.usefixtures("undrawn")

SHARED = {"svi": ["--steps", "200", "--draws", "120"], "map": ["--steps", "100"]}
TWO_PROCESSES = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "probattn",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    np.savez(folder / "hidden.npz", u=sequences()[:4, :10].numpy())
    return folder


def posterior(path):
    with xarray.open_datatree(path) as tree:
        return tree["posterior"].to_dataset().load()


# Kills at random moments, of every method, are in tests/faults; one stays with the fast tests.
@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param("nuts", ["--chains", "2", "--warmup", "20", "--draws", "300"], marks=pytest.mark.slow),
        pytest.param("svi", ["--steps", "1000", "--draws", "60", "--particles", "2"], marks=pytest.mark.slow),
        ("map", ["--steps", "160", "--patience", "0"]),
    ],
    ids=["nuts", "svi", "map"],
)
def test_killed_and_resumed_is_the_unbroken_fit(folder, here, method, options):
    command = ["--data", "hidden.npz", "--method", method, *options]
    whole = here("fit", *command, "--out", f"whole-{method}", cwd=folder)
    assert whole.returncode == 0, whole.stderr
    out = folder / f"broken-{method}"
    with Forked("fit", *command, "--out", out.name, cwd=folder) as process:
        process.until((out / f"{method}.pt").exists)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (out / "fit.nc").exists(), "the run ended before it was killed"
    resumed = here("fit", *command, "--out", out.name, "--resume", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert len(resumed.stdout.splitlines()) < len(whole.stdout.splitlines())  # it went on instead of starting anew
    xarray.testing.assert_equal(posterior(out / "fit.nc"), posterior(folder / f"whole-{method}" / "fit.nc"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["svi", "map"])
def test_two_processes_are_one(folder, here, method):
    command = ["fit", "--data", "hidden.npz", "--method", method, *SHARED[method], "--shards", "2"]
    one = here(*command, "--out", f"one-{method}", cwd=folder)
    assert one.returncode == 0, one.stderr
    two = subprocess.run(
        [*TWO_PROCESSES, *command, "--out", f"two-{method}"], capture_output=True, text=True, cwd=folder, timeout=300
    )
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("verdict") == 1  # one of the processes speaks
    record = json.loads((folder / f"two-{method}" / "config.json").read_text())
    assert record["processes"] == 2
    alone, shared = (posterior(folder / f"{kind}-{method}" / "fit.nc") for kind in ("one", "two"))
    # The sum of two gradients is the same in either order; rounding is all that may differ.
    xarray.testing.assert_allclose(shared, alone, rtol=1e-9, atol=1e-12)


def test_a_sampler_in_two_processes_is_refused(folder, here, monkeypatch):
    monkeypatch.setattr("probattn.inference.fit.world_size", lambda: 2)
    result = here("fit", "--data", "hidden.npz", "--method", "nuts", cwd=folder)
    assert result.returncode == 2
    assert "--method nuts runs in one process and 2 were started; use svi or map" in result.stderr


def test_two_runs_into_one_folder(folder, here):
    """The second is refused, and the first is not disturbed."""
    words = ["--data", "hidden.npz", "--method", "map", "--steps", "100000", "--patience", "0", "--out", "shared"]
    with Forked("fit", *words, cwd=folder) as process:
        process.until((folder / "shared" / "map.pt").exists)
        second = here("fit", "--data", "hidden.npz", "--method", "laplace", "--out", "shared", cwd=folder)
        process.send_signal(signal.SIGTERM)
        process.wait()
    assert second.returncode == 2
    assert second.stderr.startswith(f"probattn: --out shared: in use by process {process.pid} on ")
    assert {entry.name for entry in (folder / "shared").iterdir()} <= {"map.pt", "map.previous.pt"}
