"""Minibatches of data that are on the device, that are not, or that come from a loader."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .batch import Batch

SHARE = 0.5  # of a GPU's free memory that data may take


class Feed:
    """The rows of a data set, an epoch at a time, in minibatches drawn without replacement.

    Rows that fit stay on the device as one batch and are shuffled by index. Others stay where they are, and are
    fetched by a ``DataLoader`` of their own, from pinned memory on the way to a GPU. Both give the same minibatches
    under one seed on a CPU.

    Args:
        data: rows, or a ``DataLoader`` whose items are batches and whose dataset has a length.
        batch_size: rows of a minibatch; a loader has its own.
        device: where the minibatches go.
        resident: whether the rows live on the device; None decides by their size.
        workers: processes that fetch rows which do not.
    """

    def __init__(
        self,
        data: Batch | DataLoader[Any],
        batch_size: int,
        device: torch.device,
        resident: bool | None = None,
        workers: int = 0,
    ):
        self.device, self.workers, self.data = device, workers, data
        if isinstance(data, Batch):
            self.size, self.batch_size = data.size, min(batch_size, data.size)
            self.resident = _fits(data, device) if resident is None else resident
            if self.resident:
                self.data = data.to(device)
        else:
            try:
                self.size = len(data.dataset)  # type: ignore[arg-type]
            except TypeError as error:
                raise TypeError("a loader's dataset needs a length: the data plate is sized to it") from error
            self.batch_size = data.batch_size or getattr(data.batch_sampler, "batch_size", 0) or 0
            self.resident = False

    def __len__(self) -> int:
        return len(self.data) if isinstance(self.data, DataLoader) else math.ceil(self.size / self.batch_size)

    @property
    def ragged(self) -> bool:
        """Whether the last minibatch is a smaller one."""
        return isinstance(self.data, DataLoader) or self.size % self.batch_size > 0

    def head(self) -> Batch:
        """A few rows, to learn from what the programs look like."""
        if isinstance(self.data, Batch):
            return self.data.subsample(torch.arange(min(2, self.size), device=self.data.device)).to(self.device)
        return self._whole(next(iter(self.data)))[:2]

    def __iter__(self) -> Iterator[Batch]:
        if isinstance(self.data, DataLoader):
            yield from map(self._whole, self.data)
            return
        order = torch.randperm(self.size, device=self.data.device).split(self.batch_size)
        if self.resident:
            yield from map(self.data.subsample, order)
            return
        loader: Any = DataLoader(
            _Rows(self.data),
            batch_sampler=[index.tolist() for index in order],  # type: ignore[arg-type]
            collate_fn=_same,
            num_workers=self.workers,
            generator=torch.Generator(),  # or an epoch would take a number from the one that draws the latents
            pin_memory=self.device.type == "cuda",
        )
        for batch in loader:
            yield batch.to(self.device, non_blocking=True)

    def _whole(self, batch: Any) -> Batch:
        if not isinstance(batch, Batch):
            raise TypeError(f"expected a loader of Batch, got {type(batch).__name__}: give it a collate_fn")
        batch = batch.to(self.device, non_blocking=True)
        return batch.part_of(self.size)


class _Rows(Dataset[Batch]):
    """A batch as a dataset of which whole minibatches are fetched."""

    def __init__(self, batch: Batch):
        self.batch = batch

    def __len__(self) -> int:
        return self.batch.size

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        return self.batch.subsample(torch.as_tensor(rows, device=self.batch.device))


def _same(batch: Any) -> Any:
    return batch


def _fits(batch: Batch, device: torch.device) -> bool:
    if device.type != "cuda" or batch.device == device:
        return True
    return sum(x.nbytes for x in batch.parts()[1]) <= SHARE * torch.cuda.mem_get_info(device)[0]
