"""``probattn fit`` as a user runs it: every method, with things going wrong."""

import json

import numpy as np
import pytest
import xarray
from posteriors import sequences

from probattn.inference.results.fit_file import Fit

pytestmark = pytest.mark.usefixtures("undrawn")
QUICK = {
    "nuts": ["--chains", "2", "--warmup", "20", "--draws", "20"],
    "laplace": ["--draws", "120"],
    "svi": ["--steps", "100", "--draws", "60"],
    "map": ["--steps", "100"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    np.savez(folder / "hidden.npz", u=sequences()[:4, :10].numpy())
    return folder


def posterior(path):
    with xarray.open_datatree(path) as tree:
        return tree["posterior"].to_dataset().load()


@pytest.mark.parametrize("method", QUICK)
def test_every_method_writes_a_judged_posterior(folder, here, method):
    result = here("fit", "--data", "hidden.npz", "--method", method, *QUICK[method], "--out", method, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    out = folder / method
    assert "verdict" in result.stdout
    names = {entry.name for entry in out.iterdir()}
    assert {"fit.nc", "diagnosis.json", "summary.csv", "config.json", "figures"} <= names
    figures = {entry.name for entry in (out / "figures").iterdir()}
    assert "margins.png" in figures
    assert ("chains.png" in figures) == (method == "nuts")
    with xarray.open_datatree(out / "fit.nc") as tree:  # plain xarray
        assert tree["posterior"]["qk_matrix"].dims == ("chain", "draw", "head", "key_feature", "query_feature")
        assert tree.attrs["method"] == method
        assert tree.attrs["seed"] == 0
        assert tree.attrs["hardware"]
        assert tree.attrs["version_torch"]
    diagnosis = json.loads((out / "diagnosis.json").read_text())
    assert diagnosis["verdict"] in ("reliable", "usable with care", "not reliable")
    record = json.loads((out / "config.json").read_text())
    assert record["data"]["shape"] == [4, 10, 2]
    assert record["method"]["name"] == method
    if method == "nuts":
        assert record["method"]["chain_method"] == "vectorised"
    assert "qk_matrix[0, 0, 0]" in (out / "summary.csv").read_text()
    assert not [entry for entry in out.iterdir() if entry.name.endswith(".partial")]
    assert Fit.load(out / "fit.nc").method == method


def test_comparison_with_the_naive_fit(folder, here):
    result = here(
        *(
            "fit",
            "--data",
            "hidden.npz",
            "--method",
            "laplace",
            "--draws",
            "200",
            "--compare",
            "jacobian",
            "--out",
            "compared",
        ),
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((folder / "compared" / "comparison.json").read_text())
    assert [model["name"] for model in content["models"]] == ["as asked", "without the Jacobian"]
    assert (folder / "compared" / "figures" / "comparison.png").exists()
    assert "compared  without the Jacobian: elpd" in result.stdout


def test_bounded_memory_certifies_every_draw(folder, here):
    bounds = ["--memory-radius", "1.5", "--contraction", "0.9", "--prior-scale", "30"]
    options = ["--data", "hidden.npz", "--method", "laplace", *QUICK["laplace"]]
    result = here("fit", *options, *bounds, "--out", "bounded", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "100 % certified" in result.stdout
    found = posterior(folder / "bounded" / "fit.nc")
    assert float(found["contraction"].max()) < 0.9
    assert {"qk_matrix", "free_qk_matrix"} <= set(found)
    assert float(abs(found["qk_matrix"]).max()) < 0.9 / 1.5**2


def test_a_text_gives_the_posterior_of_its_attention_stage(folder, here):
    (folder / "text.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    small = ["--context", "8", "--dim", "4", "--stage-rank", "1", "--language-steps", "20", "--sequences", "4"]
    sampler = ["--method", "nuts", "--chains", "1", "--warmup", "20", "--draws", "8", "--max-depth", "3"]
    result = here("fit", *("--corpus", "text.txt", *small, *sampler, "--out", "text"), cwd=folder)
    assert result.returncode == 0, result.stderr
    tree = Fit.load(folder / "text" / "fit.nc").to_datatree()
    assert tree["posterior"]["query"].shape[2:] == (1, 1, 4)
    assert tree.attrs["power"] > 0
    assert "raised to a power" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either data (hidden states) or corpus (a text)"),
        (["--data", "missing.npz"], "data missing.npz: no such file"),
        (["--data", "nan.npy"], "is not finite: nan at index (0, 1, 1)"),
        (["--data", "several.npz"], "holds 2 arrays (a, b); name one with --array"),
        (["--data", "short.npy"], "T is 2; give sequences of at least 3 tokens"),
        (
            ["--data", "hidden.npz", "--method", "gibbs"],
            'Invalid value "gibbs" for --method. Choose from: "nuts", "svi"',
        ),
        (["--data", "hidden.npz", "--chains", "9999999"], "use at most"),
        (["--data", "hidden.npz", "--method", "svi", "--guide", "full"], 'Invalid value "full" for --guide'),
        (["--data", "hidden.npz", "--guide", "flow"], "--guide belongs to --method svi, and the method is nuts"),
        (["--data", "hidden.npz", "--mask", "causal"], 'Invalid value "causal" for --mask. Choose from: "strict"'),
        (
            ["--data", "hidden.npz", "--memory-radius", "0"],
            'Invalid value "0.0" for --memory-radius. It must be above 0',
        ),
        (["--data", "hidden.npz", "--contraction", "0.5"], "contraction is 0.5, which needs memory_radius"),
        (["--data", "hidden.npz", "--contraction", "1", "--memory-radius", "1"], "It must be above 0 and below 1"),
        (["--data", "hidden.npz", "--compare", "mask"], "comparing masks needs value and output maps"),
        (["--data", "hidden.npz", "--method", "map", "--compare", "heads"], "compare needs draws"),
        (["--data", "hidden.npz", "--chains", "1", "--draws", "20", "--compare", "jacobian"], "compare needs 25 draws"),
        (["--data", "broad.npy", "--method", "svi"], "--guide full_rank needs about 550.3 GiB for 102,720 parameters"),
        pytest.param(
            ["--data", "wide.npy", "--method", "laplace"],
            "use --method svi --guide mean_field, or infer fewer (--rank; of a layer --update-rank)",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--data", "wide.npy", "--method", "nuts"],
            "infer fewer (--rank; of a layer --update-rank), use --method svi --guide mean_field",
            marks=pytest.mark.slow,
        ),
        (["--data", "one.npy", "--method", "laplace", "--compare", "jacobian"], "one sequence only"),
        (["--data", "hidden.npz", "--sequences", "-1"], 'Invalid value "-1" for --sequences'),
        (["--data", "constant.npy", "--standardise"], "all numbers are equal"),
        (["--data", "hidden.npz", "--out", "short.npy"], "--out short.npy: cannot be written"),
        (["--data", "hidden.npz", "--out", "damaged", "--resume"], "nuts.pt: cannot be read"),
    ],
)
def test_bad_input_is_one_line_and_status_two(tmp_path, here, arguments, message):
    states = sequences()[:3, :6].numpy().copy()
    np.savez(tmp_path / "hidden.npz", u=states)
    np.savez(tmp_path / "several.npz", a=states, b=states)
    np.save(tmp_path / "short.npy", states[:, :2])
    np.save(tmp_path / "one.npy", states[:1])
    np.save(tmp_path / "wide.npy", np.random.default_rng(0).normal(size=(2, 4, 576)))
    np.save(tmp_path / "broad.npy", np.random.default_rng(0).normal(size=(2, 4, 320)))
    np.save(tmp_path / "constant.npy", np.ones_like(states))
    states[0, 1, 1] = np.nan
    np.save(tmp_path / "nan.npy", states)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "nuts.pt").write_bytes(b"PK")
    result = here("fit", *arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("probattn: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(tmp_path.rglob("fit.nc"))


def test_a_fit_cut_short_is_named(folder, here):
    from probattn.errors import InputError

    words = ["fit", "--data", "hidden.npz", "--method", "map", "--steps", "30", "--out", "to-cut"]
    assert here(*words, cwd=folder).returncode == 0
    whole = (folder / "to-cut" / "fit.nc").read_bytes()
    for size in (10, len(whole) // 2):
        (folder / "cut.nc").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"cut\.nc: cannot be read .*; it is damaged or not netCDF: fit again"):
            Fit.load(folder / "cut.nc")
    with pytest.raises(InputError, match=r"no such file; give the fit\.nc of a run"):
        Fit.load(folder / "missing.nc")


def test_the_smallest_allowed_run_works_and_says_what_it_cannot_judge(folder, here):
    """By one method; every method ends with a verdict in tests/inference/test_smallest.py."""
    result = here("fit", "--data", "hidden.npz", "--method", "laplace", "--draws", "4", "--out", "least", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "4 draws are too few to fit the tail of the weights" in result.stdout
    assert "4 draws are too few to compare with the prior" in result.stdout


def test_a_fit_that_learned_nothing_says_so_before_and_after(folder, here):
    """Data of root mean square 0.027 say nothing of an attention whose logits they leave near zero."""
    np.save(folder / "small.npy", 0.027 * np.random.default_rng(0).normal(size=(4, 6, 2)))
    small = ["fit", "--data", "small.npy", "--method", "laplace", "--draws", "400", "--out", "small"]
    result = here(*small, cwd=folder)
    assert result.returncode == 0, result.stderr
    first = result.stdout.splitlines()[0]
    assert first.startswith("scale of the data: root mean square 0.02")
    assert first.endswith("attention is uniform; use --standardise")
    assert "problem  learned of qk_matrix: nothing: the posterior is the prior in 4 of 4 entries" in result.stdout
    assert "verdict  not reliable" in result.stdout
    result = here(*small, "--standardise", cwd=folder)
    assert "scale of the data" not in result.stdout
