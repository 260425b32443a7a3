"""The guide's distributions of latents, given what is present."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_subsample

from ..batch.batch import Batch
from ..scoring.evaluation import evaluating, returned
from ..utils.arguments import check_programs


def encode(guide: Callable[[Batch], Any], batch: Batch, *, audit: bool = True) -> dict[str, dist.Distribution]:
    """Return the guide's distributions given what is present: site -> distribution with batch shape ``(N,)``.

    Of a guide that draws a site given another one, the distribution given one draw of that. Modules run in evaluation
    mode.

    Args:
        guide: a callable of a batch.
        batch: N rows.
        audit: False spares the audit of the guide (:mod:`pyro_mm.scoring.audit`), and what it would refuse.
    """
    check_programs(guide=guide)
    with evaluating(None, guide, batch, audit=audit, draws=True) as rows:
        with poutine.block(), poutine.trace() as trace:
            guide(rows)
        sites = {n: s for n, s in trace.trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
        found = {n: s["fn"] for n, s in sites.items() if not site_is_subsample(s)}
        return returned(found, rows, batch)
