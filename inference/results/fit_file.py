"""A fit with everything to judge it by, its form as an ArviZ ``DataTree``, and its file."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from probattn.errors import InputError
from probattn.inference.runtime.checksum import seal, unseal
from probattn.inference.runtime.files import write_bytes
from probattn.models.reading import read_regular

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["Fit"]

Array = NDArray[Any]
_MOST = 2**36  # bytes of a file: more than one run writes


@dataclass(frozen=True)
class Fit:
    """Draws or a point, with what is needed to judge them.

    Attributes:
        method: "map", "svi", "laplace" or "nuts".
        groups: arrays by group and variable: the groups of ArviZ (posterior, sample_stats, observed_data, ...)
            and ``tokens``, the quantities per draw and token, which are no parameters. Those of posterior,
            sample_stats, tokens and other draws are ``(chain, draw, *event)``; a point has one chain of one draw.
        dims: names of the event axes of a variable, without chain and draw; "group.variable" where a name has other
            axes in one group than elsewhere.
        coords: values along the named axes, by name.
        attributes: versions, seed, hardware and configuration, numbers and strings by name.
        variable_attributes: attributes of a variable by its name, such as the meanings of its codes.
    """

    method: str
    groups: Mapping[str, Mapping[str, Array]]
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    coords: Mapping[str, Sequence[Any] | Array] = field(default_factory=dict)
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)
    variable_attributes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_datatree(self) -> DataTree:
        """The fit as an ``xarray.DataTree`` with ArviZ's groups."""
        from arviz_base import from_dict
        from xarray import DataTree

        coords = {name: np.asarray(values) for name, values in self.coords.items()}
        datasets = {}
        for group, variables in self.groups.items():
            dims = {}
            for name in variables:
                axes = self.dims.get(f"{group}.{name}", self.dims.get(name))
                if axes is not None:
                    dims[name] = list(axes)
            dataset = from_dict({group: dict(variables)}, dims=dims, coords=coords)[group].dataset
            for name in variables:
                dataset[name].attrs.update(self.variable_attributes.get(name, {}))
            datasets[group] = dataset
        tree = DataTree.from_dict(datasets)
        tree.attrs.update({"method": self.method, **self.attributes})
        return tree

    def save(self, path: Path) -> None:
        """Write netCDF atomically, with a checksum after its last byte; plain xarray and ArviZ open it.

        The bytes are made in memory: HDF5 itself does not survive a disk that becomes full while it writes.

        Args:
            path: file to write; its folder exists.

        Raises:
            InputError: the file cannot be written.
        """
        write_bytes(path, seal(bytes(self.to_datatree().to_netcdf(engine="h5netcdf"))))

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> Fit:
        """Read a file that :meth:`save` wrote.

        Args:
            path: file to read.
            verify: compare the checksum; False reads what another program saved again, which has none.

        Raises:
            InputError: the file is missing, damaged or of another kind.
        """
        from xarray import open_datatree

        try:
            data = read_regular(path, str(path), most=_MOST)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; give the fit.nc of a run.") from None
        remedy = "it is damaged or not netCDF: fit again; verify=False reads what another program saved"
        content = unseal(data, str(path), remedy) if verify else data
        try:
            with open_datatree(io.BytesIO(content), engine="h5netcdf") as opened:
                tree = opened.load()
        except Exception as error:  # HDF5 has no common class for what a damaged file may cause
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: cannot be read ({reason}); it is damaged or not netCDF: fit again.") from None
        attributes: dict[str, Any] = {str(name): value for name, value in tree.attrs.items()}
        method = attributes.pop("method", None)
        if method is None or not tree.children:
            raise InputError(f"{path}: not the file of a fit; give the fit.nc of a run.")
        groups: dict[str, dict[str, Array]] = {}
        dims: dict[str, list[str]] = {}
        coords: dict[str, Array] = {}
        described: dict[str, dict[str, Any]] = {}
        for group, node in tree.children.items():
            groups[group] = {str(name): variable.values for name, variable in node.data_vars.items()}
            for name, variable in node.data_vars.items():
                axes = [str(axis) for axis in variable.dims if axis not in ("chain", "draw", "sample")]
                if axes:
                    dims[f"{group}.{name}"] = axes
                if variable.attrs:
                    described[str(name)] = {str(key): value for key, value in variable.attrs.items()}
            coords |= {str(n): v.values for n, v in node.coords.items() if n not in ("chain", "draw", "sample")}
        return cls(method, groups, dims, coords, attributes, described)
