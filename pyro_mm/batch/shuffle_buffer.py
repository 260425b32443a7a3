"""A shuffle buffer: rows in an order that is random within a window, and that a seed decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch

from .batch import Batch
from .joining import join_rows

DRAWS = 4096  # places that are drawn at once


class Row(NamedTuple):
    """One row of a stream.

    Attributes:
        number: its place in the source, from 0.
        item: what the source gave: the row itself, or a batch that has it.
        place: the place of the row in the batch; 0 for a row itself.
    """

    number: int
    item: Any
    place: int = 0


class ShuffleBuffer:
    """A buffer that gives a random one of the rows that it holds for every row that it takes.

    A row comes at most ``size - 1`` places before its place in the source, and with probability
    :math:`(1 - 1/size)^k` k or more places behind the earliest one.

    Args:
        size: rows that it holds, at most twice as many for a moment; of batches their other rows too, until these are
            as many again.
        seed: seed of the order.
    """

    def __init__(self, size: int, seed: int):
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._held: list[Row] = []
        self._live: Counter[int] = Counter()  # identity of a batch -> its rows in the buffer
        self._batches: dict[int, Batch] = {}
        self._batch_rows = 0  # rows of these batches, whether they are in the buffer or not

    def shuffle(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yield the rows of a source, each once."""
        for row in islice(rows, self._size):
            self._held.append(row)
            self._count(row, 1)
        draws = self._draw()
        for row in rows:
            place = next(draws)
            leaving = self._held[place]
            self._count(leaving, -1)
            self._held[place] = row
            self._count(row, 1)
            yield leaving
        order = torch.randperm(len(self._held), generator=self._generator).tolist()
        yield from (self._held[place] for place in order)

    def _draw(self) -> Iterator[int]:
        while True:
            yield from torch.randint(len(self._held), (DRAWS,), generator=self._generator).tolist()

    def _count(self, row: Row, change: int) -> None:
        """Count the rows of a batch that the buffer holds, and copy rows out of batches most of which it does not."""
        if not isinstance(row.item, Batch):
            return
        key = id(row.item)
        self._live[key] += change
        if self._live[key] == 0:
            self._batch_rows -= self._batches.pop(key).size
            del self._live[key]
        elif key not in self._batches:
            self._batches[key] = row.item
            self._batch_rows += row.item.size
            if self._batch_rows > 2 * (self._size + row.item.size):
                self._compact()

    def _compact(self) -> None:
        """Copy the rows that the buffer holds into one batch, so that those that have left take no memory."""
        own = join_rows([(row.item, row.place) for row in self._held])
        self._held = [Row(row.number, own, place) for place, row in enumerate(self._held)]
        self._batches = {id(own): own}
        self._batch_rows = own.size
        self._live = Counter({id(own): len(self._held)})
