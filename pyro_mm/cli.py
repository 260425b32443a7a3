"""Train, evaluate and compare multimodal deep generative models."""

from __future__ import annotations

import csv
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args

import torch
import typer
from pyro.infer import ELBO
from torch import Tensor

from . import __version__, datasets, estimators, objectives
from .batch.batch import Batch
from .diagnostics.comparison import Comparison
from .diagnostics.comparison import compare as compare_models
from .evidence.evidence import Evidence
from .experiments.console import format_share, parse_device, print_table, report_errors
from .experiments.estimates import FITTED_TEXT, Estimates
from .experiments.evaluation import Line, evaluate_recipe, format_lines
from .experiments.loggers import LOGGERS, make_logger
from .experiments.reproduce import reproduce
from .experiments.runs import (
    CHECKPOINT,
    CONFIG,
    EVIDENCE,
    HISTORY,
    INFERENCE_DATA,
    WEIGHTS,
    Settings,
    load_run,
    prepare_folder,
    read_settings,
    remove_settings,
    resume_command,
    save_interrupted,
    weights_path,
)
from .experiments.user_data import digest_files, image_name, is_file, label_names, load_arrays, parse_kinds, with_option
from .objectives.objective import Objective
from .recipes import RECIPES, Recipe
from .recipes.kinds import Kind
from .sampling.encode import encode
from .sampling.predictive import generate
from .training.history import History, raise_if_interrupted
from .training.loop import fit
from .training.weights import save
from .utils.locks import lock_path
from .utils.modules import preserve_buffers
from .utils.seeding import temporary_seed

# The command line is the one place where names stand for values.
EPOCHS = {"digits": 200, "mnist": 20, "fashion": 20}  # by data set
FILE_EPOCHS = 100  # of a file
WITHOUT_FILES = ("digits",)
ONE_THREAD = ("digits",)  # matrices so small that several threads are slower, on a busy machine by a factor of 10
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
REFUSED = {
    "vae": "it has one modality, and this command evaluates each given the others",
    "cvae": "it has a label as covariate, and no likelihood of it",
    "jnf": "it is trained in two stages",
    "mfm": "it is a deterministic autoencoder without likelihoods, which this command estimates; mfm-variational has "
    "them, and pyro-mm reproduce mfm-digits trains both",
}  # recipe -> the reason why it is not trained here
TRAINED = {name: recipe for name, recipe in RECIPES.items() if name not in REFUSED}
LABEL_IS_NOT_ENCODED = ("mfm-variational",)  # images of a class are drawn by weight, the guide alone would ignore it
COMPARED = ("mvae", "jmvae-kl", "mmvae", "mopoe")
COMPARISON_FILES = ("table.csv", "comparison.txt", "forest.png")
COLUMNS = ("log_prob", "standard_error", "ess", "pareto_k")
PREDICTIONS = 100  # draws of z per predicted label
SAMPLES_PER_CLASS = 8  # generated images in generated.png

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


Dataset = Annotated[
    str,
    typer.Argument(
        help=f"Data set: {_names(EPOCHS)}; or an npz file of yours, as np.savez writes it: an array NAME with "
        "the rows of each modality, NAME.present with its mask and NAME.lengths with lengths of sequences."
    ),
]
TestFile = Annotated[
    Path | None,
    typer.Option(
        "--test",
        exists=True,
        dir_okay=False,
        help="For a file: an npz file of the test rows. By default a fifth of the rows, held out by the seed.",
    ),
]
Kinds = Annotated[
    str | None,
    typer.Option(
        help="For a file: kinds of modalities that their values do not say, as in rna=counts,notes=tokens. One of "
        f"{_names(get_args(Kind))}."
    ),
]
RecipeName = Annotated[str, typer.Option(help=f"Model, posterior and objective of a paper: {_names(TRAINED)}.")]
ObjectiveName = Annotated[
    str | None, typer.Option(help=f"Objective; by default that of the recipe. One of {_names(OBJECTIVES)}.")
]
EstimatorName = Annotated[
    str | None, typer.Option(help=f"Gradient estimator; by default that of the objective. One of {_names(ESTIMATORS)}.")
]
Particles = Annotated[int | None, typer.Option(min=1, help="Draws of the latents per row and training step.")]
Epochs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Epochs of training. By default {_names(f'{epochs} for {name}' for name, epochs in EPOCHS.items())}, "
        f"{FILE_EPOCHS} for a file.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per minibatch.")]
Rate = Annotated[float, typer.Option(min=0.0, max=1e6, help="Step size of the optimiser, Adam.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of weights, minibatches and draws.")]
Data = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Folder of the data files, if the data set has any. By default the folder named by PYRO_MM_DATA; missing "
        "files are downloaded.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, .. By default cuda if it is available.")]
Rows = Annotated[int, typer.Option(min=1, help="Number of test rows to evaluate, the first ones.")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the training step; needs a C++ compiler.")]
EvidenceParticles = Annotated[
    int, typer.Option(min=2, help="Draws per row, K, of the importance-sampled likelihoods in the table.")
]
Fitted = Annotated[
    bool,
    typer.Option(
        "--fitted/--no-fitted",
        help="Estimate likelihoods by proposals fitted to each row, with the guide's beside them; or by the guide "
        "alone.",
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyro-mm {__version__}")
        raise typer.Exit


def _draw_images(images: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> Any:
    """Draw images as a grid; matplotlib is imported here."""
    from . import plots

    return plots.image_grid(images, rows, columns, title)


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, evaluate and compare multimodal deep generative models."""
    context.obj = _draw_images  # what is drawn for `reproduce`, which lies below the plots


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
    latent: Annotated[int, typer.Option(min=1, help="Dimensions of the latent z.")] = 16,
    data: Data = None,
    device: Device = None,
    out: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="Folder of the results. By default runs/DATASET-RECIPE, followed by -OBJECTIVE and -ESTIMATOR if "
            "they are given.",
        ),
    ] = None,
    rows: Rows = 1000,
    evidence_particles: EvidenceParticles = 1000,
    fitted: Fitted = True,
    compile: Compile = False,
    logger: Annotated[
        str | None,
        typer.Option(help=f"Log every epoch, by Lightning Fabric (the extra loggers): {_names(LOGGERS)}."),
    ] = None,
    log_dir: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder of the logs. By default logs in the folder of the results."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the unfinished run in the folder, which has to be there."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a run that is in the folder already.")] = False,
    test: TestFile = None,
    kinds: Kinds = None,
) -> None:
    """Train a recipe, print its log-likelihoods, and write them with weights and pictures to a folder.

    Ctrl-C ends a run with its checkpoint, and prints the command that goes on from there with the same numbers.
    """
    source = _source(dataset, test, kinds)
    settings = Settings(
        source.dataset, recipe, objective, estimator, num_particles, epochs or source.epochs, batch_size, lr, seed,
        latent, str(data) if data else None, rows, evidence_particles, compile, fitted, *source.file,
    )  # fmt: skip
    _check_choices(settings)
    place = parse_device(device)
    where = out or Path("runs") / settings.name
    if logger is not None:
        _key(LOGGERS, logger, "logger")
    elif log_dir is not None:
        raise typer.BadParameter(f"--log-dir: is for a logger, give one by --logger: {_names(LOGGERS)}")
    interrupted = ["before anything was trained"]
    with report_errors(lambda: interrupted[0]):
        log = None if logger is None else make_logger(logger, log_dir or where / "logs")
        batches = _load(settings)
        run = _build(settings, batches[0])
        with lock_path(where / CONFIG):
            if prepare_folder(where, settings, force, resume):
                typer.echo(f"going on with the run in {where}")
            try:
                run, history, held_out, seconds = _train(settings, place, run, batches, where / CHECKPOINT, log)
                lines, likelihoods = _evaluate(run, held_out, settings)
                predictions = _predict(run, held_out, settings)
                by_weight = settings.recipe in LABEL_IS_NOT_ENCODED
                figures = _draw_figures(run, held_out, history, predictions, seed, by_weight)
                _write(where, settings, run, history, likelihoods, figures)
            except KeyboardInterrupt:
                interrupted[0] = save_interrupted(where, run.model, run.guide, settings)
                if (where / CHECKPOINT).exists():
                    typer.echo(f"go on by: {resume_command(where, settings, device)}", err=True)
                raise
            except BaseException:
                remove_settings(where)
                raise
    _print(settings, run.objective, lines, predictions, held_out.size)
    typer.echo(f"{settings.epochs} epochs in {seconds:.0f} s; written to {where}")


@app.command()
def evaluate(
    directory: Annotated[Path, typer.Argument(help="Folder that pyro-mm train wrote.")],
    data: Data = None,
    device: Device = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Number of test rows to evaluate; by default that of the run.")
    ] = None,
    evidence_particles: Annotated[
        int | None, typer.Option(min=2, help="Draws per row, K, of the likelihoods; by default those of the run.")
    ] = None,
    fitted: Annotated[
        bool | None,
        typer.Option(
            "--fitted/--no-fitted",
            help="Estimate likelihoods by proposals fitted to each row, with the guide's beside them, or by the guide "
            "alone; by default as the run did, and fitted for a run of version 0.2 or earlier.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Load the weights of a run and print its table again, with the same numbers."""
    if not (directory / CONFIG).is_file():
        raise typer.BadParameter(f"there is no {directory / CONFIG}: expected a folder that train wrote")
    if weights_path(directory) is None and not (directory / CHECKPOINT).is_file():
        raise typer.BadParameter(f"there is no {directory / WEIGHTS}: expected a folder that train wrote")
    place = parse_device(device)
    with report_errors(lambda: "nothing was changed"):
        settings = read_settings(directory)
        changed: dict[str, Any] = {
            "data": data and str(data), "rows": rows, "evidence_particles": evidence_particles, "fitted": fitted,
        }  # fmt: skip
        settings = replace(settings, **{name: value for name, value in changed.items() if value is not None})
        train, test = _load(settings)
        run = _build(settings, train)
        epochs = load_run(directory, run.model, run.guide)
        for module in (run.model, run.guide):
            module.to(place)
        test = test.to(place)
        lines, _ = _evaluate(run, test, settings)
        predictions = _predict(run, test, settings)
    _print(settings, run.objective, lines, predictions, test.size)
    if epochs is not None:
        typer.echo(f"the run is unfinished: these are its weights after epoch {epochs} of {settings.epochs}")


@app.command()
def compare(
    dataset: Dataset,
    recipes: Annotated[
        str, typer.Option(help=f"Recipes to compare, two at least, separated by commas. Any of {_names(TRAINED)}.")
    ] = ",".join(COMPARED),
    epochs: Epochs = None,
    batch_size: BatchSize = 128,
    lr: Rate = 3e-3,
    seed: Seed = 0,
    data: Data = None,
    device: Device = None,
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="Folder of the results. By default runs/DATASET-compare.")
    ] = None,
    rows: Rows = 1000,
    evidence_particles: EvidenceParticles = 1000,
    fitted: Fitted = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a comparison that is in the folder already.")] = False,
    test: TestFile = None,
    kinds: Kinds = None,
) -> None:
    """Train several recipes with the same settings, print a table of them, and write it with a plot to a folder.

    The folder gets the table (table.csv), the differences of the joint log-likelihood with their errors
    (comparison.txt), and a plot of these (forest.png).
    """
    place = parse_device(device)
    names = [name.strip() for name in recipes.split(",")]
    source = _source(dataset, test, kinds)
    each = [
        Settings(
            source.dataset, name, None, None, None, epochs or source.epochs, batch_size, lr, seed, 16,
            str(data) if data else None, rows, evidence_particles, False, fitted, *source.file,
        )
        for name in names
    ]  # fmt: skip
    for settings in each:
        _check_choices(settings)
    if len(set(names)) < max(2, len(names)):
        raise typer.BadParameter(f"--recipes: expected two different recipes at least, got {recipes}")
    where = out or Path("runs") / f"{each[0].data_name}-compare"
    if held := [name for name in COMPARISON_FILES if (where / name).exists() and not force]:
        raise typer.BadParameter(
            f"{where} holds a comparison already ({', '.join(held)}). Give --force to replace it, or another folder by "
            "--out"
        )

    columns: dict[str, dict[tuple[str, str], str]] = {}
    evidence: dict[str, Evidence] = {}
    for settings in each:
        with report_errors(lambda: f"{len(columns)} of {len(names)} recipes were trained, and nothing was written"):
            batches = _load(settings)
            run, _, held_out, seconds = _train(settings, place, _build(settings, batches[0]), batches)
            lines, likelihoods = _evaluate(run, held_out, settings)
            predictions = _predict(run, held_out, settings)
        column = {(ln.quantity, name): cell for ln in lines if ln.comparable for name, cell in _column_cells(ln)}
        column |= {("", f"{each.target} accuracy"): f"{each.accuracy:.1%}" for each in predictions}
        columns[settings.recipe] = column | {("", "training, seconds"): f"{seconds:.0f}"}
        evidence[settings.recipe] = likelihoods[0].evidence
    title = (
        f"{settings.data_name}: {held_out.size} test rows, {settings.epochs} epochs each; nats per row ± standard error"
    )
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    table = [(key[1], *(column.get(key, "") for column in columns.values())) for key in keys]
    print_table(title, ("", *columns), table)
    typer.echo(_proposals_text(settings))
    with report_errors(lambda: f"the recipes were trained, and {where} could not be written"):
        _write_comparison(where, ("", *columns), table, compare_models(evidence), title)
    typer.echo(f"written to {where}")


app.command()(reproduce)


# -- from settings to a run -------------------------------------------------------------------------------------


def _key(choices: Mapping[str, Any], name: str, what: str) -> str:
    """Return a name that is one of the choices, or raise a BadParameter that lists them."""
    if name not in choices:
        raise typer.BadParameter(f"unknown {what} {name!r}: expected one of {', '.join(choices)}")
    return name


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


def _source(dataset: str, test: Path | None, kinds: str | None) -> Source:
    """Return the data of a run. Raises a BadParameter for an unknown name, or for options that do not fit to it."""
    if not is_file(dataset):
        if dataset not in EPOCHS:
            raise typer.BadParameter(
                f"unknown data set {dataset!r}: expected one of {_names(EPOCHS)}, or an npz file of arrays"
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
    return Source(str(paths[0]), FILE_EPOCHS, (paths[1], kinds, digest_files(paths)))


def _check_choices(settings: Settings) -> None:
    """Raise a BadParameter for an unknown name, or for a folder of data files that the data do not need."""
    if settings.recipe in REFUSED:
        raise typer.BadParameter(
            f"recipe {settings.recipe!r}: {REFUSED[settings.recipe]}. Train it in Python, by mm.fit, or take one of "
            f"{', '.join(TRAINED)}"
        )
    _key(TRAINED, settings.recipe, "recipe")
    if settings.objective is not None:
        _key(OBJECTIVES, settings.objective, "objective")
    if settings.estimator is not None:
        _key(ESTIMATORS, settings.estimator, "estimator")
    if settings.data is not None and (settings.dataset in WITHOUT_FILES or is_file(settings.dataset)):
        raise typer.BadParameter(f"--data: {settings.data_name} needs no files, leave it out")


def _build(settings: Settings, batch: Batch) -> Recipe:
    """Build model, guide and objective for a batch, under the run's seed, and try the objective on two rows.

    Raises:
        typer.BadParameter: recipe, objective and estimator do not fit together.
    """
    recipe = TRAINED[_key(TRAINED, settings.recipe, "recipe")]
    particles = {} if settings.num_particles is None else {"num_particles": settings.num_particles}
    estimator = None
    if settings.estimator is not None:
        estimator = ESTIMATORS[_key(ESTIMATORS, settings.estimator, "estimator")](**particles)
    torch.manual_seed(settings.seed)
    kinds = parse_kinds(settings.kinds)
    try:
        run = recipe(batch, latent=settings.latent, estimator=estimator, **({"networks": kinds} if kinds else {}))
    except ValueError as error:
        raise with_option(error, settings.data_name) from error
    if settings.objective is not None:
        objective = OBJECTIVES[_key(OBJECTIVES, settings.objective, "objective")](estimator=estimator)
        run = run._replace(objective=objective)
    if estimator is None and particles:
        run.objective.estimator.num_particles = settings.num_particles
    try:
        with temporary_seed(settings.seed, torch.device("cpu")), preserve_buffers(run.model, run.guide):
            run.objective.differentiable_loss(run.model, run.guide, batch[:2])
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    return run


def _load(settings: Settings) -> tuple[Batch, Batch]:
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


def _train(
    settings: Settings,
    device: torch.device,
    run: Recipe,
    batches: tuple[Batch, Batch],
    checkpoint: Path | None = None,
    logger: Any = None,
) -> tuple[Recipe, History, Batch, float]:
    """Train a run on a device; return it with its history, the test rows on the device, and the seconds."""
    start = time.perf_counter()
    train, test = batches
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the training was interrupted")  # the command says so itself
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
            logger=logger,
        )
    raise_if_interrupted(history)
    return run, history, test.to(device), time.perf_counter() - start


class Prediction(NamedTuple):
    """Predicted classes of a modality.

    Attributes:
        target: its name.
        given: the other modalities.
        probabilities: of the classes in every test row, ``(N, C)``.
        accuracy: the share of the rows with a class and another modality whose likeliest class is right.
    """

    target: str
    given: tuple[str, ...]
    probabilities: Tensor
    accuracy: float


def _predict(run: Recipe, test: Batch, settings: Settings) -> list[Prediction]:
    """Predict every modality of classes of the test rows given all others."""
    from .metrics import class_probabilities

    found = []
    for name in label_names(test):
        others = tuple(other for other in test if other != name)
        rows = test.present[name] & torch.stack([test.present[other] for other in others]).any(0)
        if not bool(rows.any()):
            continue
        with temporary_seed(settings.seed, test.device):
            probabilities = class_probabilities(run.model, run.guide, test, name, others, PREDICTIONS)
        right = (probabilities.argmax(-1) == test[name])[rows]
        found.append(Prediction(name, others, probabilities, right.float().mean().item()))
    return found


def _evaluate(run: Recipe, test: Batch, settings: Settings) -> tuple[list[Line], list[Estimates]]:
    """Estimate the likelihoods and bounds of a run: the lines of its table, and the likelihoods behind them."""
    return evaluate_recipe(run, test, settings.evidence_particles, settings.seed, settings.fitted)


# -- what is printed and written --------------------------------------------------------------------------------


def _print(
    settings: Settings, objective: Objective, lines: list[Line], predictions: Sequence[Prediction], size: int
) -> None:
    """Print the table of a run and the lines below it."""
    print_table(f"{settings.recipe} on {settings.data_name}, mean over {size} test rows", *format_lines(lines))
    typer.echo(_proposals_text(settings))
    typer.echo(f"training objective: {objective.estimator_text}; {objective.target}")
    for each in predictions:
        typer.echo(f"{each.target} accuracy given the {' and the '.join(each.given)}: {each.accuracy:.1%}")


def _proposals_text(settings: Settings) -> str:
    """Say what the importance-sampled likelihoods of a table were drawn from."""
    if settings.fitted:
        return f'likelihoods: draws of a proposal {FITTED_TEXT}; "by the guide": draws of the guide, as many'
    return "likelihoods: draws of the guide"


def _column_cells(line: Line) -> list[tuple[str, str]]:
    """Return a line of the table of ``compare`` as pairs (name, cell): its value, its k-hat, and those by the guide."""
    cells = [(line.quantity, f"{line.value:.3f} ± {line.error:.3f}")]
    if line.ess is not None:
        cells.append(("  rows with k-hat > 0.7", format_share(line.untrusted)))
    if line.by_guide is not None:
        cells.append(("  by the guide", f"{line.by_guide.value:.3f} ± {line.by_guide.error:.3f}"))
        cells.append(("  by the guide, rows with k-hat > 0.7", format_share(line.by_guide.untrusted)))
    return cells


def _write_comparison(
    out: Path, header: Sequence[str], rows: Sequence[Sequence[str]], comparison: Comparison, title: str
) -> None:
    """Write the files of a comparison: its table, the differences with their errors, and a plot of these.

    Args:
        out: the folder.
        header, rows: the table as it was printed.
        comparison: of the joint log-likelihoods.
        title: of the table.
    """
    from . import plots

    out.mkdir(parents=True, exist_ok=True)
    with open(out / COMPARISON_FILES[0], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *([cell.strip() for cell in row] for row in rows)])
    (out / COMPARISON_FILES[1]).write_text(f"{title}\n\n{comparison!r}\n", encoding="utf-8")
    figure: Any = plots.forest(comparison).figure
    figure.savefig(out / COMPARISON_FILES[2], dpi=120)


def _draw_figures(
    run: Recipe, test: Batch, history: History, predictions: Sequence[Prediction], seed: int, by_weight: bool
) -> dict[str, Any]:
    """Draw the figures of a run: name -> matplotlib figure.

    Args:
        run: the trained recipe.
        test: test rows.
        history: the history of its training.
        predictions: of classes; the first ones colour the latents and head the images.
        seed: of the draws.
        by_weight: draw images given the label by importance weights.
    """
    from . import metrics, plots

    figures = {"training": plots.training_curve(history)}
    points = encode(run.guide, test)["z"].mean
    if not predictions:
        return figures | {"latent": plots.latent_view(points, title="posterior means").figure}

    name, given, probabilities, _ = predictions[0]
    rows = test.present[name]
    label, classes = test[name][rows], probabilities.shape[-1]
    matrix = metrics.confusion_matrix(label, probabilities.argmax(-1)[rows], classes)
    image = image_name(test)
    if image is not None:
        whole = test[rows]
        first = torch.cat([(label == c).nonzero()[:1, 0] for c in range(classes)])  # the first row of each class
        with temporary_seed(seed, test.device):
            draws = generate(
                run.model, run.guide, whole[first].only(name), SAMPLES_PER_CLASS, mean=[image], resample=by_weight
            )
        title = f"mean {image} given z, z given the {name}"
        figures["generated"] = plots.image_grid(draws[image].transpose(0, 1), rows=label[first].tolist(), title=title)
    others = " and ".join(given)
    return figures | {
        "confusion": plots.confusion(matrix, title=f"{name} given the {others}").figure,
        "latent": plots.latent_view(points[rows], label, title=f"posterior means given {others} and {name}").figure,
    }


def _write(
    out: Path, settings: Settings, run: Recipe, history: History, likelihoods: list[Estimates], figures: dict[str, Any]
) -> None:
    """Write the files of a run, and remove its checkpoint last: a run without one is finished.

    The columns of evidence.csv whose names begin with "guide_" are estimates by draws of the guide, beside others.
    """
    settings.write(out)
    history.to_csv(out / HISTORY)
    save(out / WEIGHTS, run.model, run.guide, notes=asdict(settings))
    with open(out / EVIDENCE, "w", newline="") as file:
        writer = csv.writer(file)
        proposals = {"": [each.evidence for each in likelihoods]}
        if settings.fitted:
            proposals["guide_"] = [each.guide for each in likelihoods]
        writer.writerow(("quantity", "row", *(f"{prefix}{name}" for prefix in proposals for name in COLUMNS)))
        for evidence in zip(*proposals.values(), strict=True):
            columns = [getattr(each, name).tolist() for each in evidence for name in COLUMNS]
            for row, values in enumerate(zip(*columns, strict=True)):
                writer.writerow((evidence[0].quantity, row, *values))
    likelihoods[0].evidence.to_arviz().to_netcdf(str(out / INFERENCE_DATA))
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)
    (out / CHECKPOINT).unlink(missing_ok=True)
