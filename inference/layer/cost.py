"""Parameters and memory of a change of low rank, said before a fit begins, and refused where they do not fit."""

from __future__ import annotations

import logging
from typing import cast

from probattn.errors import InputError
from probattn.inference.methods.cost import free_bytes
from probattn.inference.methods.laplace import LaplaceConfig, bytes_of_hessian
from probattn.inference.methods.log_density import LogDensity
from probattn.inference.methods.map import MapConfig
from probattn.inference.methods.nuts import NutsConfig
from probattn.inference.methods.svi import SviConfig, bytes_of_guide
from probattn.models.layer import LayerModel

__all__ = ["bytes_of_fit", "require_update_memory"]

_LOG = logging.getLogger(__name__)
_COPIES = 4  # of the draws: in unconstrained space, as values of sites, as arrays, and in passing
_PROPOSALS = 6  # draws evaluated for each one kept where a fit is corrected by importance weights


def bytes_of_fit(method: NutsConfig | SviConfig | LaplaceConfig | MapConfig, dim: int, element: int = 8) -> int:
    """Memory that grows with the number of parameters: draws, and what a method keeps of size D or D x D.

    Args:
        method: options of the method.
        dim: number D of parameters.
        element: bytes of a number.

    Example:
        >>> bytes_of_fit(LaplaceConfig(draws=100, correct=False), 1000) // 2**20
        48
    """
    if isinstance(method, MapConfig):
        return 8 * dim * element
    draws = method.draws * getattr(method, "chains", 1) * (_COPIES + _PROPOSALS * getattr(method, "correct", False))
    needed = draws * dim * element
    if isinstance(method, LaplaceConfig):
        needed += bytes_of_hessian(dim, element)
    elif isinstance(method, SviConfig):
        needed += bytes_of_guide(method.guide, dim, element)
    return needed


def require_update_memory(target: LogDensity, method: NutsConfig | SviConfig | LaplaceConfig | MapConfig) -> int:
    """Say how many parameters a change of low rank has and what memory its fit takes, and refuse too much.

    Args:
        target: log-density of a :class:`~probattn.models.layer.LayerModel` with an update.
        method: options of the method.

    Returns:
        Bytes.

    Raises:
        InputError: more than is free, with a smaller choice.
    """
    prior = cast(LayerModel, target.model).update
    assert prior is not None
    needed, free = bytes_of_fit(method, target.dim, target.origin.element_size()), free_bytes(target.origin.device)
    heads = f"{len(prior.heads)} head{'s' * (len(prior.heads) > 1)}"
    _LOG.info(
        "a change of rank %d of the QK product of %s: %s of %s parameters; method and draws take about %s MiB",
        *(prior.rank, heads, f"{prior.parameters:,}", f"{target.dim:,}", f"{needed / 2**20:,.0f}"),
    )
    if needed <= free:
        return needed
    guides = (
        "" if isinstance(method, SviConfig) and method.guide == "mean_field" else "a normal guide with few numbers "
    )
    guides += "(--method svi --guide low_rank or mean_field), " if guides else ""
    raise InputError(
        f"update_rank is {prior.rank} for {heads}: the fit needs about {needed / 2**30:,.1f} GiB for {target.dim:,} "
        f"parameters, and {free / 2**30:,.1f} GiB are free; use {guides}fewer heads (--update-heads), a lower rank "
        "(--update-rank) or fewer draws (--draws)."
    )
