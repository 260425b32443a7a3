"""Inspection of a pair's sites: findings of mistakes in the story and the guide."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..batch.batch import Batch
from ..scoring.audit.collect_sites import sites_of_traces
from ..scoring.audit.densities import run_program
from ..scoring.audit.few_rows import few_rows, without_side_effects
from ..scoring.audit.missing_reads import reads_and_ignores
from ..scoring.audit.sites import Sites, reads_missing_text
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
    """Collect the sites of a pair and find mistakes, by hiding each modality and exchanging its values.

    Args:
        model, guide: callables of a batch.
        batch: N rows; the first 32 are used.
        seed: of the draws.
        stacked: True also tests if particles can be stacked to the left of the rows.

    Returns:
        The sites. If a modality has values outside the support of its distribution, only that is reported.

    Raises:
        Errors of the story or the guide on these rows, with the place that they come from.
    """
    few = batch[: min(ROWS_EXCHANGED, batch.size)]
    pair_structure(model, guide, few)
    reads = {name: ValueReads() for name in ("model", "guide")}
    guide_trace = run_program(guide, reads["guide"].recording_batch(few), seed)
    model_trace = run_program(model, reads["model"].recording_batch(few), seed, guide_trace)
    sites = sites_of_traces(few, model_trace, guide_trace, reads)
    if unscored := unscored_values(batch, sites.supports):
        return replace(sites, unsupported=tuple(unscored))

    reads_missing, ignored_by_guide = reads_and_ignores(model, guide, few, seed)
    mixing = ""
    if stacked:
        programs = {"model": model, "guide": guide}
        reached = ReachableObjects(programs)
        with without_side_effects(reached, programs):
            mixing = stacking_problem(model, guide, *few_rows(batch, None, reached))
    return replace(sites, reads_missing=tuple(reads_missing), ignored_by_guide=tuple(ignored_by_guide), mixing=mixing)


def site_findings(sites: Sites, per_row: bool | None) -> Iterator[tuple[int, str]]:
    """Yield (rank, sentence) for each mistake in the sites; a lower rank is more serious.

    Args:
        sites: result of :func:`inspect_sites`.
        per_row: True if the estimator is one of :mod:`pyro_mm.estimators`, False if it is one of Pyro's, None if the
            objective has no estimator.
    """
    for text in (*sites.misfits, *sites.unsupported):
        yield 0, text
    if sites.mixing:
        yield 0, sites.mixing
    for program, name in sites.reads_missing:
        yield 1, reads_missing_text(program, name)
    for name in sites.guide_only:
        yield 1, sites.guide_only_text(name)
    for name in sites.unmasked:
        text = f"{name}: observed under the name of no modality of the batch, so that no mask reaches it."
        yield 1, f"{text} Use batch.observe with the modality's name."
    for name in sites.unobserved:
        yield 2, f"{name}: the batch has it, and the story never observes it. It is part of no likelihood."
    for name in sites.from_prior:
        text = f"{name}: in the model only."
        if per_row:
            yield (
                4,
                f"{text} Draws from its prior are unbiased but noisy; a site for it in the guide lowers the variance.",
            )
        elif per_row is False:
            yield 1, f"{text} Pyro's estimators add its log p without a log q, so that their loss is no bound."
    for name in sites.unheld:
        yield 3, f"{name}: the story observes it, and the batch does not hold it. Its decoder is not trained."
    for name in sites.ignored_by_guide:
        yield 3, f"{name}: the guide ignores it: its posterior is the same if {name} is hidden."
