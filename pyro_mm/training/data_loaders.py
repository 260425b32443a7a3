"""PyTorch's ``DataLoader`` as a source of minibatches: its rows, its generators, and its shares for processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from ..batch.batch import Batch


def shard_loader(data: DataLoader[Any], rank: int, world: int) -> DataLoader[Any]:
    """Return a loader of the rows of one of several processes, made alike.

    Args:
        data: a loader of all rows; one whose sampler is a ``DistributedSampler`` is returned as it is.
        rank: the number of the process.
        world: the number of processes.

    Raises:
        ValueError: its sampler, or its dataset, cannot be shared out.
    """
    if isinstance(data.sampler, DistributedSampler):
        return data
    standard = type(data.sampler) in (RandomSampler, SequentialSampler) and type(data.batch_sampler) is BatchSampler
    if isinstance(data.dataset, IterableDataset) or not standard:
        raise ValueError(
            f"the rows of this loader cannot be shared out among {world} processes: give it a map-style dataset, and "
            "torch.utils.data.DistributedSampler as its sampler, or make a pyro_mm.Stream of an iterable one"
        )
    shuffle = isinstance(data.sampler, RandomSampler)
    sampler: Any = DistributedSampler(data.dataset, world, rank, shuffle=shuffle, drop_last=data.drop_last)
    return DataLoader(
        data.dataset,
        batch_size=data.batch_size,
        sampler=sampler,
        num_workers=data.num_workers,
        collate_fn=data.collate_fn,
        pin_memory=data.pin_memory,
        drop_last=data.drop_last,
        timeout=data.timeout,
        worker_init_fn=data.worker_init_fn,
        multiprocessing_context=data.multiprocessing_context,
        prefetch_factor=data.prefetch_factor,
        persistent_workers=data.persistent_workers,
    )


def set_epoch(data: DataLoader[Any], number: int) -> None:
    """Give the number of the epoch to samplers and datasets that shuffle by it."""
    batches = data.batch_sampler
    for holder in (data.sampler, batches, getattr(batches, "sampler", None), data.dataset):
        if callable(getattr(holder, "set_epoch", None)):
            holder.set_epoch(number)  # type: ignore[union-attr]


def generators_of(data: Any) -> list[torch.Generator]:
    """Return the generators that a loader, its samplers and its dataset hold; none for rows in a batch."""
    if not isinstance(data, DataLoader):
        return []
    batches = data.batch_sampler
    holders = [data, data.sampler, batches, getattr(batches, "sampler", None), data.dataset]
    found = [value for held in holders for value in getattr(held, "__dict__", {}).values()]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


@contextmanager
def preserve_generators(data: Any) -> Iterator[None]:
    """Restore a loader's own generators afterwards."""
    generators = generators_of(data)
    states = [g.get_state() for g in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def rows_of(loader: DataLoader[Any]) -> int:
    """Return the number of rows that a loader gives in an epoch, by its samplers, without loading them.

    Raises:
        TypeError: neither its sampler nor its dataset has a length.
    """
    if (sizes := minibatch_sizes(loader)) is not None:
        return sum(sizes)
    batches: Any = loader.batch_sampler
    sampler = getattr(batches, "sampler", loader.sampler)
    if loader.batch_size is None and not hasattr(batches, "sampler"):
        sampler = loader.dataset  # a batch sampler of the user's own, or items that are batches already
    for sized in (sampler, loader.dataset):
        try:
            return len(sized)  # type: ignore[arg-type]
        except TypeError:
            continue
    raise TypeError(
        "expected a loader whose sampler or dataset has a length, to which the data plate is sized: give it one, or "
        "pyro_mm.Stream(dataset, size=..) in the place of the loader"
    )


def minibatch_sizes(data: Batch | DataLoader[Any]) -> list[int] | None:
    """Return the rows of every minibatch, where a loader has a list of them or of their rows; else None."""
    if isinstance(data, Batch):
        return None
    batches: Any = data.batch_sampler
    items: Any = data.dataset
    if isinstance(batches, Sequence):
        return [len(rows) for rows in batches]
    if data.batch_size is None and batches is None and isinstance(items, list | tuple):
        return [x.size for x in items] if all(isinstance(x, Batch) for x in items) else None
    return None
