"""Place of a training within an epoch, from which it can go on with the same minibatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..utils.seeding import generator_state, set_generator_state
from .loader import MinibatchLoader

ENTRIES = {"number": int, "rows": int, "labels": list, "sums": list, "generators": list, "loader": list}


@dataclass
class Position:
    """Place of a training within an epoch.

    Attributes:
        generators: states of torch's generators at the start of the epoch, from which its permutation is drawn.
        loader: states of a loader's own generators at the start of the epoch.
        number: minibatches behind it.
        rows: rows in them.
        skipped: minibatches among them whose step was not finite, and was not taken.
        skipped_rows: rows in these.
        sums: labels of the loss and its terms -> their values, summed over the other rows.
    """

    generators: list[Tensor]
    loader: list[Tensor]
    number: int = 0
    rows: int = 0
    skipped: int = 0
    skipped_rows: int = 0
    sums: dict[tuple[str, ...], Tensor] = field(default_factory=dict)

    @classmethod
    def at_start(cls, devices: Sequence[torch.device], loader: MinibatchLoader) -> Position:
        """Return the start of an epoch.

        Args:
            devices: devices that draw random numbers.
            loader: the source of the minibatches.
        """
        return cls([generator_state(device) for device in devices], loader_states(loader))

    def add(self, labels: tuple[str, ...], values: Tensor, rows: int) -> None:
        """Move on by a minibatch, with the values of its loss and terms."""
        self.number += 1
        self.rows += rows
        self.sums[labels] = self.sums[labels] + values if labels in self.sums else values

    def skip(self, rows: int) -> None:
        """Move on by a minibatch whose step was not taken."""
        self.number += 1
        self.rows += rows
        self.skipped += 1
        self.skipped_rows += rows

    def rewind(self, devices: Sequence[torch.device], loader: MinibatchLoader) -> None:
        """Put all generators back to the start of the epoch."""
        for device, state in zip(devices, self.generators, strict=False):
            set_generator_state(device, state.cpu())
        restore_loader(loader, self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Return numbers, text and tensors for a file."""
        return {
            "number": self.number,
            "rows": self.rows,
            "skipped": [self.skipped, self.skipped_rows],
            "labels": [list(labels) for labels in self.sums],
            "sums": list(self.sums.values()),
            "generators": self.generators,
            "loader": self.loader,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any], device: torch.device) -> Position:
        """Return the position that :meth:`state_dict` described, with its sums on a device."""
        sums = [values.to(device) for values in state["sums"]]
        labels = [tuple(each) for each in state["labels"]]
        skipped = state.get("skipped", (0, 0))
        return cls(
            state["generators"],
            state["loader"],
            state["number"],
            state["rows"],
            skipped=skipped[0],
            skipped_rows=skipped[1],
            sums=dict(zip(labels, sums, strict=True)),
        )


def describe_damage(state: Any) -> str:
    """Return, in words, a fault of a position that was read from a file; empty if there is none."""
    if not isinstance(state, dict) or any(not isinstance(state.get(name), kind) for name, kind in ENTRIES.items()):
        return "its place within an epoch is not one"
    tensors = [*state["sums"], *state["generators"], *state["loader"]]
    fits = len(state["sums"]) == len(state["labels"]) and state["number"] >= 1 and bool(state["generators"])
    if not fits or not all(isinstance(t, Tensor) for t in tensors):
        return "its place within an epoch is not one"
    return ""


def loader_states(loader: MinibatchLoader) -> list[Tensor]:
    """Return the states of a loader's own generators."""
    return [generator.get_state() for generator in loader.generators]


def restore_loader(loader: MinibatchLoader, states: Sequence[Tensor]) -> None:
    """Set a loader's own generators to states of :func:`loader_states`."""
    for generator, state in zip(loader.generators, states, strict=False):
        generator.set_state(state.cpu())
