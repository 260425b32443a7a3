"""The values of all updates of a step as one, and their means over the rows of an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .updates import StepValues

ROWS = "rows of "  # begins the label of the number of rows that a further player's update was made on


def join_values(values: Sequence[StepValues | None], rows: int) -> StepValues:
    """Return the values of the updates of a step as one, with the number of rows of each further player's update.

    Args:
        values: of the update by the training's objective, and of further players; None for one that was not made.
        rows: rows of the minibatch.
    """
    found = sorted((each for each in values if each is not None), key=lambda each: each.labels[0] != "loss")
    if len(found) == 1:
        return found[0]
    labels: list[str] = []
    tensors: list[Tensor] = []
    for each in found:
        labels += each.labels
        tensors.append(each.values)
        if each.labels[0] != "loss":
            labels.append(ROWS + each.labels[0])
            tensors.append(each.values.new_full((1,), rows))
    return StepValues(tuple(labels), torch.cat(tensors))


def step_values(labels: Sequence[str], values: Tensor, rows: int) -> dict[str, Tensor]:
    """Return label -> value per row of a step, of what :func:`join_values` returns."""
    pairs = zip(labels, values / rows, strict=True)
    return {label: value for label, value in pairs if not label.startswith(ROWS)}


def values_per_row(sums: Mapping[tuple[str, ...], Tensor], rows: int) -> dict[str, float]:
    """Return label -> value per row of an epoch.

    Args:
        sums: labels -> sums over the steps of an epoch of what :func:`join_values` returns.
        rows: rows of all minibatches.

    Returns:
        For a further player, and its terms, the value per row of those minibatches on which its update was made.
    """
    entry: dict[str, float] = {}
    for labels, totals in sums.items():
        for label, total in zip(labels, totals.tolist(), strict=True):
            entry[label] = entry.get(label, 0.0) + total
    counts = {label.removeprefix(ROWS): entry.pop(label) for label in list(entry) if label.startswith(ROWS)}
    means: dict[str, float] = {}
    player = ""
    for labels in sums:
        for label in labels:
            player = "" if label == "loss" else label if label in counts else player
            if label in entry:
                means[label] = entry[label] / (counts[player] if player else rows)
    return means
