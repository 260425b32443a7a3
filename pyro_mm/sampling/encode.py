"""The guide's distributions of latents, given what is present."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from ..batch.batch import Batch
from ..scoring.evaluation import evaluating, move_result
from ..utils.arguments import check_programs


def encode(guide: Callable[[Batch], Any], batch: Batch, *, audit: bool = True) -> dict[str, dist.Distribution]:
    """Return the guide's distribution of each latent, given the modalities that are present.

    If the guide samples a site given another one, its distribution is that given one draw of the other site. Modules
    run in evaluation mode.

    Args:
        guide (callable): called with a batch.
        batch (Batch): N rows.
        audit (bool): False skips the audit of the guide (:mod:`pyro_mm.scoring.audit`) and its errors.

    Returns:
        Latent site -> distribution of batch shape ``(N,)``, or ``(*plates, N)`` in plates within a row, or
        ``(*plates,)`` outside the plate ``"data"``.

    Example:
        >>> import torch, pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"a": torch.ones(3, 2), "b": torch.ones(4, 2)})
        >>> mm.encode(mm.Guide(z=model.posterior), model.sample(5).only("a"))["z"].mean.shape
        torch.Size([5, 2])
    """
    check_programs(guide=guide)
    with evaluating(None, guide, batch, audit=audit, draws=True) as rows:
        with poutine.block(), poutine.trace() as traced:
            guide(rows)
        sites = {
            name: site["fn"]
            for name, site in traced.trace.nodes.items()
            if site["type"] == "sample" and not site["is_observed"] and not site_is_subsample(site)
        }
        return move_result(sites, rows, batch)
