"""The command ``pyro-mm train``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..experiments.console import parse_device, report_errors
from ..experiments.loggers import LOGGERS, make_logger
from ..experiments.runs import (
    CHECKPOINT,
    CONFIG,
    Settings,
    prepare_folder,
    remove_settings,
    resume_command,
    save_interrupted,
)
from ..objectives.objective import Objective
from ..utils.locks import lock_path
from .choices import LABEL_IS_NOT_ENCODED, check_choices, choose, join_names
from .figures import draw_figures
from .options import (
    BatchSize,
    Compile,
    Data,
    Dataset,
    Device,
    Epochs,
    EstimatorName,
    EvidenceParticles,
    Fitted,
    Kinds,
    ObjectiveName,
    Particles,
    Rate,
    RecipeName,
    Rows,
    Seed,
    TestFile,
)
from .output import print_run, write_run
from .rows import find_source, load_rows
from .training import Measurements, build_recipe, measure, train_rows

Latent = Annotated[int, typer.Option(min=1, help="Dimensions of the latent z.")]
Out = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="Folder of the results. By default runs/DATASET-RECIPE, followed by -OBJECTIVE and -ESTIMATOR if they are "
        "given.",
    ),
]
LoggerName = Annotated[
    str | None,
    typer.Option(help=f"Log every epoch, by Lightning Fabric (the extra loggers): {join_names(LOGGERS)}."),
]
LogFolder = Annotated[
    Path | None,
    typer.Option(file_okay=False, help="Folder of the logs. By default logs in the folder of the results."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the unfinished run in the folder, which has to be there.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a run that is in the folder already.")]


def train(
    dataset: Dataset,
    recipe: RecipeName = "jmvae-kl",
    objective: ObjectiveName = None,
    estimator: EstimatorName = None,
    num_particles: Particles = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 128,
    lr: Rate = 3e-3,
    seed: Seed = 0,
    latent: Latent = 16,
    data: Data = None,
    device: Device = None,
    out: Out = None,
    rows: Rows = 1000,
    evidence_particles: EvidenceParticles = 1000,
    fitted: Fitted = True,
    compile: Compile = None,
    logger: LoggerName = None,
    log_dir: LogFolder = None,
    resume: Resume = False,
    force: Force = False,
    test: TestFile = None,
    kinds: Kinds = None,
) -> None:
    """Train a recipe, print its log-likelihoods, and write them with weights and pictures to a folder.

    Ctrl-C ends a run with its checkpoint, and prints the command that goes on from there with the same numbers.
    """
    source = find_source(dataset, test, kinds)
    settings = Settings(
        source.dataset, recipe, objective, estimator, num_particles, epochs or source.epochs, batch_size, lr, seed,
        latent, str(data) if data else None, rows, evidence_particles, compile, fitted, *source.file,
    )  # fmt: skip
    check_choices(settings)
    place = parse_device(device)
    where = out or Path("runs") / settings.name
    if logger is not None:
        choose(LOGGERS, logger, "logger")
    elif log_dir is not None:
        raise typer.BadParameter(f"--log-dir: is for a logger, give one by --logger: {join_names(LOGGERS)}")
    options = RunOptions(where, place, device, logger, log_dir, resume, force)
    finished = train_run(settings, options)
    print_run(settings, finished.objective, finished.found)
    typer.echo(f"{settings.epochs} epochs in {finished.seconds:.0f} s; written to {where}")


@dataclass(frozen=True)
class RunOptions:
    """The options of a run beside its settings: where it is written and trained, and what is there already.

    Attributes:
        out: the folder.
        device: where to train.
        device_name: the device as it was given.
        logger: a logger by its name; None for none.
        log_dir: the folder of the logs; None for logs in ``out``.
        resume: go on with an unfinished run, which has to be there.
        force: replace a run that is there.
    """

    out: Path
    device: torch.device
    device_name: str | None = None
    logger: str | None = None
    log_dir: Path | None = None
    resume: bool = False
    force: bool = False

    def resume_command(self, settings: Settings) -> str:
        """Return the command that goes on with a run, to be pasted into a shell."""
        return resume_command(settings, device=self.device_name, out=self.out, logger=self.logger, log_dir=self.log_dir)


@dataclass(frozen=True)
class FinishedRun:
    """A run that has been trained, measured and written: its objective, numbers, and the seconds of its training."""

    objective: Objective
    found: Measurements
    seconds: float


def train_run(settings: Settings, options: RunOptions) -> FinishedRun:
    """Train and measure one run, and write its folder.

    Raises:
        typer.Exit: an error, or Ctrl-C; the message has been printed.
        typer.BadParameter: settings that do not fit together, or a folder that holds another run.
    """
    out = options.out
    interrupted = ["before anything was trained"]
    with report_errors(lambda: interrupted[0]):
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
                write_run(out, settings, run, history, found.likelihoods, figures)
            except KeyboardInterrupt:
                interrupted[0] = save_interrupted(out, run.model, run.guide, settings)
                if (out / CHECKPOINT).exists():
                    typer.echo(f"go on by: {options.resume_command(settings)}", err=True)
                raise
            except BaseException:
                remove_settings(out)
                raise
    return FinishedRun(run.objective, found, seconds)
