"""Rows of a run: the data set or the file of the user that was named, and its training and test rows."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
import typer

from .. import datasets
from ..batch.batch import Batch
from ..experiments.console import nearest
from ..experiments.runs import Settings
from ..experiments.user_data import digest_files, is_file, load_arrays, parse_kinds
from .choices import EPOCHS, FILE_EPOCHS, join_names

ONE_THREAD = ("digits",)  # matrices so small that several threads are slower, on a busy machine by a factor of 10


class Source(NamedTuple):
    """The data of a run.

    Attributes:
        dataset: the name of the data set, or the path of a file.
        epochs: the default number of epochs.
        file: the settings of a file: that of the test rows, kinds, and a digest.
    """

    dataset: str
    epochs: int
    file: tuple[str | None, str | None, str | None] = (None, None, None)


def find_source(dataset: str, test: Path | None, kinds: str | None) -> Source:
    """Return the data of a run. Raises a BadParameter for an unknown name, or for options that do not fit to it."""
    if not is_file(dataset):
        if Path(dataset).suffix and Path(dataset).exists():
            raise typer.BadParameter(
                f"{dataset} is no npz file: read it in Python, and write its columns by np.savez(path, NAME=array, ..)"
            )
        if dataset not in EPOCHS:
            raise typer.BadParameter(
                f"unknown data set {dataset!r}{nearest(dataset, EPOCHS)}: expected one of {join_names(EPOCHS)}, or an "
                "npz file of arrays"
            )
        if test is not None or kinds is not None:
            option = "--kinds" if test is None else "--test"
            raise typer.BadParameter(
                f"{option}: is for a file of arrays, and {dataset} has kinds and test rows: leave it out"
            )
        return Source(dataset, EPOCHS[dataset])
    if not Path(dataset).is_file():
        raise typer.BadParameter(f"there is no file {dataset}")
    try:
        parse_kinds(kinds)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    paths = [str(Path(dataset).resolve()), None if test is None else str(test.resolve())]
    try:
        digest = digest_files(paths)
    except OSError as error:
        raise typer.BadParameter(f"{error.filename or dataset} cannot be read: {error.strerror}") from error
    return Source(str(paths[0]), FILE_EPOCHS, (paths[1], kinds, digest))


def load_rows(settings: Settings) -> tuple[Batch, Batch]:
    """Load the training rows, and the test rows of the table.

    Raises:
        ValueError: the files of a run have changed since, or do not hold batches.
    """
    if settings.dataset in ONE_THREAD:
        torch.set_num_threads(1)
    if is_file(settings.dataset):
        if digest_files([settings.dataset, settings.test]) != settings.digest:
            raise ValueError(f"{settings.dataset} has changed since the run was trained: its numbers would be others")
        train, test = load_arrays(settings.dataset, settings.test, settings.seed, parse_kinds(settings.kinds))
        return train, test[torch.arange(min(settings.rows, test.size))]
    train, test = datasets.load(settings.dataset, **({"directory": settings.data} if settings.data else {}))
    return train, test[torch.arange(min(settings.rows, test.size))]
