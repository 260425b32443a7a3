"""One run of a recipe: trained, measured and written to its folder, or loaded from there."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import typer

from ..experiments.console import report_errors
from ..experiments.loggers import make_logger
from ..experiments.runs import (
    CHECKPOINT,
    CONFIG,
    HISTORY,
    Settings,
    load_run,
    prepare_folder,
    remove_settings,
    save_interrupted,
)
from ..objectives.objective import Objective
from ..utils.locks import lock_path
from .choices import LABEL_IS_NOT_ENCODED
from .figures import draw_figures
from .numbers import Number, collect_numbers
from .output import write_run
from .rows import load_rows
from .training import Measurements, build_recipe, measure, train_rows


@dataclass(frozen=True)
class RunOptions:
    """The options of a run beside its settings: where it is written and trained, and what is there already.

    Attributes:
        out: the folder.
        device: where to train.
        go_on: the command that goes on with it after a stop.
        logger: a logger by its name; None for none.
        log_dir: the folder of the logs; None for logs in ``out``.
        resume: go on with an unfinished run, which has to be there.
        force: replace a run that is there.
        label: precedes the texts of an interruption.
        has_finished: runs of the same sequence are finished.
    """

    out: Path
    device: torch.device
    go_on: str
    logger: str | None = None
    log_dir: Path | None = None
    resume: bool = False
    force: bool = False
    label: str = ""
    has_finished: bool = False


@dataclass(frozen=True)
class MeasuredRun:
    """A trained run with its numbers.

    Attributes:
        objective: of its training.
        found: its measurements.
        numbers: these and its last losses, by name.
        seconds: of its training; 0 if it was loaded.
        epochs: epochs of its weights if it is unfinished; None for a finished one.
    """

    objective: Objective
    found: Measurements
    numbers: Sequence[Number]
    seconds: float = 0.0
    epochs: int | None = None


def train_run(settings: Settings, options: RunOptions) -> MeasuredRun:
    """Train and measure one run, and write its folder.

    Raises:
        typer.Exit: an error, or Ctrl-C; the message has been printed.
        typer.BadParameter: settings that do not fit together, or a folder that holds another run.
    """
    out = options.out
    interrupted = ["before anything was trained"]

    def text() -> str:
        _print_go_on(options)
        return options.label + interrupted[0]

    with report_errors(text):
        log = None if options.logger is None else make_logger(options.logger, options.log_dir or out / "logs")
        batches = load_rows(settings)
        run = build_recipe(settings, batches[0])
        with lock_path(out / CONFIG):
            if prepare_folder(out, settings, options.force, options.resume):
                typer.echo(f"going on with the run in {out}")
            try:
                history, held_out, seconds = train_rows(settings, options.device, run, batches, out / CHECKPOINT, log)
                found = measure(run, held_out, settings)
                by_weight = settings.recipe in LABEL_IS_NOT_ENCODED
                figures = draw_figures(run, held_out, history, found.predictions, settings.seed, by_weight)
                numbers = collect_numbers(found, history.columns)
                write_run(out, settings, run, history, found, numbers, figures)
            except KeyboardInterrupt:
                interrupted[0] = save_interrupted(out, run.model, run.guide, settings)
                raise
            except (OSError, MemoryError):  # of the machine and not of the run, which goes on from its checkpoint
                remove_settings(out)
                _print_go_on(options)
                raise
            except BaseException as error:
                remove_settings(out)
                if isinstance(error, ValueError) and f"{out / CHECKPOINT} is damaged" in str(error):
                    raise ValueError(f"{error}. Give --force to start anew in its place") from error
                raise
    return MeasuredRun(run.objective, found, numbers, seconds)


def _print_go_on(options: RunOptions) -> None:
    """Print the command that goes on, if there is something to go on from."""
    if options.has_finished or (options.out / CHECKPOINT).exists():
        typer.echo(f"go on by: {options.go_on}", err=True)


def load_and_measure(directory: Path, settings: Settings, device: torch.device) -> MeasuredRun:
    """Load the weights of a run and measure them on test rows.

    Args:
        directory: the folder of the run.
        settings: its settings, with those of the measurement as they are wanted.
        device: where to measure.

    Raises:
        ValueError: a file is damaged, or has changed.
    """
    train, test = load_rows(settings)
    run = build_recipe(settings, train)
    epochs = load_run(directory, run.model, run.guide)
    for module in (run.model, run.guide):
        module.to(device)
    found = measure(run, test.to(device), settings)
    return MeasuredRun(run.objective, found, collect_numbers(found, _read_history(directory)), epochs=epochs)


def _read_history(directory: Path) -> Mapping[str, Sequence[float]]:
    """Return the columns of history.csv; none if the file is not there."""
    path = directory / HISTORY
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    try:
        return {name: [float(line[name]) for line in lines] for name in (lines[0] if lines else ())}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or was not written by pyro-mm train: {error}") from error
