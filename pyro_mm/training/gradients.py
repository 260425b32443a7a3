"""Steps of an optimiser on gradients that are accumulated over minibatches, summed over processes and clipped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.processes import Processes
from ..utils.shared_rows import share_rows
from .loader import MinibatchLoader
from .step import Update
from .updates import StepValues, UpdateSequence


class GradientSequence(UpdateSequence):
    r"""The updates of a training, whose optimisers step on accumulated and clipped gradients.

    Of minibatches of :math:`b_1, .., b_k` rows with gradients :math:`g_i` per row, an optimiser sees
    :math:`\sum_i b_i g_i / \sum_i b_i`, as of one minibatch of them all. The last minibatch of an epoch ends a group,
    so that no epoch goes on with gradients of the one before. Minibatches of several processes count likewise.

    Args:
        updates: as for :class:`UpdateSequence`.
        loader: the source of the minibatches.
        accumulate: minibatches per step of the optimisers, k.
        clip_norm: the largest norm of the gradient of an update; None leaves it as it is.
        processes: the processes that take each step together.
        names: the modalities.
        options: those of :class:`UpdateSequence`.

    Attributes:
        votes: flags of this process, which go to all with its gradients: it is to stop; it was interrupted.
        agreed: True for each flag that some process had at the latest step of the optimisers.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        loader: MinibatchLoader,
        *,
        accumulate: int = 1,
        clip_norm: float | None = None,
        processes: Processes | None = None,
        names: tuple[str, ...] = (),
        **options: Any,
    ):
        self.processes = processes or Processes()
        self.accumulate = accumulate
        self.votes = (False, False)
        self.agreed = (False, False)
        self.minibatch_rows = 0
        self._loader = loader
        self._minibatches = loader.known_length()
        self._gathers = any(update.loss.objective.gathers_rows(names) for update in updates)
        self.gradients = [GradientGroup(update, self, clip_norm) for update in updates]
        for group in self.gradients:
            if accumulate > 1 or clip_norm is not None or self.processes.world > 1:
                group.update.reduce_gradients = group
        super().__init__(updates, loader, **options)

    def __call__(self, batch: Batch) -> list[StepValues | None]:
        self.minibatch_rows = self._loader.count(batch)
        with share_rows(self.processes, self.minibatch_rows, self._gathers):
            return super().__call__(batch)

    @property
    def is_due(self) -> bool:
        """True if the optimisers step on the minibatch at hand."""
        return self.was_due(self.steps)

    def was_due(self, step: int) -> bool:
        """Return True if the optimisers step at a step of this number, counted from 0."""
        number = step + 1
        if self._minibatches is not None:
            number = step % self._minibatches + 1
        return number % self.accumulate == 0 or number == self._minibatches

    def due_steps(self, steps: int) -> int:
        """Return the number of steps of the optimisers among the first ``steps`` minibatches."""
        if self._minibatches is None:
            return steps // self.accumulate
        epochs, rest = divmod(steps, self._minibatches)
        return epochs * -(-self._minibatches // self.accumulate) + rest // self.accumulate

    @property
    def state_tensors(self) -> list[Tensor]:
        """Sums of gradients between two steps of the optimisers, to be saved and restored."""
        return [t for group in self.gradients for t in group.state_tensors] if self.accumulate > 1 else []


class GradientGroup:
    """Gradients of one update between two steps of its optimiser.

    Args:
        update: the update.
        sequence: knows the number of rows, and the steps at which the optimiser steps.
        clip_norm: the largest norm of the gradient; None leaves it as it is.
    """

    def __init__(self, update: Update, sequence: GradientSequence, clip_norm: float | None):
        self.update = update
        self._sequence = sequence
        self._clip_norm = clip_norm
        self._targets = update.targets
        self._sums: list[Tensor] = []
        self._found = torch.zeros(len(self._targets), dtype=torch.bool)
        self._rows = torch.zeros((), dtype=torch.float64)

    @property
    def state_tensors(self) -> list[Tensor]:
        """The sums, per parameter; the parameters that have one; and the rows in them."""
        if not self._sums:
            self._sums = [torch.zeros_like(p.detach()) for p in self._targets]
        return [*self._sums, self._found, self._rows]

    @torch.no_grad()
    def __call__(self, gradients: list[Tensor]) -> None:
        """Replace the parameters' gradients by those that the optimiser is to see: none, if it is not due."""
        if any(g.is_sparse for g in gradients):
            raise ValueError(
                "a parameter has a sparse gradient, which is neither accumulated nor clipped nor summed over "
                "processes: leave out accumulate, clip_norm and devices, or make the module with sparse=False"
            )
        if self._sequence.accumulate > 1 or self._sequence.processes.world > 1:
            self._accumulate()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([p for p in self._targets if p.grad is not None], self._clip_norm)

    def _accumulate(self) -> None:
        sums = self.state_tensors[: len(self._targets)]
        rows = self._sequence.minibatch_rows
        for place, p in enumerate(self._targets):
            if p.grad is not None:
                sums[place].add_(p.grad, alpha=rows)
                self._found[place] = True
        self._rows += rows
        if not self._sequence.is_due:
            for p in self._targets:
                p.grad = None  # without gradients an optimiser leaves parameters and moments as they are
            return

        if self._sequence.processes.world > 1:
            self._sum_over_processes(sums)
        for place, p in enumerate(self._targets):
            p.grad = sums[place] / float(self._rows) if self._found[place] else None
        for total in sums:
            total.zero_()
        self._found.zero_()
        self._rows.zero_()

    def _sum_over_processes(self, sums: list[Tensor]) -> None:
        """Sum gradients and rows over all processes; a parameter has a gradient if it has one in some of them."""
        sequence = self._sequence
        counts = torch.cat([self._rows[None], self._rows.new_tensor(sequence.votes), self._found])
        sequence.processes.sum_(counts)
        self._rows.copy_(counts[0])
        stop, interrupt = (counts[1:3] > 0).tolist()
        sequence.agreed = (stop, interrupt)
        self._found.copy_(counts[3:] > 0)
        by_kind: dict[tuple[Any, ...], list[Tensor]] = {}
        for total in sums:
            by_kind.setdefault((total.dtype, total.device), []).append(total)
        for totals in by_kind.values():
            flat = sequence.processes.sum_(torch.cat([total.flatten() for total in totals]))
            for total, part in zip(totals, flat.split([total.numel() for total in totals]), strict=True):
                total.copy_(part.view(total.shape))
