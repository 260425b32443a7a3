"""A training of an experiment: its options, its checkpoint, its progress, and the time that it may take."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer

from ..batch.batch import Batch
from ..evidence.evidence import Evidence
from ..recipes import Recipe
from ..training.history import raise_if_interrupted
from ..training.loop import fit
from ..utils.atomic_files import replace_text
from .families import Family
from .proposals import ProposalComparison
from .published import Reproduction
from .studies.study import Study
from .study_pictures import Draw

COURSE_PARTICLES = 100  # draws per row of the points of course-<seed>.csv


class TimeLimitReached(Exception):
    """The time that was given to a run is over."""


@dataclass(frozen=True)
class RunOptions:
    """The options of ``pyro-mm reproduce`` that hold for every training of a run.

    Args:
        out: the folder of the run.
        seed: the seed, of a study the first one.
        epochs: epochs in place of those of the experiment; None for these.
        minutes: stop after the epoch in which they are over; None for no limit.
        rows: test rows of the table; None for the default.
        course: epochs between two points of course-<seed>.csv.
        compile: compile the training step, or do not; None as the experiment does, or where it pays.
        device: the device to train on.
        data: the folder of the data files; None for the default.
        fitted: estimate likelihoods by proposals fitted to each row beside the guide's; False for the guide alone.
        particles: draws per row of the likelihoods; None for those of the experiment.
        weights: the file or folder of weights to evaluate in the place of a training; None to train.
        draw: draws a picture of a study; None for no pictures.
        start: the time at which the run began, of ``time.perf_counter``.
    """

    out: Path
    seed: int
    epochs: int | None
    minutes: float | None
    rows: int | None
    course: int
    compile: bool | None
    device: torch.device
    data: str | None
    fitted: bool = True
    particles: int | None = None
    weights: Path | None = None
    draw: Draw | None = None
    start: float = field(default_factory=time.perf_counter)

    def load(self, experiment: Reproduction | Family) -> tuple[Batch, Batch]:
        """Load the training rows onto the CPU, and the test rows onto the device."""
        train, test = experiment.data(**({"directory": self.data} if self.data else {}))
        return train, test.to(self.device)


class Progress:
    """A callback of ``fit`` that prints and records each epoch, and stops the run when its time is over.

    Args:
        name: precedes "epoch 3/20" in what is printed.
        options: the options of the run.
        out: the folder of this training's history and checkpoint.
        epochs: epochs of this training.
        point: estimates the figure whose course is recorded; None for none.
        every: epochs between two printed lines.

    Raises:
        TimeLimitReached: at the end of the epoch in which the time of the run is over.
    """

    def __init__(
        self,
        name: str,
        options: RunOptions,
        out: Path,
        epochs: int,
        point: Callable[[], Evidence] | None = None,
        every: int = 1,
    ) -> None:
        self.name = name
        self.options = options
        self.out = out
        self.epochs = epochs
        self.point = point
        self.every = every
        self.last = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)

    def __call__(self, epoch: int, entry: dict[str, float]) -> None:
        now = time.perf_counter()
        seed = self.options.seed
        is_last = epoch == self.epochs
        text = f"{self.name}epoch {epoch}/{self.epochs}: loss {entry['loss']:.3f}, {now - self.last:.1f} s"
        append_epoch(self.out / f"history-{seed}.csv", {"epoch": epoch, "seconds": now - self.last, **entry})

        if self.point is not None and (epoch % self.options.course == 0 or is_last):
            evidence = self.point()
            value, error = evidence.mean()
            append_epoch(self.out / f"course-{seed}.csv", {"epoch": epoch, "value": value, "standard_error": error})
            text += f"; {evidence.quantity} {value:.2f} ({evidence.rows_text}, K = {COURSE_PARTICLES})"
        if epoch % self.every == 0 or is_last:
            typer.echo(text)

        minutes = self.options.minutes
        if minutes is not None and now - self.options.start > 60 * minutes and not is_last:
            raise TimeLimitReached(f"stopped after {self.name}epoch {epoch} of {self.epochs}")
        self.last = time.perf_counter()


def train_recipe(
    experiment: Reproduction | Family | Study | ProposalComparison,
    run: Recipe,
    train: Batch,
    options: RunOptions,
    progress: Progress,
    callback: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """Train a recipe as an experiment does, going on from its checkpoint if there is one.

    Args:
        experiment: its optimiser, scheduler, minibatches and transform.
        run: model, guide and objective; model and guide are trained in place.
        train: the training rows.
        options: the options of the run.
        progress: the callback; the checkpoint lies in its folder.
        callback: another callback, which calls this one; None for this one.
    """
    steps: dict[str, Any] = {"optimizer": experiment.optimizer}
    if isinstance(experiment, Study):
        steps = {"optimizer": partial(experiment.optimizer, run), "callbacks": experiment.callbacks()}
        if experiment.scheduler is not None:
            scheduler = experiment.scheduler
            steps["scheduler"] = lambda optimizer: scheduler(optimizer, progress.epochs)
    history = fit(
        *run,
        train,
        epochs=progress.epochs,
        batch_size=experiment.batch_size,
        **steps,
        transform=experiment.transform,
        checkpoint=checkpoint_path(progress.out, options.seed),
        compile=(experiment.compile or None) if options.compile is None else options.compile,
        seed=options.seed,
        device=options.device,
        progress=False,
        callback=progress if callback is None else callback,
    )
    raise_if_interrupted(history)


def checkpoint_path(folder: Path, seed: int) -> Path:
    """Return the checkpoint of a training in a folder under a seed."""
    return folder / f"checkpoint-{seed}.pt"


def seconds_per_epoch(folder: Path, seed: int) -> float:
    """Return the median duration of a training's epochs without the first one, in which the step is compiled."""
    with open(folder / f"history-{seed}.csv", newline="") as file:
        seconds = [float(line["seconds"]) for line in csv.DictReader(file)]
    return median(seconds[1:] or seconds or [math.nan])


def append_epoch(path: Path, entry: dict[str, float]) -> None:
    """Append a line to a CSV file of epochs, and remove lines of this or later epochs.

    A run that goes on from a checkpoint may repeat epochs that the file has already.

    Args:
        path: the file; it need not exist.
        entry: column -> value, the first of which is the epoch.
    """
    lines = path.read_text().splitlines()[1:] if path.is_file() else []
    earlier = [line for line in lines if int(line.split(",", 1)[0]) < entry["epoch"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(entry), lineterminator="\n")
    writer.writeheader()
    text.writelines(f"{line}\n" for line in earlier)
    writer.writerow(entry)
    replace_text(path, text.getvalue())
