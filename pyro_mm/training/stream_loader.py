"""Minibatches of a stream of rows, read here or by worker processes, in one order however many share it."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..batch.batch import Batch
from ..batch.shuffle_buffer import Row
from ..batch.stream import Stream
from .loader import MinibatchLoader, diverse_rows, identity

HEAD_ROWS = 128  # of a first run and the audit
DIGEST_ROWS = 4  # by which workers find that their sources differ
WORKERS_BY = "fork" if sys.platform == "linux" else None  # so that a source may be a closure, as it may without workers


@dataclass
class StreamPart:
    """A minibatch as a reader of a stream hands it over, or at the end the number of all rows.

    Attributes:
        batch: the minibatch; None at the end.
        places: the places of its rows in the source.
        is_idle: True if the rows are another process's, with which this one takes part in the last minibatch.
        total: rows of the source; 0 before the end.
        digest: a hash of the first rows that this reader has met.
    """

    batch: Batch | None = None
    places: list[int] | None = None
    is_idle: bool = False
    total: int = 0
    digest: str = ""

    def pin_memory(self) -> StreamPart:
        """Return the part with its minibatch in pinned memory."""
        if self.batch is not None:
            self.batch = self.batch.pin_memory()
        return self


@dataclass
class StreamReader(IterableDataset[StreamPart]):
    """The minibatches of one process from one epoch of a stream; of several workers each makes its share of them.

    Every reader goes through the whole source with the same seed, and so knows the one order of all rows. Minibatches
    of all processes are consecutive rows of that order, of which process r of R takes the rows r, r + R and so on.

    Attributes:
        stream: the rows.
        batch_size: rows of a minibatch of one process.
        drop_last: True to leave out a last minibatch that is smaller.
        epoch: number of the epoch.
        seed: of the order; None for that of the source.
        rank, world: the number of the process, and of processes.
        skip: minibatches that are left out at the start.
    """

    stream: Stream
    batch_size: int
    drop_last: bool
    epoch: int
    seed: int | None
    rank: int = 0
    world: int = 1
    skip: int = 0

    def __iter__(self) -> Iterator[StreamPart]:
        return self.parts()

    def parts(self, after_skip: Callable[[], None] | None = None) -> Iterator[StreamPart]:
        """Yield the minibatches of this reader, and then the number of all rows.

        Args:
            after_skip: called after the minibatches that are left out, before a row of another one is read.
        """
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        total = 0
        digest = ""
        together = self.batch_size * self.world
        rows = self.stream.rows(self.epoch, self.seed)
        number = -self.skip
        if after_skip is not None and number == 0:
            after_skip()
        while chosen := list(islice(rows, together)):
            total += len(chosen)
            if len(chosen) < together and self.drop_last:
                continue
            if not digest and workers > 1:
                digest = self._digest(chosen)
            if number >= 0 and number % workers == worker:
                yield self._part(chosen, digest)
            number += 1
            if after_skip is not None and number == 0:
                after_skip()
        yield StreamPart(total=total, digest=digest)

    def _part(self, chosen: list[Row], digest: str) -> StreamPart:
        own = chosen[self.rank :: self.world]
        is_idle = not own
        own = own or chosen[:1]
        return StreamPart(self.stream.batch_of(own), [row.number for row in own], is_idle, digest=digest)

    def _digest(self, rows: list[Row]) -> str:
        batch = self.stream.batch_of(rows[:DIGEST_ROWS])
        found = hashlib.blake2b(digest_size=16)
        for tensor in batch.parts()[1]:
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return found.hexdigest()


class StreamLoader(MinibatchLoader):
    """Minibatches of a stream of rows, one epoch at a time, of which every row is in one.

    The order depends on the state of torch's generator alone, and not on the number of workers and processes.

    Args:
        data: the rows.
        batch_size, device, workers, drop_last, shard: as for :class:`MinibatchLoader`.
        shuffles: False for the order of the source.

    Raises:
        ValueError: no rows, or shards without a minibatch.
    """

    data: Any

    def __init__(
        self,
        data: Stream,
        batch_size: int,
        device: torch.device,
        workers: int = 0,
        drop_last: bool | None = None,
        shard: tuple[int, int] | None = None,
        shuffles: bool = True,
    ):
        self.data = data
        self.device = device
        self.workers = workers
        self.shard = shard
        self.order: torch.Generator | None = None
        self.idle: Batch | None = None
        self.size = data.size
        self.batch_size = min(batch_size, self.size)
        self.drop_last = bool(drop_last)
        self.resident = False
        self._shuffles = shuffles and data.buffer > 1
        if shard is not None:
            self._check_shard(*shard)

    @property
    def smallest(self) -> int:
        """Rows of the smallest minibatch of this process, the last one of an epoch."""
        rank, world = self.shard or (0, 1)
        groups, rest = divmod(self.size, self.batch_size * world)
        own = len(range(rank, rest, world))
        if own and not self.drop_last:
            return own
        return self.batch_size if groups else 1

    def check_rows(self, seen: int) -> None:
        """Do nothing: :meth:`epoch` checks the number of rows."""

    def head(self) -> Batch:
        """Return a few of the first rows, of every modality one row with it and one without if there are."""
        first = self.data.head(min(self.size, max(self.batch_size, HEAD_ROWS)))
        part: Batch = first.to(self.device).part_of(self.size)
        return part[diverse_rows(part)]

    def epoch(self, number: int = 0, skip: int = 0, after_skip: Callable[[], None] | None = None) -> Iterator[Batch]:
        """Yield the minibatches of an epoch; the arguments are those of :meth:`MinibatchLoader.epoch`.

        Raises:
            ValueError: the source gives another number of rows than its size; or workers meet other rows each.
        """
        seed = int(torch.randint(2**62, (), generator=self.order)) if self._shuffles else None
        rank, world = self.shard or (0, 1)
        reader = StreamReader(self.data, self.batch_size, self.drop_last, number, seed, rank, world, skip)
        count = skip
        digests: set[str] = set()
        totals: set[int] = set()
        for part in self._read(reader, after_skip):
            digests |= {part.digest} - {""}
            if len(digests) > 1:
                raise self._error_of_workers()
            if part.batch is None:
                totals.add(part.total)
            else:
                count += 1
                if count > len(self):
                    raise self._error_of_size("more than ")
                yield self._place(part)
        if len(totals) > 1:
            raise self._error_of_workers()
        if totals != {self.size}:
            raise self._error_of_size(f"{totals.pop():,} in this epoch, and not ")

    def _read(self, reader: StreamReader, after_skip: Callable[[], None] | None) -> Iterator[StreamPart]:
        """Return the minibatches of a reader, here or in workers."""
        if not self.workers:
            return reader.parts(after_skip)
        if after_skip is not None:
            after_skip()
        loader: Any = DataLoader(
            reader,
            batch_size=None,
            collate_fn=identity,
            num_workers=self.workers,
            multiprocessing_context=WORKERS_BY,
            generator=torch.Generator(),  # or an epoch would take a number from the one that draws the latents
            pin_memory=self.device.type == "cuda",
        )
        return iter(loader)

    def _place(self, part: StreamPart) -> Batch:
        """Return a minibatch on the device, as a subsample of all rows."""
        assert part.batch is not None
        batch = part.batch.to(self.device, non_blocking=True).part_of(self.size, part.places)
        if part.is_idle:
            self.idle = batch
        return batch

    def _error_of_size(self, found: str) -> ValueError:
        return ValueError(
            f"the source of the stream gave {found}the {self.size:,} rows that the data plate is sized to: pass "
            "pyro_mm.Stream(source, size=..) the number of rows of an epoch, and cut an endless source by "
            "itertools.islice. It is to give all rows in each of several processes and workers, which share them out"
        )

    def _error_of_workers(self) -> ValueError:
        return ValueError(
            f"the source of the stream gives other rows to each of {self.workers} workers, which share out one order "
            "of all rows: seed a source that draws random numbers by the epoch that its set_epoch is given, let it not "
            "share out rows by get_worker_info itself, or pass workers=1"
        )
