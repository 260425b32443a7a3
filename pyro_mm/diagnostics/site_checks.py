"""Sites of a pair for a report, each modality hidden and shown in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..batch.batch import Batch
from ..scoring.audit.collect_sites import _sites_of_traces
from ..scoring.audit.densities import run_program
from ..scoring.audit.few_rows import few_rows, without_side_effects
from ..scoring.audit.missing_reads import reads_and_ignores
from ..scoring.audit.sites import Sites
from ..scoring.audit.stacking import stacking_problem
from ..scoring.audit.value_reads import ValueReads
from ..scoring.audit.value_supports import unscored_values
from ..scoring.structure import pair_structure
from ..utils.reachable import ReachableObjects

ROWS_EXCHANGED = 32  # rows on which `check` exchanges values to see who reads them


@torch.no_grad()
def inspect_sites(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    seed: int = 0,
    stacked: bool = False,
) -> Sites:
    """Return the :class:`Sites` of a pair for a report, with all that is hidden or shown in turn.

    Errors of the story or the guide on these rows are raised, with where they are from.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        seed: of the draws.
        stacked: whether particles will stand to the left of the rows.
    """
    whole, batch = batch, batch[: min(ROWS_EXCHANGED, batch.size)]
    pair_structure(model, guide, batch)
    heard = {name: ValueReads() for name in ("model", "guide")}
    of_guide = run_program(guide, heard["guide"].listening(batch), seed)
    of_model = run_program(model, heard["model"].listening(batch), seed, of_guide)
    sites = _sites_of_traces(model, guide, batch, of_model, of_guide, heard, ())
    if unsupported := unscored_values(whole, sites.supports):
        return replace(sites, unsupported=tuple(unsupported))  # nothing can be scored
    reads_missing, ignored_by_guide = reads_and_ignores(model, guide, batch, seed)
    mixing = ""
    if stacked:
        programs = {"model": model, "guide": guide}
        reached = ReachableObjects(programs)
        with without_side_effects(reached, programs):
            mixing = stacking_problem(model, guide, *few_rows(whole, None, reached))
    return replace(sites, reads_missing=tuple(reads_missing), ignored_by_guide=tuple(ignored_by_guide), mixing=mixing)
