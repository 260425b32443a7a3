"""One update by gradient descent: a loss, the parameters it moves, their optimiser; and how it is run eagerly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..handlers.internals import foreach_multiply_
from ..scoring.training_objective import Loss
from ..utils.global_state import override_validation
from ..utils.shared_rows import finish_loss
from .problem import TrainingProblem


@dataclass
class Update:
    """One update of a training step: a loss, the parameters that it moves, and their optimiser.

    Attributes:
        loss: the training problem whose loss is minimised.
        parameters: the parameters to move; None for all parameters of the loss.
        optimizer: their optimiser; None leaves the gradients in the parameters.
        every: the update is made at every so many steps, the first one included.
        name: of a further player; empty for the update by the training's objective.
        reduce_gradients: called with the gradients, before the optimiser's step, to change them in place: their mean
            over several processes, say.
    """

    loss: TrainingProblem
    parameters: list[Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    every: int = 1
    reduce_gradients: Callable[[list[Tensor]], object] | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"expected every to be a number of steps, 1 or more, got {self.every}")

    @cached_property
    def targets(self) -> list[Tensor]:
        """The parameters to move."""
        return self.loss.parameters if self.parameters is None else self.parameters

    @cached_property
    def others(self) -> list[Tensor]:
        """Parameters of the loss that this update leaves as they are."""
        targets = set(map(id, self.targets))
        return [p for p in self.loss.parameters if id(p) not in targets]

    def is_due(self, step: int) -> bool:
        """Return True if the update is made at this step, counted from 0."""
        return step % self.every == 0

    def differentiate(self, batch: Batch, rows: float, step: int) -> Loss:
        """Put the gradient of the loss over ``rows`` in the place of the parameters'.

        Args:
            batch: N rows.
            rows: the number that the gradient is divided by.
            step: steps taken so far in this training.

        Returns:
            The loss, without a graph.
        """
        for p in self.targets:
            p.grad = None
        if self.loss.objective.differentiable:
            loss = self.loss.evaluate(batch, step)
            finish_loss()
            moving = [p for p in self.targets if p.requires_grad] if self.others else None
            if loss.total.requires_grad:  # unless nothing is present in these rows
                (loss.total * (1 / rows)).backward(inputs=moving)
            return Loss(loss.total.detach(), loss.by_term)

        before = [p.grad for p in self.others]
        loss = self.loss.evaluate_with_gradient(batch, step)
        for p, gradient in zip(self.others, before, strict=True):
            p.grad = gradient
        foreach_multiply_([p.grad for p in self.targets if p.grad is not None], 1 / rows)
        return loss

    def apply(self) -> None:
        """Take the optimiser's step by the gradients in the parameters."""
        if self.reduce_gradients is not None:
            self.reduce_gradients([p.grad for p in self.targets if p.grad is not None])
        if self.optimizer is not None:
            self.optimizer.step()


class EagerStep:
    """An update by running the programs.

    Its first run validates shapes and supports. Pyro's validation is off afterwards, unless ``validate``: of a batch
    of 128 rows it takes as long as the step itself.
    """

    def __init__(self, update: Update, validate: bool | None = None):
        self.update = update
        self.validate = validate
        self._is_first = True

    def check(self, batch: Batch, rows: float, step: int) -> None:
        """Take the gradient with validation, and leave the parameters as they are."""
        with override_validation(self.validate is not False):
            self.update.differentiate(batch, rows, step)

    def __call__(self, batch: Batch, rows: float, step: int) -> Loss:
        """Make the update.

        Args:
            batch: N rows.
            rows: the number that the gradient is divided by.
            step: steps taken so far in this training.
        """
        with override_validation(self._is_first if self.validate is None else self.validate):
            loss = self.update.differentiate(batch, rows, step)
        self.update.apply()
        self._is_first = False
        return loss
