"""Blocks of rows and particles that several processes share out, with the numbers of a single process.

A block of rows is one process's, or all processes weigh its particles together, block by block of draws: each draws and
weighs some of the blocks, and gets the log-weights of all of them in their order. Which of the two does not show in a
result, since every block of draws has a seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..scoring.evaluation import move_tensors
from ..scoring.program import Program
from ..utils.sharing import share_units, sharing
from .class_weights import ClassWeights
from .particle_sampler import ParticleSampler
from .weighted import ImportanceSampling, WeightedBlock, row_block, weighted_blocks

Result = TypeVar("Result")
Unit = TypeVar("Unit")


class SharedBlock(NamedTuple):
    """A block of rows.

    Attributes:
        first: the number of its first row.
        rows: the rows that are scored.
        shown: the same rows as the guide sees them.
    """

    first: int
    rows: Batch
    shown: Batch


def share_blocks(
    model: Program,
    guide: Program,
    batch: Batch,
    shown: Batch,
    settings: ImportanceSampling,
    compute: Callable[[SharedBlock], Result],
) -> list[Result]:
    """Return the results of a function for blocks of rows, whose work the processes at hand share out.

    Args:
        model, guide: callables of a batch.
        batch: N rows, which are scored.
        shown: the same rows as the guide sees them.
        settings: K, the proposal, the seed and the sizes of blocks.
        compute: the function, which takes its log-weights from :func:`shared_weights`.

    Returns:
        The results of all blocks in every process, with tensors on the device of the rows.
    """
    most = settings.rows_at_once(model, guide, shown)

    def compute_block(first: int) -> Result:
        rows = row_block(batch, first, most)
        return compute(SharedBlock(first, rows, rows if shown is batch else row_block(shown, first, most)))

    firsts = range(0, batch.size, most)
    world = sharing().world
    splits = settings.num_blocks(batch.size - firsts[-1], batch.device) >= world  # the last block has the fewest
    num_whole = len(firsts) // world * world if splits else len(firsts)
    results = share_tensors(firsts[:num_whole], compute_block, batch.device)
    return results + [compute_block(first) for first in firsts[num_whole:]]


def share_tensors(units: range, compute: Callable[[int], Result], device: torch.device) -> list[Result]:
    """Return the results of a function for some units, each computed by one process, with tensors on a device."""
    if sharing().world == 1:
        return share_units(units, compute)
    cpu = torch.device("cpu")
    results = share_units(units, lambda unit: move_tensors(compute(unit), cpu))
    return [move_tensors(result, device) for result in results]


def shared_weights(
    model: Program,
    guide: Program,
    batch: Batch,
    settings: ImportanceSampling,
    guide_batch: Batch,
    classes: ClassWeights | None = None,
) -> Iterator[tuple[Tensor, ParticleSampler, bool]]:
    """Draw and weigh particles, by all processes at hand together.

    Args:
        model, guide, batch, settings, guide_batch, classes: as for
            :func:`~pyro_mm.sampling.weighted.weighted_blocks`.

    Yields:
        For every block of particles, in every process: log-weights ``(k, N)``, or ``(C, k, N)``; the sampler; and True
        if rows share draws of a global latent.
    """
    processes = sharing()
    shard = (processes.rank, processes.world)
    own = weighted_blocks(model, guide, batch, settings, guide_batch, classes, shard)
    if processes.world == 1:
        for block in own:
            yield block.log_weights, block.sampler, bool(block.pair.views.given_latents)
        return

    latest: WeightedBlock | None = None

    def take() -> Tensor | None:
        nonlocal latest
        block = next(own, None)
        if block is None:
            return None
        latest = block
        return block.log_weights.cpu()

    for _ in range(0, settings.num_blocks(batch.size, batch.device), processes.world):
        for log_weights in processes.gather_results(take):
            if log_weights is not None and latest is not None:
                yield log_weights.to(batch.device), latest.sampler, bool(latest.pair.views.given_latents)
