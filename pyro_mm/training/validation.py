"""The loss of rows for validation, after every epoch and under one seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from ..batch.batch import Batch
from ..scoring.training_objective import Loss
from ..utils.processes import Processes
from ..utils.seeding import part_seed, temporary_seed
from .data_loaders import preserve_generators
from .make_loader import TrainingRows, make_loader
from .nonfinite_report import validation_check


class Validation:
    """Rows for validation, and the evaluation of their loss, whose minibatches several processes share out.

    Args:
        rows: the rows, a loader of them, or a stream, which is gone through in its own order.
        batch_size: rows of a minibatch; a loader has its own.
        device: where they are evaluated.
        autocast: makes the context of a loss.
        processes: the processes, each of which gets the loss of all rows.
    """

    def __init__(
        self,
        rows: TrainingRows,
        batch_size: int,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        processes: Processes | None = None,
    ):
        self._processes = processes or Processes()
        self._device = device
        self._autocast = autocast
        self._batch_size = batch_size
        self._loader = None if isinstance(rows, Batch) else make_loader(rows, batch_size, device, shuffles=False)
        self.rows = rows.to(device) if isinstance(rows, Batch) else None

    def head(self) -> Batch:
        """Return all rows, or a few of the first minibatch of a loader."""
        if self.rows is not None:
            return self.rows
        with temporary_seed(0, self._device), preserve_generators(self._loader.data):  # type: ignore[union-attr]
            return self._loader.head()  # type: ignore[union-attr]

    @property
    def smallest(self) -> int:
        """Rows of the smallest minibatch; 0 if a loader does not say."""
        if self.rows is None:
            return self._loader.smallest  # type: ignore[union-attr]
        return self.rows.size % self._batch_size or min(self._batch_size, self.rows.size)

    def _own_minibatches(self) -> Iterator[tuple[int, Batch]]:
        """Yield the minibatches of this process with their numbers among all."""
        rank, world = self._processes.rank, self._processes.world
        if self.rows is None:  # a loader, which every process goes through
            numbered = enumerate(self._loader)  # type: ignore[arg-type]
            yield from ((number, part) for number, part in numbered if number % world == rank)
            return
        indices = torch.arange(self.rows.size, device=self.rows.device).split(self._batch_size)
        for number in range(rank, len(indices), world):
            yield number, self.rows.subsample(indices[number])

    def loss(self, evaluate: Callable[[Batch], Loss], scales_to_data: bool, epoch: int) -> float:
        """Return the loss per row, with the same draws and, of a loader, the same order of rows after every epoch.

        Args:
            evaluate: evaluates the loss of some rows.
            scales_to_data: True if the data plate scales the loss of a subsample up to all rows.
            epoch: number of the epoch after which this is, counted from 1, for messages.

        Raises:
            NotFinite: it is NaN or infinite.
            ValueError: a loader gives no rows.
        """

        def evaluate_own() -> dict[int, tuple[float, int]]:
            found = {}
            for number, part in self._own_minibatches():
                seed = part_seed(0, number) if number else 0
                with (
                    temporary_seed(seed, self._device),
                    validation_check(part, evaluate, self._device, epoch) as check,
                ):
                    loss = float(evaluate(part).total)
                    check(loss)
                found[number] = (loss * part.size / (part.total or part.size) if scales_to_data else loss, part.size)
            return found

        source = self._loader.data if self._loader is not None else None
        with temporary_seed(0, self._device), preserve_generators(source), self._autocast():
            shares = self._processes.gather_results(evaluate_own)
        found = {number: value for share in shares for number, value in share.items()}
        if not found:
            raise ValueError("the loader of validation rows gave no minibatch: can it be gone through but once?")
        values = [found[number] for number in sorted(found)]
        return sum(loss for loss, _ in values) / sum(rows for _, rows in values)
