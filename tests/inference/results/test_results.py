import arviz_stats
import numpy as np
import pytest
import xarray

from probattn.errors import InputError
from probattn.inference.results.fit_file import Fit

FIT = Fit(
    "map",
    {"posterior": {"qk_matrix": np.arange(8.0).reshape(2, 2, 2, 1, 1)}, "observed_data": {"u": np.zeros((3, 4))}},
    {"qk_matrix": ["head", "row", "column"], "u": ["sequence", "token"]},
    {"head": [0, 1]},
    {"seed": 3, "hardware": "a machine"},
)


def test_groups_dimensions_and_attributes():
    tree = FIT.to_datatree()
    assert set(tree.children) == {"posterior", "observed_data"}
    assert tree["posterior"]["qk_matrix"].dims == ("chain", "draw", "head", "row", "column")
    assert tree["observed_data"]["u"].dims == ("sequence", "token")
    assert tree.attrs["method"] == "map"
    assert tree.attrs["seed"] == 3
    assert "qk_matrix" in str(arviz_stats.summary(tree, kind="stats").index)


def test_plain_xarray_opens_the_file(tmp_path):
    FIT.save(tmp_path / "fit.nc")
    with xarray.open_datatree(tmp_path / "fit.nc") as tree:
        np.testing.assert_array_equal(tree["posterior"]["qk_matrix"].values, FIT.groups["posterior"]["qk_matrix"])
        assert tree.attrs["hardware"] == "a machine"
    assert [entry.name for entry in tmp_path.iterdir()] == ["fit.nc"]


def test_an_unwritable_place_is_named(tmp_path):
    with pytest.raises(InputError, match=r"fit\.nc: cannot be written: No such file or directory; name a folder"):
        FIT.save(tmp_path / "missing" / "fit.nc")


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "fit.nc"
    FIT.save(path)
    assert Fit.load(path).method == FIT.method
    whole = path.read_bytes()
    for k in range(0, len(whole), len(whole) // 60):
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 4]) + whole[k + 1 :])
        with pytest.raises(InputError, match=r"fit\.nc: cannot be read"):
            Fit.load(path)


def test_what_another_program_saved_is_read_on_demand(tmp_path):
    FIT.to_datatree().to_netcdf(tmp_path / "fit.nc", engine="h5netcdf")
    with pytest.raises(InputError, match="no checksum at its end"):
        Fit.load(tmp_path / "fit.nc")
    assert Fit.load(tmp_path / "fit.nc", verify=False).method == FIT.method
