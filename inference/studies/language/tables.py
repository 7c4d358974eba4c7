"""Tables of the study, one file each: margins and sensitivities per token, as xarray datasets in netCDF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from probattn.errors import InputError
from probattn.inference.runtime.files import write_atomically

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["Tables", "append", "read_tables", "write_table"]

Tables = Mapping[str, "Dataset"]

_AXES = {"growth": "run"}  # the axis along which a table grows; "sequence" for all others


def append(name: str, table: Dataset | None, part: Dataset) -> Dataset:
    """A table with one more part, in single precision.

    Args:
        name: name of the table.
        table: the parts so far; None: there are none.
        part: texts, or training runs, that follow.
    """
    import xarray

    floats = [key for key, values in part.data_vars.items() if values.dtype.kind == "f"]
    part = part.assign({key: part[key].astype(np.float32) for key in floats})
    if table is None:
        return part
    joined: Dataset = xarray.concat(
        [table, part], _AXES.get(name, "sequence"), data_vars="minimal", join="exact", combine_attrs="override"
    )
    return joined


def done(name: str, table: Dataset | None) -> int:
    """Number of texts, or of training runs, that a table holds."""
    return 0 if table is None else int(table.sizes[_AXES.get(name, "sequence")])


def write_table(folder: Path, name: str, table: Dataset) -> None:
    """Write a table whole or not at all.

    Args:
        folder: folder of the study; it exists.
        name: name of the table, which names the file.
        table: the table.
    """
    packed = {key: {"zlib": True, "complevel": 4} for key, values in table.data_vars.items() if values.ndim > 1}
    write_atomically(folder / f"{name}.nc", lambda path: table.to_netcdf(path, engine="h5netcdf", encoding=packed))


def read_tables(folder: Path) -> dict[str, Dataset]:
    """Read all tables of a folder.

    Args:
        folder: folder of the study.

    Returns:
        Tables by name; none where there is no such folder.

    Raises:
        InputError: a file that is no such table.
    """
    import xarray

    found: dict[str, Dataset] = {}
    for path in sorted(folder.glob("*.nc")):
        try:
            found[path.stem] = xarray.load_dataset(path, engine="h5netcdf")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({error}); remove it, and it is measured anew.") from None
    return found
