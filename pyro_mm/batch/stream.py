"""Rows that are gone through one after the other, of a source that no memory holds."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..utils.arguments import check_function, check_integer, describe
from .batch import Batch
from .joining import check_same_columns, join_rows
from .shuffle_buffer import Row, ShuffleBuffer

WANTED = "a function that returns rows one by one, or an iterable that can be gone through again and again"


class Stream:
    """N rows from a source that is gone through one row after the other, once in every epoch.

    Args:
        source: a function without arguments that returns rows one by one, such as a generator function; or an iterable
            that can be gone through again and again, such as a ``torch.utils.data.IterableDataset``. A row is a mapping
            from each modality to its value, ``None`` for a missing one. A source may give a :class:`~pyro_mm.Batch` of
            rows at a time instead, with covariates and lengths. One with ``set_epoch`` is given the epoch's number.
        size: N, to which the plate ``"data"`` is sized. None takes the length of a source of single rows that has one,
            and else counts the rows, by going through them once.
        buffer: rows among which each is drawn, in a training, so that the order differs from epoch to epoch; 1 keeps
            the order of the source. The state of torch's generator decides it. With a buffer of all rows every order
            is equally likely; a smaller one does not mix rows that lie far apart, as in a source sorted by class.
        collate: a list of rows -> :class:`~pyro_mm.Batch`, of a source whose rows are anything else, such as bytes to
            decode. Workers and processes share out this work, while each goes through the whole source.

    Raises:
        TypeError: a source that cannot be gone through again, or that has another place in :func:`~pyro_mm.fit`.
        ValueError: ``size`` or ``buffer`` below 1.

    Example:
        >>> def rows():
        ...     for i in range(10):
        ...         yield {"image": torch.full((2, 2), float(i)), "label": i % 3 if i else None}
        >>> stream = Stream(rows, size=10)
        >>> [batch.size for batch in stream.batches(4)]
        [4, 4, 2]
        >>> stream.head(3)
        Batch(size=3, image(2, 2) present: all, label() present: 67%)
    """

    def __init__(
        self,
        source: Callable[[], Iterable[Any]] | Iterable[Any],
        size: int | None = None,
        *,
        buffer: int = 1000,
        collate: Callable[[list[Any]], Batch] | None = None,
    ):
        _check_source(source)
        self.source = source
        self.buffer = check_integer("buffer", buffer, least=1)
        self.collate = None if collate is None else check_function("collate", collate, ("rows",))
        self._size = None if size is None else check_integer("size", size, least=1)
        self._fillers: dict[str, Any] = {}

    def __repr__(self) -> str:
        size = "not counted yet" if self._size is None else self._size
        return f"Stream(size={size}, buffer={self.buffer})"

    @property
    def size(self) -> int:
        """The number of rows N, counted at the first use if it was not given.

        Raises:
            ValueError: there are none.
        """
        if self._size is None:
            self._size = self._count()
        return self._size

    def __len__(self) -> int:
        return self.size

    def _count(self) -> int:
        with torch.random.fork_rng(devices=[]):
            first = next(self.rows(), None)
            if first is None:
                raise ValueError(f"expected a source of one row at least, got none from {describe(self.source)}")
            if not isinstance(first.item, Batch) and hasattr(self.source, "__len__"):
                return len(self.source)  # type: ignore[arg-type]
            return sum(1 for _ in self.rows())

    def head(self, n: int) -> Batch:
        """Return the first n rows of the source, or all of fewer, without effect on later passes.

        Raises:
            ValueError: there are none.
        """
        n = check_integer("n", n, least=1)
        with torch.random.fork_rng(devices=[]):
            rows = list(islice(self.rows(), n))
        if not rows:
            raise ValueError(f"expected a source of one row at least, got none from {describe(self.source)}")
        return self.batch_of(rows)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield all rows in batches, in the order of the source.

        Args:
            batch_size: rows of a batch; the last one may have fewer.
        """
        batch_size = check_integer("batch_size", batch_size, least=1)
        rows = self.rows()
        while chosen := list(islice(rows, batch_size)):
            yield self.batch_of(chosen)

    # -- for loaders ----------------------------------------------------------------------------------------------

    def rows(self, epoch: int = 0, seed: int | None = None) -> Iterator[Row]:
        """Yield the rows of an epoch.

        Args:
            epoch: its number, counted from 0, for a source with ``set_epoch``.
            seed: seed of their order; None keeps that of the source.
        """
        rows = self._rows_of_source(epoch)
        if seed is not None and self.buffer > 1:
            rows = ShuffleBuffer(self.buffer, seed).shuffle(rows)
        return rows

    def batch_of(self, rows: Sequence[Row]) -> Batch:
        """Return rows as a batch.

        Raises:
            TypeError, ValueError: rows that make no batch together, or a ``collate`` that makes another one.
        """
        items = [row.item for row in rows]
        if self.collate is not None:
            return self._check_collated(self.collate(items), len(items))
        if isinstance(items[0], Batch):
            return join_rows([(row.item, row.place) for row in rows])
        values: dict[str, Any] = {}
        present: dict[str, Any] = {}
        for name in items[0]:
            column = [item[name] for item in items]
            example = next((value for value in column if value is not None), None)
            if example is not None:
                self._fillers[name] = example
                values[name] = _stack(column)
            elif name in self._fillers:  # so that batches of all rows have one form
                values[name] = _stack([self._fillers[name]] * len(column))
                present[name] = torch.zeros(len(column), dtype=torch.bool)
            else:
                values[name] = None
        return Batch(values, present)

    def _check_collated(self, batch: Any, rows: int) -> Batch:
        if not isinstance(batch, Batch):
            raise TypeError(f"expected collate to return a pyro_mm.Batch of the rows, got {describe(batch)} from it")
        if batch.size != rows:
            raise ValueError(f"collate made a batch of {batch.size} rows out of {rows}: return one row for each")
        return batch

    def _rows_of_source(self, epoch: int) -> Iterator[Row]:
        number = 0
        first: Any = None
        for item in _open(self.source, epoch):
            if self.collate is not None:
                yield Row(number, item)
                number += 1
                continue
            if first is None:
                first = item
            _check_item(item, first, number)
            if isinstance(item, Batch):
                yield from (Row(number + place, item, place) for place in range(item.size))
                number += item.size
            else:
                yield Row(number, item)
                number += 1


def _check_source(source: Any) -> None:
    """Raise a TypeError for a source that cannot be gone through again and again."""
    hint = ""
    if isinstance(source, Batch):
        hint = ": fit takes the batch itself"
    elif isinstance(source, Mapping | Tensor | np.ndarray):
        hint = ": make a pyro_mm.Batch of it, of a numpy.memmap too"
    elif isinstance(source, Iterator):
        hint = ", which is over after one epoch: give the function that makes it, not its result"
    elif isinstance(source, type):
        hint = ": make an object of it"
    elif isinstance(source, Dataset) and not isinstance(source, Iterable):
        hint = ": a map-style dataset goes into a DataLoader, which can shuffle all its rows"
    elif isinstance(source, Iterable) and not isinstance(source, str | bytes):
        return
    elif callable(source) and not isinstance(source, torch.nn.Module):
        _check_no_arguments(source)
        return
    raise TypeError(f"expected source to be {WANTED}, got {describe(source)}{hint}")


def _check_no_arguments(source: Callable[..., Any]) -> None:
    try:
        inspect.signature(source).bind()
    except ValueError:  # it does not say
        return
    except TypeError as error:
        raise TypeError(
            f"expected source to be a function without arguments, got {describe(source)} ({error}): wrap it in a "
            "lambda, or in functools.partial"
        ) from error


def _open(source: Any, epoch: int) -> Iterator[Any]:
    """Return the items of a source, from the first one on."""
    if callable(getattr(source, "set_epoch", None)):
        source.set_epoch(epoch)
    if isinstance(source, Iterable):
        return iter(source)
    items = source()
    if not isinstance(items, Iterable) or isinstance(items, str | bytes | Mapping | Batch | Tensor | np.ndarray):
        raise TypeError(f"expected source() to give rows one by one, got {describe(items)} from it: yield each row")
    return iter(items)


def _check_item(item: Any, first: Any, number: int) -> None:
    """Raise a TypeError or a ValueError unless an item of a source is of the kind of its first one.

    Args:
        item: what the source gave.
        first: its first item.
        number: rows before it.
    """
    wanted = "expected the source to give rows, mappings from a modality to its value, or batches"
    if not isinstance(item, Batch | Mapping):
        raise TypeError(f"{wanted}, got {describe(item)} as row {number}: make it one, or pass collate=")
    if isinstance(item, Batch) != isinstance(first, Batch):
        raise TypeError(f"{wanted}, got both: row {number} comes as {describe(item)}")
    if isinstance(item, Batch):
        check_same_columns(first, item)
    elif item.keys() != first.keys():
        raise ValueError(
            f"row {number} of the source has the modalities {', '.join(map(str, item)) or 'none'}, and the first one "
            f"{', '.join(map(str, first)) or 'none'}: give None for one that a row lacks"
        )


def _stack(column: list[Any]) -> Any:
    """Return the values of rows as one array, if that is fast; else as they are."""
    kinds = {type(value) for value in column}
    if kinds == {Tensor} and len({(value.shape, value.dtype) for value in column}) == 1:
        return torch.stack(column)
    if kinds == {np.ndarray} and len({(value.shape, value.dtype) for value in column}) == 1:
        return np.stack(column)
    return column
