"""The source of minibatches for rows in memory or in files, for loaders, and for streams."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader

from ..batch.batch import Batch
from ..batch.stream import Stream
from .loader import MinibatchLoader
from .stream_loader import StreamLoader

TrainingRows: TypeAlias = Batch | DataLoader[Any] | Stream


def make_loader(
    data: TrainingRows,
    batch_size: int,
    device: torch.device,
    *,
    resident: bool | None = None,
    workers: int = 0,
    drop_last: bool | None = None,
    shard: tuple[int, int] | None = None,
    shuffles: bool = True,
) -> MinibatchLoader:
    """Return the source of minibatches of a training, or of its validation.

    Args:
        data: rows, a loader of batches, or a stream.
        batch_size, device, resident, workers, drop_last, shard: as for
            :class:`~pyro_mm.training.loader.MinibatchLoader`.
        shuffles: False for the order of a stream's source.

    Raises:
        ValueError: no rows; an option that such data do not have; or shards without a minibatch.
    """
    if not isinstance(data, Stream):
        return MinibatchLoader(data, batch_size, device, resident, workers, drop_last, shard)
    if resident:
        raise ValueError("resident=True keeps all rows on the device, which a stream does not hold: leave resident out")
    return StreamLoader(data, batch_size, device, workers, drop_last, shard, shuffles)
