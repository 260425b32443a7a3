"""Names of the command line that stand for values: data sets, recipes, objectives, estimators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar

import typer
from pyro.infer import ELBO

from .. import estimators, objectives
from ..experiments.console import nearest
from ..experiments.runs import Settings
from ..experiments.user_data import is_file
from ..objectives.objective import Objective
from ..recipes import RECIPES

EPOCHS = {"digits": 200, "mnist": 20, "fashion": 20}  # by data set
FILE_EPOCHS = 100  # of a file
WITHOUT_FILES = ("digits",)
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

T = TypeVar("T")


def join_names(names: Iterable[str]) -> str:
    """Return names separated by commas."""
    return ", ".join(names)


def choose(choices: Mapping[str, T], name: str, what: str) -> T:
    """Return the value of a name, or raise a BadParameter that lists the names.

    Args:
        choices: name -> value.
        name: the name as it was given.
        what: kind of the names, for the message.
    """
    if name not in choices:
        raise typer.BadParameter(
            f"unknown {what} {name!r}{nearest(name, choices)}: expected one of {join_names(choices)}"
        )
    return choices[name]


def check_choices(settings: Settings) -> None:
    """Raise a BadParameter for an unknown name, no step size, or a folder of files that the data do not need."""
    if settings.recipe in REFUSED:
        raise typer.BadParameter(
            f"recipe {settings.recipe!r}: {REFUSED[settings.recipe]}. Train it in Python, by mm.fit, or take one of "
            f"{join_names(TRAINED)}"
        )
    choose(TRAINED, settings.recipe, "recipe")
    if settings.objective is not None:
        choose(OBJECTIVES, settings.objective, "objective")
    if settings.estimator is not None:
        choose(ESTIMATORS, settings.estimator, "estimator")
    if not settings.lr > 0:
        raise typer.BadParameter(f"--lr: expected a step size above 0, got {settings.lr:g}")
    if settings.data is not None and (settings.dataset in WITHOUT_FILES or is_file(settings.dataset)):
        raise typer.BadParameter(f"--data: {settings.data_name} needs no files, leave it out")
