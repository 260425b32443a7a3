"""The setting of a training: programs, rows, options, processes and device, before anything has been run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..batch.batch import Batch
from ..scoring.training_objective import Loss, PreparedObjective
from ..utils.arguments import describe
from ..utils.processes import Processes
from .make_loader import TrainingRows, make_loader
from .modes import networks_to_train
from .options import TrainingOptions
from .placement import Placement, training_device
from .problem import programs_of


class Setting:
    """The setting of a training, whose networks are moved to its device.

    Args:
        model, guide: callables of a batch.
        objective: as ``prepare_objective`` returns it.
        train: the rows, a loader of them, or a stream.
        options: the options of :func:`~pyro_mm.fit`.
        processes: the processes that train together, each on a part of every minibatch.

    Attributes:
        networks: the outermost modules to train.
        placement: device and precision.
        loader: the source of the minibatches.
    """

    def __init__(
        self,
        model: Callable[[Batch], Any],
        guide: Callable[[Batch], Any],
        objective: PreparedObjective,
        train: TrainingRows,
        options: TrainingOptions,
        processes: Processes,
    ):
        self.model = model
        self.guide = guide
        self.objective = objective
        self.train = train
        self.options = options
        self.processes = processes
        self.networks = networks_to_train(programs_of(objective, model, guide))
        self.placement = Placement(training_device(self.networks, options.device, model, guide), options.precision)
        for network in self.networks:
            network.to(self.placement.device)
        self.loader = make_loader(
            train,
            options.batch_size,
            self.placement.device,
            resident=options.resident,
            workers=options.workers,
            drop_last=options.drop_last,
            shard=(processes.rank, processes.world) if processes.world > 1 else None,
        )

    @property
    def device(self) -> torch.device:
        """The device of the training."""
        return self.placement.device

    @property
    def is_in_memory(self) -> bool:
        """True if the values of all rows can be looked at before the training."""
        return isinstance(self.train, Batch) and not self.train.is_stored

    def evaluate(self, batch: Batch, step: int) -> Loss:
        """Return the loss of some rows, without a graph."""
        with torch.no_grad():
            return self.objective.evaluate(self.model, self.guide, batch, step=step)

    def transform(self, batch: Batch) -> Batch:
        """Return a minibatch as the user's ``transform`` changes it.

        Raises:
            TypeError, ValueError: the transform returns something else, or other rows.
        """
        if self.options.transform is None:
            return batch
        new = self.options.transform(batch)
        if not isinstance(new, Batch):
            raise TypeError(
                f"expected transform to return a pyro_mm.Batch, got {describe(new)} from it: return "
                "batch.replaced({...})"
            )
        if new.size != batch.size or new.total != batch.total:
            raise ValueError(
                f"the transform made a batch of {new.size} rows of {new.total} out of one of {batch.size} of "
                f"{batch.total}: "
                "return batch.replaced({...}), which keeps the number and the places of the rows"
            )
        return new
