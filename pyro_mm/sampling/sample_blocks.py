"""Blocks of rows and samples, each drawn under a seed of its own, by whichever of several processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.seeding import normalize_seed, part_seed, temporary_seed
from ..utils.sharing import sharing
from .shared_blocks import share_tensors

ROWS_OF_A_BLOCK = 512
PAIRS_OF_A_BLOCK = 2**16  # (row, sample) pairs

SiteSamples = tuple[dict[str, Tensor], ...]


def sample_in_blocks(
    batch: Batch, num_samples: int, splits_rows: bool, seed: int | None, draw: Callable[[Batch, int], SiteSamples]
) -> SiteSamples:
    """Return samples of rows, from blocks of rows and samples that the processes at hand share out.

    A single block that one process draws has the seed itself; with others, each has one that is derived from it.

    Args:
        batch: N rows.
        num_samples: S.
        splits_rows: False for blocks of all rows, as where rows share draws.
        seed: of all draws; None goes on with torch's generator.
        draw: (rows, number of samples) -> dictionaries of site -> ``(s, n, ..)``; ``(s, ..)`` for one without rows.

    Returns:
        The dictionaries for all rows and samples, in every process.
    """
    if batch.is_stored and not splits_rows:
        raise ValueError(
            'this story has latents outside the plate "data", which all rows of a sample share, so that all rows are '
            "sampled at once, and those of this batch are in a file: take some rows, or read them, batch.read()"
        )
    rows_at_once = min(batch.size, ROWS_OF_A_BLOCK) if splits_rows else batch.size
    samples_at_once = max(1, PAIRS_OF_A_BLOCK // rows_at_once)
    firsts = range(0, batch.size, rows_at_once)
    sample_firsts = range(0, num_samples, samples_at_once)
    num_blocks = len(firsts) * len(sample_firsts)
    if num_blocks == 1 and sharing().world == 1:
        with temporary_seed(seed, batch.device):
            return draw(batch.read(), num_samples)

    base = sharing().broadcast(normalize_seed(seed))

    def draw_block(number: int) -> SiteSamples:
        first = firsts[number % len(firsts)]
        first_sample = sample_firsts[number // len(firsts)]
        rows = batch.read() if len(firsts) == 1 else batch.block(slice(first, first + rows_at_once))
        with temporary_seed(part_seed(base, number) if number else base, batch.device):
            return draw(rows, min(samples_at_once, num_samples - first_sample))

    blocks = share_tensors(range(num_blocks), draw_block, batch.device)
    runs = [blocks[start : start + len(firsts)] for start in range(0, num_blocks, len(firsts))]
    return _concatenate([_concatenate(run, 1) for run in runs], 0)


def _concatenate(parts: list[SiteSamples], dim: int) -> SiteSamples:
    """Concatenate samples of the same sites along a dimension."""
    if len(parts) == 1:
        return parts[0]
    return tuple(
        {name: torch.cat([part[name] for part in held], dim) for name in held[0]} for held in zip(*parts, strict=True)
    )
