"""The steps of a training: a sequence of updates, eager or compiled, with the count of steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..scoring.training_objective import Loss
from .compile import CompiledStep
from .loader import MinibatchLoader
from .step import EagerStep, Update
from .tracing import isolated_run


class StepValues(NamedTuple):
    """Values of an update's loss at one step, summed over the rows of the minibatch.

    Attributes:
        labels: ``"loss"``, or the name of the player, and the label of each of T terms.
        values: the loss and the terms, ``(1 + T,)``.
    """

    labels: tuple[str, ...]
    values: Tensor


class UpdateSequence:
    """The updates that make up a training step, taken in their order on every minibatch.

    Args:
        updates: one for a usual training, or several, such as those of a generator and of a critic.
        loader: the source of the minibatches, whose sizes decide scale and padding.
        compile: True compiles every update.
        validate: True lets Pyro check shapes and supports at every step, False at none; None checks the first one.
        report: called with the reason, in a sentence, if a step cannot be compiled; None warns.

    Attributes:
        steps: steps taken so far; the ``step`` of the objectives.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        loader: MinibatchLoader,
        *,
        compile: bool = False,
        validate: bool | None = None,
        report: Callable[[str], object] | None = None,
    ):
        self.updates = list(updates)
        self.steps = 0
        self._players = [_Player(update, loader, compile, validate, report) for update in self.updates]

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters that some update moves, each once."""
        return list({id(p): p for update in self.updates for p in update.targets}.values())

    def __call__(self, batch: Batch) -> list[StepValues | None]:
        """Take a step.

        Args:
            batch: a minibatch.

        Returns:
            The values of every update; None for one that is not due at this step.
        """
        step = self.steps
        values = [player.take(batch, step) if player.update.is_due(step) else None for player in self._players]
        self.steps = step + 1
        return values

    def rows(self, update: Update, batch: Batch) -> int:
        """Return the number of rows that the loss of a batch is scaled up to."""
        (player,) = [player for player in self._players if player.update is update]
        return player.rows(batch)

    def retrace(self) -> None:
        """Forget compiled graphs, after the state of an optimiser, which a captured graph writes to, was removed."""
        for player in self._players:
            if player.compiled is not None:
                player.compiled.retrace()


class _Player:
    """One update of a sequence, with its scale, its padding, and its compiled form if there is one."""

    def __init__(
        self,
        update: Update,
        loader: MinibatchLoader,
        compile: bool,
        validate: bool | None,
        report: Callable[[str], object] | None,
    ):
        self.update = update
        self.loader = loader
        self.eager = EagerStep(update, validate)
        self.compiled = CompiledStep(update, validate=bool(validate), report=report) if compile else None
        self.pads = loader.ragged and update.loss.ignores_padding
        self._is_first = True

    def rows(self, batch: Batch) -> int:
        return self.loader.size if self.update.loss.scales_to_data else batch.size

    def take(self, batch: Batch, step: int) -> StepValues:
        """Make the update.

        Before the first update of a compiled training, a run of the programs that changes nothing checks it, so that
        all steps are compiled, also those of a resumed training.
        """
        rows = self.rows(batch)
        if self._is_first and self.compiled is not None:
            with isolated_run(self.update.loss, batch.device):
                self.eager.check(batch, rows, step)
        loss, share = self._differentiate(batch, rows, step)
        if self._is_first and self.compiled is not None and self.compiled.reasons:
            self.compiled = None
        self._is_first = False
        terms = [value.to(loss.total.device) for value in loss.by_term.values()]
        values = torch.stack([loss.total, *terms]).double()
        labels = ("loss", *loss.by_term)
        if name := self.update.name:
            labels = (name, *(f"{name} {label}" for label in loss.by_term))
        return StepValues(labels, values * (share * batch.size / rows))

    def _differentiate(self, batch: Batch, rows: int, step: int) -> tuple[Loss, float]:
        """Make the update; return the loss, and a factor that undoes the effect of padding on it."""
        if self.compiled is None:
            return self.eager(batch, rows, step), 1.0
        size = self.loader.batch_size
        if not self.pads or batch.size > size:
            return self.compiled.take(batch, rows, step), 1.0
        # the padding counts in the plate's size, so the scale of the rows in it is too small by this
        share = size / batch.size if self.update.loss.scales_to_data else 1.0
        return self.compiled.take(batch.padded(size), rows / share, step), share
