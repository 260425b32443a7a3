"""Minibatches of rows that are on the device, that are elsewhere, or that a ``DataLoader`` gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from ..batch.batch import Batch

MEMORY_FRACTION = 0.5  # of a GPU's free memory that data may take


class MinibatchLoader:
    """Minibatches of a data set, drawn without replacement, one epoch at a time.

    Rows that fit stay on the device as one batch and are shuffled by index. Others stay where they are, in memory or in
    a file, and are fetched by a ``DataLoader`` of their own, from pinned memory on the way to a GPU. Both give the same
    minibatches under one seed on a CPU.

    Args:
        data: rows, or a ``DataLoader`` whose items are batches and whose sampler or dataset has a length.
        batch_size: rows of a minibatch; a loader has its own.
        device: where the minibatches go.
        resident: True keeps all rows on the device, False where they are; None decides by their size.
        workers: processes that fetch rows which do not.
        drop_last: leave out the last minibatch of an epoch if it is a smaller one; None keeps it. A loader has its own.
        shard: ``(rank, world)`` gives the rows of one of several processes, whose torch generators are in the same
            state. Together the shards are the one permutation of the unsharded loader, in equally many minibatches;
            ``drop_last`` leaves out what does not fill one in every shard. A loader's sampler is replaced by a
            ``DistributedSampler``, unless it is one.

    Attributes:
        size: number of rows that an epoch draws from: of the data, or of a loader's sampler.
        order: generator of the permutations of rows; None is torch's own, of the device of the rows.
        idle: the minibatch with which this process takes part in the last one of the others, and which does not count.

    Raises:
        ValueError: no rows; ``drop_last`` for a loader; a loader that cannot be sharded; or shards without a minibatch.
        TypeError: a loader whose sampler and dataset have no length.
    """

    def __init__(
        self,
        data: Batch | DataLoader[Any],
        batch_size: int,
        device: torch.device,
        resident: bool | None = None,
        workers: int = 0,
        drop_last: bool | None = None,
        shard: tuple[int, int] | None = None,
    ):
        self.device = device
        self.workers = workers
        self.data = data
        self.shard = shard
        self.order: torch.Generator | None = None
        self.idle: Batch | None = None
        if isinstance(data, Batch):
            if data.size == 0:
                raise ValueError("expected a batch of one row at least to train on, got one of none")
            self.size = data.size
            self.batch_size = min(batch_size, data.size)
            self.drop_last = bool(drop_last)
            self.resident = _fits(data, device) if resident is None else resident
            if self.resident:
                self.data = data.read().to(device)
            if shard is not None:
                self._check_shard(*shard)
            return
        if drop_last is not None:
            raise ValueError("expected drop_last=None for a loader, which has a drop_last of its own: pass it there")
        if shard is not None:
            self.data = data = shard_loader(data, *shard)
        self.size = len(data.dataset) if shard is not None else _rows_of(data)  # type: ignore[arg-type]
        if self.size == 0:
            raise ValueError("expected a loader of one row at least to train on, got one of none")
        self.batch_size = data.batch_size or getattr(data.batch_sampler, "batch_size", 0) or 0
        self.drop_last = bool(getattr(data.batch_sampler, "drop_last", data.drop_last))
        self.resident = False

    def _check_shard(self, rank: int, world: int) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"expected shard to be a rank and the number of processes, got {(rank, world)}")
        if len(self) == 0:
            raise ValueError(
                f"{self.size} rows cannot be shared out among {world} processes in whole minibatches of "
                f"{self.batch_size} rows: pass a smaller batch_size, or drop_last=False"
            )

    def __len__(self) -> int:
        if isinstance(self.data, DataLoader):
            return len(self.data)
        world = 1 if self.shard is None else self.shard[1]
        if self.drop_last:
            return self.size // world // self.batch_size
        return math.ceil(math.ceil(self.size / world) / self.batch_size)

    def known_length(self) -> int | None:
        """Return the number of minibatches of an epoch; None if a loader does not say, or not for certain."""
        if isinstance(self.data, DataLoader) and isinstance(self.data.dataset, IterableDataset):
            return None
        try:
            return len(self)
        except TypeError:
            return None

    @property
    def ragged(self) -> bool:
        """True if the last minibatch may be a smaller one."""
        return isinstance(self.data, DataLoader) or self.smallest < self.batch_size

    @property
    def smallest(self) -> int:
        """Rows of the smallest minibatch, the last one of an epoch; 0 if a loader does not say."""
        if (sizes := _minibatch_sizes(self.data)) is not None:
            return min(sizes)
        if not self.batch_size:
            return 0
        if self.shard is not None:
            minibatches = self._minibatches(torch.arange(self.size))
            return min(map(len, minibatches[:-1] if self._is_idle_at_the_end() else minibatches), default=1)
        rest = self.size % self.batch_size
        return rest if rest and not self.drop_last else min(self.batch_size, self.size)

    @property
    def modalities(self) -> tuple[str, ...] | None:
        """The modalities that some row has; None if that is not known."""
        if not isinstance(self.data, Batch):
            return None
        return tuple(name for name in self.data.names if self.data.presence(name) is not False)

    def check_rows(self, seen: int) -> None:
        """Raise a ValueError if an epoch gave another number of rows than the data plate was sized to.

        Args:
            seen: rows that the epoch gave. It may lack the smaller minibatch that ``drop_last`` leaves out.
        """
        if not isinstance(self.data, DataLoader) or self.shard is not None:
            return
        # of an iterable dataset every worker leaves out a rest of its own
        dropped = self.batch_size * max(1, self.data.num_workers) if self.drop_last else 1
        if not 0 <= self.size - seen < max(dropped, 1):
            raise ValueError(
                f"the loader gave {seen} rows in this epoch, where its sampler or dataset has a length of {self.size}: "
                "the data plate is sized to that, and a latent outside of it would be weighed wrong. Give the loader "
                "a sampler whose length is the number of rows of an epoch"
            )

    def head(self) -> Batch:
        """Return a few rows for a first run of the programs: of every modality one row with it and one without."""
        if isinstance(self.data, Batch):
            index = _diverse_rows(self.data)
            return self.data.subsample(index).to(self.device)
        first = next(iter(self.data), None)
        if first is None:
            raise ValueError("expected a loader of one minibatch at least, got none from it")
        part = self._as_part(first)
        return part[_diverse_rows(part)]

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch()

    def epoch(self, number: int = 0, skip: int = 0, after_skip: Callable[[], None] | None = None) -> Iterator[Batch]:
        """Yield the minibatches of an epoch.

        Args:
            number: the epoch, counted from 0, which a loader's sampler or dataset with ``set_epoch`` is given.
            skip: minibatches to leave out at its start.
            after_skip: called when all is as it was after these, and before another one is fetched.
        """
        if isinstance(self.data, DataLoader):
            _set_epoch(self.data, number)
            items = iter(self.data)
            for _ in range(skip):
                next(items, None)
            if after_skip is not None:
                after_skip()
            yield from map(self._as_part, items)
            return
        minibatches = self._minibatches(self._permutation())[skip:]
        if after_skip is not None:
            after_skip()
        is_idle = self._is_idle_at_the_end()
        for number, batch in enumerate(self._fetch(minibatches), 1):
            if is_idle and number == len(minibatches):
                self.idle = batch
            yield batch

    def _fetch(self, minibatches: list[Tensor]) -> Iterator[Batch]:
        """Yield minibatches of these rows."""
        if self.resident:
            yield from map(self.data.subsample, minibatches)  # type: ignore[union-attr]
            return
        loader: Any = DataLoader(
            _Rows(self.data),  # type: ignore[arg-type]
            batch_sampler=[index.tolist() for index in minibatches],
            collate_fn=_identity,
            num_workers=self.workers,
            generator=torch.Generator(),  # or an epoch would take a number from the one that draws the latents
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            yield batch.to(self.device, non_blocking=True)

    @property
    def generators(self) -> list[torch.Generator]:
        """The generators that decide the order of rows, apart from torch's own: that of permutations, or a loader's."""
        return generators_of(self.data) if self.order is None else [self.order]

    def _permutation(self) -> Tensor:
        return torch.randperm(self.size, device=self.data.device, generator=self.order)  # type: ignore[union-attr]

    def _minibatches(self, order: Tensor) -> list[Tensor]:
        """Return the rows of every minibatch of this shard, from a permutation of all rows."""
        if self.shard is None:
            return list(order.split(self.batch_size)[: len(self)])
        return self._shard_minibatches(order, *self.shard)

    def _shard_minibatches(self, order: Tensor, rank: int, world: int) -> list[Tensor]:
        minibatches = list(order[rank::world].split(self.batch_size)[: len(self)])
        minibatches = [rows for rows in minibatches if len(rows)]
        if len(minibatches) < len(self):  # the others have one more, of one row each
            minibatches.append(order[:1])
        return minibatches

    def _is_idle_at_the_end(self) -> bool:
        """Return True if this shard has no rows for the last minibatch of the others."""
        if self.shard is None or isinstance(self.data, DataLoader):
            return False
        rank, world = self.shard
        own = len(range(rank, self.size, world))
        return math.ceil(own / self.batch_size) < len(self)

    def count(self, batch: Batch) -> int:
        """Return the rows of a minibatch; none of one that a process takes part in without rows of its own."""
        return 0 if batch is self.idle else batch.size

    def _as_part(self, batch: Any) -> Batch:
        """Return a minibatch of the loader, on the device, as a subsample of all rows."""
        if not isinstance(batch, Batch):
            raise TypeError(f"expected a loader of Batch, got {type(batch).__name__}: give it a collate_fn")
        if batch.size == 0:
            raise ValueError("expected minibatches of one row at least, got one of none from the loader")
        part: Batch = batch.to(self.device, non_blocking=True).part_of(self.size)
        return part


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
            "torch.utils.data.DistributedSampler as its sampler"
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


def _set_epoch(data: DataLoader[Any], number: int) -> None:
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


class _Rows(Dataset[Batch]):
    """A batch as a dataset from which whole minibatches are fetched."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __len__(self) -> int:
        return self.batch.size

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        return self.batch.subsample(torch.as_tensor(rows, device=self.batch.device))


def _rows_of(loader: DataLoader[Any]) -> int:
    """Return the number of rows that a loader gives in an epoch, by its samplers, without loading them.

    Raises:
        TypeError: neither its sampler nor its dataset has a length.
    """
    if (sizes := _minibatch_sizes(loader)) is not None:
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
    raise TypeError("expected a loader whose sampler or dataset has a length: the data plate is sized to it")


def _minibatch_sizes(data: Batch | DataLoader[Any]) -> list[int] | None:
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


def _diverse_rows(batch: Batch) -> Tensor:
    """Return the first two rows, and for every modality that some rows lack the first row with and the first without.

    So a run on them reaches modules that only such rows use, such as the expert of a rare modality.
    """
    rows = [torch.arange(min(2, batch.size), device=batch.device)]
    for name in batch.names:
        mask = batch.presence(name)
        if isinstance(mask, Tensor):
            rows.append(torch.stack([mask.byte().argmax(), mask.byte().argmin()]))
    diverse: Tensor = torch.cat(rows).unique()
    return diverse


def _identity(batch: Any) -> Any:
    return batch


def _fits(batch: Batch, device: torch.device) -> bool:
    if batch.is_stored:
        return False
    if device.type != "cuda" or batch.device == device:
        return True
    return sum(x.nbytes for x in batch.parts()[1]) <= MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
