"""One result type for every fit, and its form as an ArviZ ``DataTree``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from probattn.errors import InputError
from probattn.inference.files import write_atomically

if TYPE_CHECKING:
    from xarray import DataTree

__all__ = ["Fit"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Fit:
    """Draws or a point, with what is needed to judge them.

    Attributes:
        method: "map", "svi", "laplace" or "nuts".
        groups: by ArviZ group (posterior, sample_stats, observed_data, constant_data, ...) and variable. Arrays of
            posterior, sample_stats and other draws are (chain, draw, *event); a point has one chain of one draw.
        dims: names of the event axes of a variable, without chain and draw.
        coords: values along the named axes.
        attributes: versions, seed, hardware, configuration: numbers and strings.
    """

    method: str
    groups: Mapping[str, Mapping[str, Array]]
    dims: Mapping[str, Sequence[str]] = field(default_factory=dict)
    coords: Mapping[str, Sequence[Any] | Array] = field(default_factory=dict)
    attributes: Mapping[str, str | int | float] = field(default_factory=dict)

    def to_datatree(self) -> DataTree:
        """The fit as an ``xarray.DataTree`` with ArviZ's groups."""
        from arviz_base import from_dict

        tree: DataTree = from_dict(
            {group: dict(variables) for group, variables in self.groups.items()},
            dims={name: list(axes) for name, axes in self.dims.items()},
            coords={name: np.asarray(values) for name, values in self.coords.items()},
        )
        tree.attrs.update({"method": self.method, **self.attributes})
        return tree

    def save(self, path: Path) -> None:
        """Write netCDF atomically; plain xarray and ArviZ open it.

        Raises:
            InputError: the file cannot be written.
        """
        tree = self.to_datatree()
        try:
            write_atomically(path, lambda partial: tree.to_netcdf(partial, engine="h5netcdf"))
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error}).") from None
