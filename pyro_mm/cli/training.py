"""Training of a recipe as its settings say, and the numbers of its test rows."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from torch import Tensor

from ..batch.batch import Batch
from ..experiments.estimates import Estimates
from ..experiments.evaluation import Line, evaluate_recipe
from ..experiments.runs import Settings
from ..experiments.user_data import label_names, parse_kinds, with_option
from ..recipes import Recipe
from ..training.history import History, raise_if_interrupted
from ..training.loop import fit
from ..utils.modules import preserve_buffers
from ..utils.seeding import temporary_seed
from .choices import ESTIMATORS, OBJECTIVES, TRAINED, choose

PREDICTIONS = 100  # draws of z per predicted label


def build_recipe(settings: Settings, batch: Batch) -> Recipe:
    """Build model, guide and objective for a batch, under the run's seed, and try the objective on two rows.

    Raises:
        typer.BadParameter: recipe, objective and estimator do not fit together.
    """
    recipe = choose(TRAINED, settings.recipe, "recipe")
    particles = {} if settings.num_particles is None else {"num_particles": settings.num_particles}
    estimator = None
    if settings.estimator is not None:
        estimator = choose(ESTIMATORS, settings.estimator, "estimator")(**particles)
    torch.manual_seed(settings.seed)
    kinds = parse_kinds(settings.kinds)
    try:
        run = recipe(batch, latent=settings.latent, estimator=estimator, **({"networks": kinds} if kinds else {}))
    except ValueError as error:
        raise with_option(error, settings.data_name) from error
    if settings.objective is not None:
        objective = choose(OBJECTIVES, settings.objective, "objective")(estimator=estimator)
        run = run._replace(objective=objective)
    if estimator is None and particles:
        run.objective.estimator.num_particles = settings.num_particles
    try:
        with temporary_seed(settings.seed, torch.device("cpu")), preserve_buffers(run.model, run.guide):
            run.objective.differentiable_loss(run.model, run.guide, batch[:2])
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    return run


def train_rows(
    settings: Settings,
    device: torch.device,
    run: Recipe,
    batches: tuple[Batch, Batch],
    checkpoint: Path | None = None,
    logger: Any = None,
) -> tuple[History, Batch, float]:
    """Train a recipe in place on a device.

    Returns:
        (history, test, seconds): its history, the test rows on the device, and the time that it took.

    Raises:
        KeyboardInterrupt: Ctrl-C ended the training, and the checkpoint is written.
    """
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
    return history, test.to(device), time.perf_counter() - start


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


class Measurements(NamedTuple):
    """Numbers of a trained recipe on test rows.

    Attributes:
        lines: the lines of its table.
        likelihoods: the likelihoods behind them.
        predictions: of modalities of classes.
        size: number of test rows.
    """

    lines: list[Line]
    likelihoods: list[Estimates]
    predictions: list[Prediction]
    size: int


def measure(run: Recipe, test: Batch, settings: Settings) -> Measurements:
    """Estimate likelihoods and bounds of a trained recipe on test rows, and predict its classes."""
    lines, likelihoods = evaluate_recipe(run, test, settings.evidence_particles, settings.seed, settings.fitted)
    return Measurements(lines, likelihoods, predict_classes(run, test, settings.seed), test.size)


def predict_classes(run: Recipe, test: Batch, seed: int) -> list[Prediction]:
    """Predict every modality of classes of the test rows given all others."""
    from ..metrics import class_probabilities

    found = []
    for name in label_names(test):
        others = tuple(other for other in test if other != name)
        rows = test.present[name] & torch.stack([test.present[other] for other in others]).any(0)
        if not bool(rows.any()):
            continue
        with temporary_seed(seed, test.device):
            probabilities = class_probabilities(run.model, run.guide, test, name, others, PREDICTIONS)
        right = (probabilities.argmax(-1) == test[name])[rows]
        found.append(Prediction(name, others, probabilities, right.float().mean().item()))
    return found
