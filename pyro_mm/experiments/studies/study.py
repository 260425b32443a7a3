"""Recipes compared over several seeds, each with data of its own, beside what is known without training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ...batch.batch import Batch
from ...recipes.networks import Recipe


class Sample(NamedTuple):
    """What one seed draws: rows to train on, rows to test on, and whatever is known of them."""

    train: Batch
    test: Batch
    truth: Any = None


Number = float | tuple[float, float]  # a value, or one with its standard error
Measured = Mapping[str, Number]


@dataclass(frozen=True)
class Study:
    """Recipes trained alike on the data of several seeds, and the mean and deviation over these of what is measured.

    Args:
        groups: name -> ``draw(seed, directory)``: the data of one seed; a table for each of them.
        members: name -> recipe for the training rows.
        optimizer: from a recipe and its parameters.
        scheduler: of its step sizes, from the optimiser and the number of epochs.
        measure: from a trained recipe, its sample and the seed to column -> value.
        known: name -> function of (group's sample, seed) to the same columns: rows of the table that nobody trains.
        full: the same as it was published, where that takes too long for every day (``--full``).
        published: (group, member) -> what is in print.
    """

    title: str
    groups: Mapping[str, Callable[[int, str | None], Sample]]
    members: Mapping[str, Callable[[Batch], Recipe]]
    measure: Callable[[Recipe, Sample, int], Measured]
    epochs: int
    batch_size: int
    optimizer: Callable[[Recipe, Iterable[Tensor]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer, int], LRScheduler] | None = None
    seeds: int = 5
    known: Mapping[str, Callable[[Sample, int], Measured]] = field(default_factory=dict)
    published: Mapping[tuple[str, str], str] = field(default_factory=dict)
    compile: bool = False
    transform: None = None
    full: Study | None = None


Runs = Mapping[str, Sequence[Measured]]  # row -> what was measured under each seed


def tabled(runs: Runs, published: Mapping[str, str]) -> tuple[Sequence[str], list[list[str]]]:
    """The header, and a row of text for every name: over several seeds the mean and the standard deviation, of a
    single one the value and, where it has one, its standard error."""
    columns = list(dict.fromkeys(column for each in runs.values() for found in each for column in found))
    header = ["", *columns, *(["published"] if published else [])]
    lines = []
    for name, each in runs.items():
        cells = [_cell([found[column] for found in each if column in found]) for column in columns]
        lines.append([name, *cells, *([published.get(name, "–")] if published else [])])
    return header, lines


def _cell(found: Sequence[Number]) -> str:
    if not found:
        return "–"
    values = [x if isinstance(x, float | int) else x[0] for x in found]
    if len(values) > 1:
        return _text(float(np.mean(values)), float(np.std(values, ddof=1)))
    (only,) = found
    return _text(only, math.nan) if isinstance(only, float | int) else _text(*only)


def _text(value: float, error: float) -> str:
    """As many digits as say something: of a small number its order of magnitude."""
    form = ".1e" if 0 < abs(value) < 0.01 else ".3f" if abs(value) < 2 else ".2f"
    return f"{value:{form}}" + ("" if math.isnan(error) else f" ± {error:{form}}")
