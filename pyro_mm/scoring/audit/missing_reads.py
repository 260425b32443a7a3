"""Find programs that read the values of missing modalities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...batch.batch import Batch
from .densities import _equal_in_rows, densities, run_program


def find_reads_of_missing(model: Any, guide: Any, few: Batch, seen: Batch, hides: bool) -> list[tuple[str, str]]:
    """Find readers of values that rows lack: values are exchanged, and a program whose densities change read them.

    A guide that is shown other rows than the model may read them.
    """
    held = [n for n in few.names if few.holds(n)]
    lacking = [n for n in held if few.presence(n) is not True]
    found = []
    if lacking:
        apart = None if seen is few else seen
        all_exchanged = few.replaced({n: _exchange_missing(few, n) for n in lacking})
        if _programs_that_differ(model, guide, few, all_exchanged, apart):
            for name in lacking:
                exchanged = few.replaced({name: _exchange_missing(few, name)})
                changed = _programs_that_differ(model, guide, few, exchanged, apart)
                found += [(who, name) for who in changed]
    for name in held if hides and seen is few else ():
        hidden = few.without(name)
        if few.presence(name) is not False and hidden.rows is not False:
            changed = _programs_that_differ(model, guide, hidden, hidden.replaced({name: few[name].roll(1, 0)}))
            found += [(who, name) for who in changed if (who, name) not in found]
    return found


def _exchange_missing(few: Batch, name: str) -> Tensor:
    """Other values of a modality in the rows that lack it, from the rows around."""
    value, mask = few[name], few.presence(name)
    other = value.clone()
    for shift in range(1, few.size):
        rolled = value.roll(shift, 0)
        same = (other == value).reshape(few.size, -1).all(1)
        other[same] = rolled[same]
    if isinstance(mask, Tensor):
        other = torch.where(mask.reshape(-1, *[1] * (value.dim() - 1)), value, other)
    return other


def _programs_that_differ(model: Any, guide: Any, one: Batch, two: Batch, seen: Batch | None = None) -> list[str]:
    """Find which of model and guide differs between two batches, in rows that have something to be seen.

    With ``seen``, that is what the guide is shown both times.
    """
    rows = one.rows
    rows = rows if isinstance(rows, Tensor) else torch.full((one.size,), rows, device=one.device)
    if not rows.any():
        return []
    try:
        guides = [run_program(guide, b if seen is None else seen, 0) for b in (one, two)]
        each = {"guide": [densities(t) for t in guides]}
        if model is not None:
            each |= {"model": [densities(run_program(model, b, 0, guides[0])) for b in (one, two)]}
    except Exception:  # a pair that cannot do without a modality says so where that is asked of it
        return []
    return [who for who, (a, b) in each.items() if not _equal_in_rows(a, b, rows)]


def reads_and_ignores(model: Any, guide: Any, batch: Batch, seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """Find readers of missing modalities, and modalities that the guide ignores where they are present.

    The modality is hidden, and the rows exchange its hidden values: whoever changes has read them. The rows looked at
    have something else to be seen.
    """
    peeks, blind, whole = [], [], densities(run_program(guide, batch, seed))
    for name in (n for n in batch.names if batch.holds(n) and batch.presence(n) is not False):
        hidden = batch.without(name)
        rows = (
            hidden.rows
            if isinstance(hidden.rows, Tensor)
            else torch.full((batch.size,), hidden.rows, device=batch.device)
        )
        if not rows.any():
            continue
        rolled = hidden.replaced({name: batch[name].roll(1, 0)})
        try:
            traces = [run_program(guide, b, seed) for b in (hidden, rolled)]
            scores = [run_program(model, b, seed, traces[0]) for b in (hidden, rolled)]
        except Exception:  # a pair that cannot do without a modality says so where its likelihood is asked for
            continue
        for who, (one, other) in (("model", scores), ("guide", traces)):
            if not _equal_in_rows(densities(one), densities(other), rows):
                peeks.append((who, name))
        if _equal_in_rows(densities(traces[0]), whole, rows & batch.present[name]) and ("guide", name) not in peeks:
            blind.append(name)
    return peeks, blind
