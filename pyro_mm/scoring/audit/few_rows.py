"""A few rows of a batch, and a context in which running a pair on them changes nothing."""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ...batch.batch import Batch
from ...utils.modules import preserve_buffers
from ...utils.reachable import ReachableObjects, evaluation_mode
from .padding_reads import has_padding


class without_side_effects:
    """A context in which a pair runs in evaluation mode, without gradients; its buffers are restored afterwards.

    Args:
        reached: what the programs refer to.
        programs: name -> callable.
    """

    def __init__(self, reached: ReachableObjects, programs: dict[str, Any]):
        self.contexts = [
            torch.inference_mode(False),
            torch.no_grad(),
            evaluation_mode(reached.modules.values()),
            preserve_buffers(*programs.values()),
            poutine.block(),
        ]

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: Any) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)


def few_rows(batch: Batch, guide_batch: Batch | None, reached: ReachableObjects) -> tuple[Batch, Batch]:
    """Return a few rows of both batches, on the device of the networks.

    Their number is unlike any size in data and networks, so that a dimension of that size is one of rows. Of each
    modality that some rows have and others lack, two rows that have it and one that lacks it are among them; and of
    each sequence two rows with padding, and the longest one.

    Args:
        batch: N rows.
        guide_batch: the same rows as the guide sees them, if that is another batch.
        reached: what the programs refer to.
    """
    rows = [0]
    for name in batch.names:
        mask = batch.presence(name)
        if isinstance(mask, Tensor):  # two that have it, since values of one may fill the rows that lack it
            rows += [int(mask.int().argmin()), *mask.nonzero()[:2, 0].tolist()]
        if has_padding(batch, name):
            rows += _rows_with_padding(batch, name)
    rows = list(dict.fromkeys(rows))
    sizes = {size for m in reached.all_modules() for p in m.parameters(recurse=False) for size in p.shape}
    sizes |= {size for name in batch.names if batch.holds(name) for size in batch[name].shape[1:]}
    sizes |= {size for x in batch.covariates.values() for size in x.shape[1:]}
    number = next(n for n in range(max(3, len(rows)), 10**6) if n not in sizes)
    rows += [i for i in range(min(number, batch.size)) if i not in rows][: number - len(rows)]
    device = reached.device()
    selected = _rows_on(batch, rows, device)
    if guide_batch is None or guide_batch is batch:
        return selected, selected
    return selected, _rows_on(guide_batch, rows, device)


def _rows_with_padding(batch: Batch, name: str) -> list[int]:
    """Return the longest sequence of a modality, and two that are padded, among the rows that have it."""
    lengths = batch.lengths[name]
    padded = batch.present[name].to(lengths.device) & (lengths < batch[name].shape[1])
    longest = torch.where(batch.present[name].to(lengths.device), lengths, -1).argmax()
    return [int(longest), *padded.nonzero()[:2, 0].tolist()]


def _rows_on(batch: Batch, rows: list[int], device: torch.device | None) -> Batch:
    selected = batch[torch.tensor(rows, device=batch.device)].standalone()
    return selected if device is None or device == selected.device else selected.to(device)
