"""Minibatches of rows that are on the device, that are elsewhere, or that a ``DataLoader`` gives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..batch.batch import Batch
from .data_loaders import generators_of, minibatch_sizes, rows_of, set_epoch, shard_loader

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
        self.size = len(data.dataset) if shard is not None else rows_of(data)  # type: ignore[arg-type]
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
        if (sizes := minibatch_sizes(self.data)) is not None:
            return min(sizes)
        if not self.batch_size:
            return 0
        if self.shard is not None:
            minibatches = self._minibatches(torch.arange(self.size))
            return min(map(len, minibatches[:-1] if self._is_idle_at_the_end() else minibatches), default=1)
        rest = self.size % self.batch_size
        return rest if rest and not self.drop_last else min(self.batch_size, self.size)

    @property
    def smallest_of_all(self) -> int:
        """Rows of the smallest minibatch of all shards together; 0 if a loader does not say."""
        if self.shard is None or isinstance(self.data, DataLoader):
            return self.smallest if self.shard is None else 0
        whole = self.batch_size * self.shard[1]
        return whole if self.drop_last else self.size - (len(self) - 1) * whole

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
            index = diverse_rows(self.data)
            return self.data.subsample(index).to(self.device)
        first = next(iter(self.data), None)
        if first is None:
            raise ValueError("expected a loader of one minibatch at least, got none from it")
        part = self._as_part(first)
        return part[diverse_rows(part)]

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
            set_epoch(self.data, number)
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
            collate_fn=identity,
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


class _Rows(Dataset[Batch]):
    """A batch as a dataset from which whole minibatches are fetched."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __len__(self) -> int:
        return self.batch.size

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        return self.batch.subsample(torch.as_tensor(rows, device=self.batch.device))


def diverse_rows(batch: Batch) -> Tensor:
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


def identity(batch: Any) -> Any:
    """Return what a worker has made, as it is."""
    return batch


def _fits(batch: Batch, device: torch.device) -> bool:
    if batch.is_stored:
        return False
    if device.type != "cuda" or batch.device == device:
        return True
    return sum(x.nbytes for x in batch.parts()[1]) <= MEMORY_FRACTION * torch.cuda.mem_get_info(device)[0]
