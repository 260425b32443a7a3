"""A copy of parameters, buffers and optimisers' moments that a training can return to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..handlers.internals import foreach_copy_
from .step import Update


class TrainingState:
    """A copy of the parameters, buffers and moments of some updates.

    Args:
        updates: the updates of a training.
        others: further tensors that its steps change.
    """

    def __init__(self, updates: Sequence[Update], others: Sequence[Tensor] = ()):
        self._updates = updates
        self._others = others
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._numbers: list[tuple[dict[str, Any], str, Any]] = []
        self._with_moments: set[tuple[int, int]] = set()

    @torch.no_grad()
    def save(self) -> None:
        """Copy the present values, in the place of earlier copies."""
        tensors: dict[int, Tensor] = {id(t): t for t in self._others}
        self._numbers = []
        self._with_moments = set()
        for number, update in enumerate(self._updates):
            tensors |= {id(t): t.detach() for t in (*update.loss.parameters, *update.targets)}
            tensors |= {id(b): b for m in update.loss.networks for b in m.buffers()}
            if update.optimizer is None:
                continue
            for p, moments in update.optimizer.state.items():
                self._with_moments.add((number, id(p)))
                for key, value in moments.items():
                    if isinstance(value, Tensor):
                        tensors[id(value)] = value
                    elif isinstance(value, bool | int | float):
                        self._numbers.append((moments, key, value))

        found = list(tensors.values())
        if list(map(_memory_layout, found)) == list(map(_memory_layout, self._tensors)):
            foreach_copy_(self._copies, found)
        else:
            self._copies = [t.clone() for t in found]
        self._tensors = found

    @torch.no_grad()
    def restore(self) -> bool:
        """Put the copies back.

        Returns:
            True if moments have come into being since, which are removed.
        """
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
        for moments, key, value in self._numbers:
            moments[key] = value
        removed = False
        for number, update in enumerate(self._updates):
            if update.optimizer is None:
                continue
            new = [p for p in update.optimizer.state if (number, id(p)) not in self._with_moments]
            for p in new:
                del update.optimizer.state[p]
            removed |= bool(new)
        return removed


def _memory_layout(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.device
