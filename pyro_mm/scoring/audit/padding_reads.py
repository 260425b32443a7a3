"""Find programs that read what stands behind the end of sequences, by exchanging it, and networks that read ahead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...batch.batch import Batch
from ...batch.masks import add_event_dims
from ...batch.steps import valid_steps
from ...distributions.support import unwrap
from ...distributions.token_sequence import TokenSequence
from .missing_reads import Read, programs_that_differ


def find_reads_of_padding(model: Any, guide: Any, few_rows: Batch, guide_batch: Batch) -> list[Read]:
    """Find the sequences of which a model or a guide reads the steps behind the end.

    These steps are exchanged for valid ones of the same modality, which lie in the support of its distribution; no
    density may change.

    Args:
        model, guide: callables of a batch; None for one that is not run.
        few_rows: a few rows, some of them with padding.
        guide_batch: the same rows as the guide sees them.
    """
    if guide is None:
        return []
    if guide_batch is not few_rows:
        of_guide = find_reads_of_padding(None, guide, guide_batch, guide_batch)
        return of_guide + [
            (who, name)
            for name, exchanged in _exchanged(few_rows)
            for who in programs_that_differ(model, guide, few_rows, exchanged, guide_batch)
        ]
    return [
        (who, name)
        for name, exchanged in _exchanged(few_rows)
        for who in programs_that_differ(model, guide, few_rows, exchanged)
    ]


def find_networks_that_read_ahead(observed: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the modalities whose network predicts a token from that token itself, or from later ones.

    Args:
        observed: observed site -> site of a trace.
    """
    for name, site in observed.items():
        d = unwrap(site["fn"])
        if isinstance(d, TokenSequence) and d.reads_ahead():
            yield name


def has_padding(batch: Batch, name: str) -> bool:
    """Return True if some sequence of a modality ends before its last step, and does not show where by itself."""
    if batch.has_end_marks or name not in batch.lengths or not batch.holds(name) or batch.presence(name) is False:
        return False
    return bool((batch.lengths[name] < batch[name].shape[1]).any())


def _exchanged(rows: Batch) -> Iterator[tuple[str, Batch]]:
    """Yield each sequence with padding, and the rows with other values in the place of that."""
    for name in rows.names:
        if has_padding(rows, name):
            values = _with_other_padding(rows[name], rows.lengths[name])
            if not torch.equal(values, rows[name]):
                yield name, rows.replaced({name: values})


def _with_other_padding(values: Tensor, lengths: Tensor) -> Tensor:
    """Return sequences with the valid step that differs most from their last one in the place of padding."""
    valid = valid_steps(lengths, values.shape[1])
    pool = values[valid]
    if not len(pool):
        return values
    last = values[:, -1]  # what stands behind the end of a sequence that is padded
    distance = (pool.flatten(1) if pool.dim() > 1 else pool[:, None]).double()
    own = (last.flatten(1) if last.dim() > 1 else last[:, None]).double()
    other = pool[torch.cdist(own, distance).argmax(1)]
    return torch.where(add_event_dims(valid, values.dim() - 2), values, other[:, None])
