"""Margins of one sentence in every layer of a language model, as numbers for a page that is not Python.

``python -m probattn.inference.reports.sentence notebooks/data/margins.nc probattn/teach/explorer/assets/sentence.json``
makes the file that the explorer shows from what ``probattn support`` has measured.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from numpy.typing import NDArray

from probattn.errors import require_at_least
from probattn.hf.margins import Kind
from probattn.inference.reports.support.measure import MAPS, variable
from probattn.inference.runtime.files import write_text

if TYPE_CHECKING:
    from xarray import Dataset

__all__ = ["sentence_record", "write_sentence"]

_TOKENS = 16  # Alice was beginning to get very tired of sitting by her sister on the bank,
_DIGITS = 7  # significant, as many as single precision has


def sentence_record(found: Dataset, count: int) -> dict[str, Any]:
    """Take the first tokens of a text that has been measured; later ones do not change what was measured of them.

    Args:
        found: contents of ``margins.nc`` of ``probattn support``, all four kinds, dimensions layer and token.
        count: number T of tokens.

    Returns:
        Plain JSON values: ``text``, ``model`` (name, digest of the weights), ``environment`` (command, date, hardware),
        ``tokens`` (texts), ``layers`` (their number L), ``surprisal`` and ``entropy``, (T,) in nats, ``sink``, (L, T),
        ``margins`` by map and kind, (L, T), and ``sign`` of the determinant by map, (L, T); null stands for infinity
        and for the surprisal of the first token.

    Raises:
        InputError: fewer than two tokens.
    """
    require_at_least("count", count, 2)
    some = found.isel(token=slice(0, count))
    tokens = [str(one) for one in some.text.values]
    signs = {"generator": "sign", "update": "update_sign"}
    return {
        "schema": 1,
        "text": "".join(tokens),
        "model": {"name": str(found.attrs["model"]), "weights_sha256": str(found.attrs["weights_sha256"])},
        "environment": json.loads(found.attrs["environment"]),
        "tokens": tokens,
        "layers": int(some.sizes["layer"]),
        "surprisal": _rounded(some.surprisal.values),
        "entropy": _rounded(some.entropy.values),
        "sink": _rounded(some.sink.values),
        "margins": {
            which: {kind: _rounded(some[variable(kind, which)].values) for kind in get_args(Kind)} for which in MAPS
        },
        "sign": {which: some[name].values.astype(int).tolist() for which, name in signs.items()},
    }


def write_sentence(source: Path, path: Path, count: int = _TOKENS) -> None:
    """Write the record of the first tokens of a text.

    Args:
        source: ``margins.nc`` of ``probattn support``.
        path: file to write.
        count: number of tokens.
    """
    import xarray

    with xarray.open_dataset(source, engine="h5netcdf") as found:
        record = sentence_record(found, count)
    write_text(path, json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":")) + "\n")


def _rounded(values: NDArray[Any]) -> Any:
    """Nested lists of numbers in few digits; what is not finite is null."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None for value in values.tolist()]


def _main(words: Sequence[str]) -> None:
    write_sentence(Path(words[0]), Path(words[1]))


if __name__ == "__main__":
    _main(sys.argv[1:])
