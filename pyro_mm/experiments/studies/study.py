"""A study: recipes compared over several seeds, each with its own data, beside figures known without training."""

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
    """The data of one seed.

    Attributes:
        train: training rows.
        test: test rows.
        truth: anything that is known of them, such as their story.
    """

    train: Batch
    test: Batch
    truth: Any = None


class Images(NamedTuple):
    """Images that one row of a study's table shows.

    Attributes:
        values: K images with values in [0, 1], grey ``(K, H, W)`` or in colour ``(K, 3, H, W)``.
        labels: K texts above them, equal in all rows; none for no texts.
        truth: real images to show above those of all rows, of the shape of ``values``; None for none.
    """

    values: Tensor
    labels: tuple[str, ...] = ()
    truth: Tensor | None = None


Number = float | tuple[float, float]  # a value, or a value with its standard error
Measurements = Mapping[str, Number]  # column -> value


@dataclass(frozen=True)
class Study:
    """Recipes trained alike on the data of several seeds, and the columns of their table.

    Args:
        title: the title of the table.
        groups: name -> ``draw(seed, directory)``, the data of one seed; each group has a table.
        members: name -> recipe for the training rows; each member is a row of every table.
        measure: ``measure(run, sample, seed, fitted)``, from a trained recipe to column -> value. With ``fitted``
            likelihoods are by proposals fitted to each row, and columns of the guide's draws stand beside them.
        epochs: epochs of training.
        validate: ``validate(run, sample, seed)``, a score on validation rows after each epoch, the larger the better:
            the weights of the best epoch are measured, the last of equal ones. None to measure those of the last epoch.
        batch_size: rows per minibatch.
        optimizer: from a recipe and its parameters to an optimiser.
        scheduler: from the optimiser and the number of epochs to a scheduler of step sizes; None for none.
        seeds: the number of seeds.
        known: name -> function from (sample, seed) to column -> value: rows of the table that need no training.
        published: (group, member) -> the published figure.
        compile: trace and compile the training step.
        callbacks: makes the callbacks of a training, such as an average of the weights.
        images: ``images(run, sample, seed)``, from a trained recipe to title -> images. Those of one title make a
            picture, with a line for each member; None for no pictures.
        gain: (column, row): each table has a column of the differences in this one from this row under the same seed.
        transform: changes every minibatch of a training, such as by noise; None for none.
        full: the study at its published size, if that differs (``--full``).
    """

    title: str
    groups: Mapping[str, Callable[[int, str | None], Sample]]
    members: Mapping[str, Callable[[Batch], Recipe]]
    measure: Callable[[Recipe, Sample, int, bool], Measurements]
    epochs: int
    batch_size: int
    optimizer: Callable[[Recipe, Iterable[Tensor]], torch.optim.Optimizer]
    scheduler: Callable[[torch.optim.Optimizer, int], LRScheduler] | None = None
    validate: Callable[[Recipe, Sample, int], float] | None = None
    seeds: int = 5
    known: Mapping[str, Callable[[Sample, int], Measurements]] = field(default_factory=dict)
    published: Mapping[tuple[str, str], str] = field(default_factory=dict)
    compile: bool = False
    callbacks: Callable[[], Sequence[Any]] = tuple
    images: Callable[[Recipe, Sample, int], Mapping[str, Images]] | None = None
    gain: tuple[str, str] | None = None
    transform: Callable[[Batch], Batch] | None = None
    full: Study | None = None


Runs = Mapping[str, Sequence[Measurements]]  # row -> the measurements of each seed


def build_table(runs: Runs, published: Mapping[str, str]) -> tuple[Sequence[str], list[list[str]]]:
    """Format measurements as a table: mean ± standard deviation over seeds, or value ± standard error of one seed.

    Args:
        runs: row -> the measurements of each seed.
        published: row -> the published figure; if there is any, the table has a column of them.

    Returns:
        (header, rows), as text.
    """
    columns = list(dict.fromkeys(column for each in runs.values() for found in each for column in found))
    header = ["", *columns, *(["published"] if published else [])]
    lines = []
    for name, each in runs.items():
        cells = [_cell([found[column] for found in each if column in found]) for column in columns]
        lines.append([name, *cells, *([published.get(name, "–")] if published else [])])
    return header, lines


def with_gain(
    runs: Mapping[str, Mapping[int, Measurements]], column: str, base: str
) -> dict[str, dict[int, Measurements]]:
    """Add the column of the differences from one row, seed by seed; the errors of both add up as if independent.

    Args:
        runs: row -> seed -> measurements.
        column: its values are compared.
        base: the row from which they differ, which gets no such column.
    """
    added: dict[str, dict[int, Measurements]] = {}
    for name, each in runs.items():
        added[name] = {}
        for seed, found in each.items():
            other = runs.get(base, {}).get(seed, {})
            has_both = name != base and column in found and column in other
            more = {f"{column}, gain": _difference(found[column], other[column])} if has_both else {}
            added[name][seed] = {**found, **more}
    return added


def _difference(first: Number, second: Number) -> Number:
    """Return the difference of two values, with its standard error if both have one."""
    if isinstance(first, float | int) or isinstance(second, float | int):
        return _value(first) - _value(second)
    return first[0] - second[0], math.hypot(first[1], second[1])


def _value(found: Number) -> float:
    return found if isinstance(found, float | int) else found[0]


def _cell(found: Sequence[Number]) -> str:
    """Format the values of one cell, one per seed."""
    if not found:
        return "–"
    values = [_value(x) for x in found]
    if len(values) > 1:
        return _text(float(np.mean(values)), float(np.std(values, ddof=1)))
    (only,) = found
    return _text(only, math.nan) if isinstance(only, float | int) else _text(*only)


def _text(value: float, error: float) -> str:
    """Format a value and its error with three significant digits or so; an error of NaN is left out."""
    form = ".1e" if 0 < abs(value) < 0.01 else ".3f" if abs(value) < 2 else ".2f"
    return f"{value:{form}}" + ("" if math.isnan(error) else f" ± {error:{form}}")
