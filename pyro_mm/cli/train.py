"""The command ``pyro-mm train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..experiments.console import parse_device
from ..experiments.loggers import LOGGERS
from ..experiments.runs import Settings, resume_command
from .choices import check_choices, choose, join_names
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
from .output import print_run
from .rows import find_source
from .run import RunOptions, train_run
from .seeds import check_no_seeds, train_seeds

Seeds = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Number of seeds, from that of --seed on: train each in a folder of its own, seed-0, seed-1, .., and "
        "print and write one table, of means and standard deviations over seeds. The same command goes on with those "
        "that are not finished.",
        show_default=False,
    ),
]
Latent = Annotated[int, typer.Option(min=1, help="Dimensions of the latent z.")]
Out = Annotated[
    Path | None,
    typer.Option(
        file_okay=False,
        help="Folder of the results. By default runs/DATASET-RECIPE, followed by -OBJECTIVE and -ESTIMATOR if they are "
        "given, and by -seeds if there are several seeds.",
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
    seeds: Seeds = None,
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

    Ctrl-C ends a run with its checkpoint, and prints the command that goes on from there with the same numbers. With
    --seeds the folder gets a run for each seed (seed-0, ..), the table over them (seeds.md), and the numbers of each
    (seeds.csv, seeds.json).
    """
    source = find_source(dataset, test, kinds)
    settings = Settings(
        source.dataset, recipe, objective, estimator, num_particles, epochs or source.epochs, batch_size, lr, seed,
        latent, str(data) if data else None, rows, evidence_particles, compile, fitted, *source.file,
    )  # fmt: skip
    check_choices(settings)
    place = parse_device(device)
    where = out or Path("runs") / (settings.name if seeds is None else f"{settings.name}-seeds")
    if logger is not None:
        choose(LOGGERS, logger, "logger")
    elif log_dir is not None:
        raise typer.BadParameter(f"--log-dir: is for a logger, give one by --logger: {join_names(LOGGERS)}")
    go_on = resume_command(settings, seeds=seeds, device=device, out=where, logger=logger, log_dir=log_dir)
    options = RunOptions(where, place, go_on, logger, log_dir, resume, force)
    if seeds is not None:
        train_seeds(settings, options, seeds)
        return
    check_no_seeds(where)
    finished = train_run(settings, options)
    print_run(settings, finished.objective, finished.found)
    typer.echo(f"{settings.epochs} epochs in {finished.seconds:.0f} s; written to {where}")
