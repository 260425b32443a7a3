"""The command line: train a recipe, evaluate a run, compare recipes. The one place where names stand for values."""

from __future__ import annotations

import csv
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from pyro.infer import ELBO
from torch import Tensor

from . import __version__, datasets, estimators, objectives
from .batch.batch import Batch
from .evidence.evidence import Evidence
from .experiments.console import command, show, torch_device
from .experiments.evaluation import HEADER, Line, cells, evaluated, share
from .experiments.reproduce import reproduce
from .experiments.runs import (
    CHECKPOINT,
    CONFIG,
    HISTORY,
    WEIGHTS,
    Settings,
    abandon,
    begin,
    leave,
    load_run,
    read_settings,
)
from .objectives.objective import Objective
from .recipes import RECIPES, Recipe
from .sampling.encode import encode
from .sampling.predictive import generate
from .training.history import History
from .training.loop import fit
from .training.weights import save
from .utils.locks import lock_path
from .utils.modules import preserve_buffers
from .utils.seeding import temporary_seed

EPOCHS = {"digits": 200, "mnist": 20, "fashion": 20}
WITHOUT_FILES = ("digits",)
ONE_THREAD = ("digits",)  # matrices so small that sharing them out costs more than it gives, on a busy machine 10x
OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    name.replace("_", "-"): getattr(objectives, name)
    for name in (
        "elbo", "beta_vae", "jmvae_kl", "mvae", "telbo", "vaevae", "mmvae", "unimodal_mean", "mopoe", "subset_mean",
        "mixture_mean", "mmjsd", "mmvm", "mvtcae", "masked",
    )
}  # fmt: skip
ESTIMATORS: Mapping[str, Callable[..., ELBO]] = {
    "analytic-kl": estimators.AnalyticKL,
    "iwae": estimators.IWAE,
    "iwae-stratified": partial(estimators.IWAE, stratified="outside"),
    "dreg": estimators.DReG,
    "stick-the-landing": estimators.StickTheLanding,
    "renyi": partial(estimators.Renyi, 0.5),
}
TRAINED = {name: recipe for name, recipe in RECIPES.items() if name not in ("vae", "cvae", "jnf")}  # of image and label
COMPARED = ("mvae", "jmvae-kl", "mmvae", "mopoe")
COLUMNS = ("log_prob", "standard_error", "ess", "pareto_k")
PREDICTIONS = 100  # draws of z behind a predicted label

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
app.command()(reproduce)


Dataset = Annotated[str, typer.Argument(help=", ".join(EPOCHS))]
RecipeName = Annotated[str, typer.Option(help=", ".join(TRAINED))]
ObjectiveName = Annotated[str | None, typer.Option(help=f"Instead of the recipe's: {', '.join(OBJECTIVES)}")]
EstimatorName = Annotated[str | None, typer.Option(help=f"Instead of the objective's: {', '.join(ESTIMATORS)}")]
Particles = Annotated[int | None, typer.Option(min=1, help="Draws of the training estimator.")]
Epochs = Annotated[int | None, typer.Option(min=1, help=f"By default {EPOCHS}.")]
BatchSize = Annotated[int, typer.Option(min=1)]
Rate = Annotated[float, typer.Option(min=0.0, max=1e6, help="Adam's step.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]
Data = Annotated[
    Path | None, typer.Option(exists=True, file_okay=False, help="Folder of the data files, for those that have any.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, .. By default CUDA where there is one.")]
Rows = Annotated[int, typer.Option(min=1, help="Test rows, the first ones, that the table is of.")]
Compile = Annotated[bool, typer.Option("--compile", help="Trace and compile the training step first.")]
EvidenceParticles = Annotated[int, typer.Option(min=2, help="Draws a row of the likelihoods in the table.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyro-mm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    """Only options that belong to no command."""


@app.command()
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
    latent: Annotated[int, typer.Option(min=1, help="Dimensions of z.")] = 16,
    data: Data = None,
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="By default runs/<dataset>-<recipe>[-<objective>][-<estimator>]."),
    ] = None,
    rows: Rows = 1000,
    evidence_particles: EvidenceParticles = 1000,
    compile: Compile = False,
    force: Annotated[bool, typer.Option("--force", help="Replaces a run that is in the folder already.")] = False,
) -> None:
    """Trains a recipe, prints its likelihoods, and writes them with pictures and weights to a folder.

    The same command goes on with a run that was interrupted.
    """
    settings = Settings(
        _key(EPOCHS, dataset, "data set"), recipe, objective, estimator, num_particles, epochs or EPOCHS[dataset],
        batch_size, lr, seed, latent, str(data) if data else None, rows, evidence_particles, compile,
    )  # fmt: skip
    _check_choices(settings)
    place, where = torch_device(device), out or Path("runs") / settings.name
    last_words = ["before anything was trained"]
    with command(lambda: last_words[0]):
        batches = _load(settings)
        run = _build(settings, batches[0])
        with lock_path(where / CONFIG):
            if begin(where, settings, force):
                typer.echo(f"going on with the run in {where}")
            try:
                run, history, test, seconds = _train(settings, place, run, batches, where / CHECKPOINT)
                lines, evidence = evaluated(run, test, settings.evidence_particles, settings.seed)
                probabilities, accuracy = _predict(run, test, settings)
                _write(where, settings, run, history, evidence, _pictures(run, test, history, probabilities, seed))
            except KeyboardInterrupt:
                last_words[0] = leave(where, run.model, run.guide, settings)
                raise
            except BaseException:
                abandon(where)
                raise
    _print(settings, run.objective, lines, accuracy, test.size)
    typer.echo(f"{settings.epochs} epochs in {seconds:.0f} s; written to {where}")


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(help="What train wrote.")],
    data: Data = None,
    device: Device = None,
    rows: Annotated[int | None, typer.Option(min=1, help="Instead of those of the run.")] = None,
    evidence_particles: Annotated[int | None, typer.Option(min=2, help="Instead of those of the run.")] = None,
) -> None:
    """Prints the table of a run again, from its weights: the same numbers."""
    if not (directory / CONFIG).is_file():
        raise typer.BadParameter(f"there is no {directory / CONFIG}: expected a folder that train wrote")
    if not (directory / WEIGHTS).is_file() and not (directory / CHECKPOINT).is_file():
        raise typer.BadParameter(f"there is no {directory / WEIGHTS}: expected a folder that train wrote")
    place = torch_device(device)
    with command(lambda: "nothing was changed"):
        settings = read_settings(directory)
        changed: dict[str, Any] = {"data": data and str(data), "rows": rows, "evidence_particles": evidence_particles}
        settings = replace(settings, **{name: value for name, value in changed.items() if value is not None})
        train, test = _load(settings)
        run = _build(settings, train)
        epochs = load_run(directory, run.model, run.guide)
        for module in (run.model, run.guide):
            module.to(place)
        test = test.to(place)
        lines, _ = evaluated(run, test, settings.evidence_particles, settings.seed)
        _, accuracy = _predict(run, test, settings)
    _print(settings, run.objective, lines, accuracy, test.size)
    if epochs is not None:
        typer.echo(f"of an unfinished run, after epoch {epochs} of {settings.epochs}")


@app.command()
def compare(
    dataset: Dataset,
    epochs: Epochs = None,
    batch_size: BatchSize = 128,
    lr: Rate = 3e-3,
    seed: Seed = 0,
    data: Data = None,
    device: Device = None,
    rows: Rows = 1000,
    evidence_particles: EvidenceParticles = 1000,
) -> None:
    """Trains MVAE, JMVAE-kl, MMVAE and MoPoE alike and prints them side by side; writes nothing."""
    place = torch_device(device)
    columns: list[list[tuple[str, str]]] = []
    for recipe in COMPARED:
        settings = Settings(
            _key(EPOCHS, dataset, "data set"), recipe, None, None, None, epochs or EPOCHS[dataset], batch_size, lr,
            seed, 16, str(data) if data else None, rows, evidence_particles,
        )  # fmt: skip
        with command(lambda: f"{len(columns)} of {len(COMPARED)} recipes were trained, and nothing is kept"):
            batches = _load(settings)
            run, _, test, seconds = _train(settings, place, _build(settings, batches[0]), batches)
            lines, _ = evaluated(run, test, settings.evidence_particles, settings.seed)
            _, accuracy = _predict(run, test, settings)
        column = []
        for line in (line for line in lines if line.shared):
            column.append((line.quantity, f"{line.value:.2f} ± {line.error:.2f}"))
            if line.ess is not None:
                column.append(("  its share of k-hat > 0.7", share(line.untrusted)))
        columns.append([*column, ("label accuracy", f"{accuracy:.1%}"), ("training, seconds", f"{seconds:.0f}")])
    header = f"{dataset}: {test.size} test rows, {settings.epochs} epochs each; nats a row ± their standard error"
    rows_of_table = [(cells[0][0], *(value for _, value in cells)) for cells in zip(*columns, strict=True)]
    show(header, ("", *COMPARED), rows_of_table)


# -- from settings to a run -------------------------------------------------------------------------------------


def _key(choices: Mapping[str, Any], name: str, what: str) -> str:
    if name not in choices:
        raise typer.BadParameter(f"unknown {what} {name!r}: expected one of {', '.join(choices)}")
    return name


def _check_choices(settings: Settings) -> None:
    """Raise a BadParameter unless all names are known, and the data set has files where a folder is given."""
    _key(TRAINED, settings.recipe, "recipe")
    if settings.objective is not None:
        _key(OBJECTIVES, settings.objective, "objective")
    if settings.estimator is not None:
        _key(ESTIMATORS, settings.estimator, "estimator")
    if settings.data is not None and settings.dataset in WITHOUT_FILES:
        raise typer.BadParameter(f"--data: {settings.dataset} needs no files, leave it out")


def _build(settings: Settings, batch: Batch) -> Recipe:
    """Build model, guide and objective for the modalities of a batch, under the run's seed, and try them on two rows.

    Raises:
        typer.BadParameter: recipe, objective and estimator do not go together.
    """
    recipe = TRAINED[_key(TRAINED, settings.recipe, "recipe")]
    k = {} if settings.num_particles is None else {"num_particles": settings.num_particles}
    estimator = None
    if settings.estimator is not None:
        estimator = ESTIMATORS[_key(ESTIMATORS, settings.estimator, "estimator")](**k)
    torch.manual_seed(settings.seed)
    run = recipe(batch, latent=settings.latent, estimator=estimator)
    if settings.objective is not None:
        named = OBJECTIVES[_key(OBJECTIVES, settings.objective, "objective")](estimator=estimator)
        run = run._replace(objective=named)
    if estimator is None and k:
        run.objective.estimator.num_particles = settings.num_particles
    try:
        with temporary_seed(settings.seed, torch.device("cpu")), preserve_buffers(run.model, run.guide):
            run.objective.differentiable_loss(run.model, run.guide, batch[:2])
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    return run


def _load(settings: Settings) -> tuple[Batch, Batch]:
    """All training rows, and the test rows that the table is of."""
    if settings.dataset in ONE_THREAD:
        torch.set_num_threads(1)
    train, test = datasets.load(settings.dataset, **({"directory": settings.data} if settings.data else {}))
    return train, test[torch.arange(min(settings.rows, test.size))]


def _train(
    settings: Settings,
    device: torch.device,
    run: Recipe,
    batches: tuple[Batch, Batch],
    checkpoint: Path | None = None,
) -> tuple[Recipe, History, Batch, float]:
    start = time.perf_counter()
    train, test = batches
    history = fit(
        *run,
        train,
        validation=test,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        optimizer=lambda parameters: torch.optim.Adam(parameters, settings.lr, fused=True),
        compile=settings.compile,
        seed=settings.seed,
        device=device,
        checkpoint=checkpoint,
    )
    return run, history, test.to(device), time.perf_counter() - start


def _predict(run: Recipe, test: Batch, settings: Settings) -> tuple[Tensor, float]:
    """The predicted label of every row given its image, and the share of right ones."""
    from .metrics import class_probabilities

    with temporary_seed(settings.seed, test.device):
        probabilities = class_probabilities(run.model, run.guide, test, "label", "image", PREDICTIONS)
    return probabilities, (probabilities.argmax(-1) == test["label"]).float().mean().item()


# -- what is printed and written --------------------------------------------------------------------------------


def _print(settings: Settings, objective: Objective, lines: list[Line], accuracy: float, size: int) -> None:
    show(f"{settings.recipe} on {settings.dataset}, mean over {size} test rows", HEADER, cells(lines))
    typer.echo(f"training objective: {objective.estimator_text}; {objective.target}")
    typer.echo(f"label accuracy given the image: {accuracy:.1%}")


def _pictures(run: Recipe, test: Batch, history: History, probabilities: Tensor, seed: int) -> dict[str, Any]:
    from . import metrics, plots

    label, classes = test["label"], probabilities.shape[-1]
    found = [(label == c).nonzero()[:1, 0] for c in range(classes)]
    first = torch.cat(found)
    with temporary_seed(seed, test.device):
        images = generate(run.model, run.guide, test[first].only("label"), 8, mean=True)["image"].transpose(0, 1)
    points = encode(run.guide, test)["z"].mean
    matrix = metrics.confusion_matrix(label, probabilities.argmax(-1), classes)
    return {
        "training": plots.training_curve(history),
        "generated": plots.image_grid(
            images, rows=label[first].tolist(), title="mean image given z, z given the label"
        ),
        "confusion": plots.confusion(matrix, title="label given the image"),
        "latent": plots.latent_view(points, label, title="posterior means given image and label"),
    }


def _write(
    out: Path, settings: Settings, run: Recipe, history: History, evidence: list[Evidence], figures: dict[str, Any]
) -> None:
    """Write the files of a run; the checkpoint goes last, without which it is finished."""
    settings.write(out)
    history.to_csv(out / HISTORY)
    save(out / WEIGHTS, run.model, run.guide)
    with open(out / "evidence.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("quantity", "row", *COLUMNS))
        for e in evidence:
            columns = [getattr(e, name).tolist() for name in COLUMNS]
            writer.writerows((e.quantity, i, *values) for i, values in enumerate(zip(*columns, strict=True)))
    evidence[0].to_arviz().to_netcdf(str(out / "evidence.nc"))
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)
    (out / CHECKPOINT).unlink(missing_ok=True)
