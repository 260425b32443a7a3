"""Find programs that read the values of missing modalities, by exchanging these values.

A program whose densities change with the values of a modality in rows that lack it has read them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...batch.batch import Batch
from .densities import densities, equal_in_rows, run_program

Read = tuple[str, str]  # "model" or "guide", and a modality


def find_reads_of_missing(model: Any, guide: Any, few_rows: Batch, guide_batch: Batch, hides: bool) -> list[Read]:
    """Find the modalities whose values a model or a guide reads in rows that lack them.

    Args:
        model, guide: callables of a batch; None for a model that is not run.
        few_rows: a few rows.
        guide_batch: the same rows as the guide sees them; if it is another batch, the guide may read what ``few_rows``
            lacks.
        hides: True to hide, one by one, the modalities that rows have, too.
    """
    held = [name for name in few_rows.names if few_rows.holds(name)]
    lacking = [name for name in held if few_rows.presence(name) is not True]
    for_guide = None if guide_batch is few_rows else guide_batch
    found: list[Read] = []

    if lacking:
        all_exchanged = few_rows.replaced({name: _exchange_missing(few_rows, name) for name in lacking})
        if not programs_that_differ(model, guide, few_rows, all_exchanged, for_guide):
            lacking = []
    for name in lacking:
        exchanged = few_rows.replaced({name: _exchange_missing(few_rows, name)})
        found += [(who, name) for who in programs_that_differ(model, guide, few_rows, exchanged, for_guide)]

    for name in held if hides and for_guide is None else ():
        hidden = few_rows.without(name)
        if few_rows.presence(name) is False or hidden.rows is False:
            continue
        exchanged = hidden.replaced({name: few_rows[name].roll(1, 0)})
        reads = [(who, name) for who in programs_that_differ(model, guide, hidden, exchanged)]
        found += [read for read in reads if read not in found]
    return found


def reads_and_ignores(model: Any, guide: Any, batch: Batch, seed: int) -> tuple[list[Read], list[str]]:
    """Find reads of missing values, and modalities that the guide ignores where they are present.

    Each modality is hidden, in rows that have another one.

    Args:
        model, guide: callables of a batch.
        batch: a few rows.
        seed: the seed of the draws.

    Returns:
        (reads, modalities that the guide ignores).
    """
    reads: list[Read] = []
    ignored: list[str] = []
    whole = densities(run_program(guide, batch, seed))
    for name in batch.names:
        if not batch.holds(name) or batch.presence(name) is False:
            continue
        hidden = batch.without(name)
        rows = _rows_with_something(hidden)
        if not rows.any():
            continue
        exchanged = hidden.replaced({name: batch[name].roll(1, 0)})
        try:
            of_guide = [run_program(guide, shown, seed) for shown in (hidden, exchanged)]
            of_model = [run_program(model, shown, seed, of_guide[0]) for shown in (hidden, exchanged)]
        except Exception:  # a pair that needs this modality says so where a likelihood without it is asked for
            continue
        for who, (one, other) in (("model", of_model), ("guide", of_guide)):
            if not equal_in_rows(densities(one), densities(other), rows):
                reads.append((who, name))
        same_without = equal_in_rows(densities(of_guide[0]), whole, rows & batch.present[name])
        if same_without and ("guide", name) not in reads:
            ignored.append(name)
    return reads, ignored


def _exchange_missing(few_rows: Batch, name: str) -> Tensor:
    """Return a modality's values with others, of the rows around, in the rows that lack it."""
    value = few_rows[name]
    mask = few_rows.presence(name)
    other = value.clone()
    for shift in range(1, few_rows.size):
        rolled = value.roll(shift, 0)
        same = (other == value).reshape(few_rows.size, -1).all(1)
        other[same] = rolled[same]
    if isinstance(mask, Tensor):
        other = torch.where(mask.reshape(-1, *[1] * (value.dim() - 1)), value, other)
    return other


def programs_that_differ(model: Any, guide: Any, one: Batch, two: Batch, for_guide: Batch | None = None) -> list[str]:
    """Return which of "guide" and "model" has other densities on the second batch, in rows with something present.

    Args:
        one, two: the batches.
        for_guide: the batch that the guide is shown both times, if it is shown another one.
    """
    rows = _rows_with_something(one)
    if not rows.any():
        return []
    try:
        traces = [run_program(guide, shown if for_guide is None else for_guide, 0) for shown in (one, two)]
        found = {"guide": [densities(trace) for trace in traces]}
        if model is not None:
            found["model"] = [densities(run_program(model, shown, 0, traces[0])) for shown in (one, two)]
    except Exception:  # a pair that needs a modality says so where an evaluation without it is asked for
        return []
    return [who for who, (a, b) in found.items() if not equal_in_rows(a, b, rows)]


def _rows_with_something(batch: Batch) -> Tensor:
    """Return a boolean ``(N,)``, True for rows with a modality that is present."""
    rows = batch.rows
    return rows if isinstance(rows, Tensor) else torch.full((batch.size,), rows, device=batch.device)
