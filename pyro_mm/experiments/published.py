"""What papers report, and all that it takes to measure the same: data, recipe, training, estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import datasets, objectives
from ..batch.batch import Batch
from ..evidence import protocols
from ..evidence.evidence import Evidence
from ..evidence.likelihood import log_conditional
from ..recipes.experts import mvae
from ..recipes.joint_encoder import jmvae_kl
from ..recipes.networks import Recipe


@dataclass(frozen=True)
class Figure:
    """A likelihood as a paper estimates it, in nats a row, the mean over all test rows.

    ``published`` is (value, what it is from) for every figure in print, and empty where there is none to compare.
    """

    estimate: Callable[..., Evidence]
    proposal: str
    published: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """A recipe on data, trained and measured as a paper did. ``figures[0]`` is the one whose course is recorded."""

    title: str
    data: Callable[..., tuple[Batch, Batch]]
    recipe: Callable[[Batch], Recipe]
    epochs: int
    batch_size: int
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    figures: tuple[Figure, ...]
    num_particles: int
    pixels: str
    compile: bool = True
    transform: Callable[[Batch], Batch] | None = None


IMAGE: Mapping[str, Any] = {"target": ("image",), "given": ("label",)}


UNSURE = "Wu & Goodman 2018, unverified"
SIZE: Mapping[str, Any] = {"latent": 64, "hidden": (512, 512)}
WARM_UP = 200 * 600  # steps: 60,000 rows are 600 batches of 100
Data = Callable[..., tuple[Batch, Batch]]
Published = tuple[tuple[str, float], ...]


def _of_digits(
    title: str, data: Data, recipe: Callable[[Batch], Recipe], figures: Sequence[Figure], eps: float
) -> Reproduction:
    """Suzuki et al. 2016 and Wu & Goodman 2018: two hidden layers of 512, batches of 100, 500 epochs, the weight of the
    prior's KL rising over the first 200, and training pixels drawn anew in every epoch.
    """
    return Reproduction(
        title=title,
        data=partial(data, binarize="dynamic"),
        recipe=recipe,
        epochs=500,
        batch_size=100,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3, eps=eps, fused=True),
        figures=tuple(figures),
        num_particles=1000,
        pixels="training pixels drawn anew in every epoch, test pixels once",
        transform=datasets.drawn("image"),
    )


def _jmvae(title: str, data: Data, published: Published = ()) -> Reproduction:
    """Suzuki et al. 2016 (arXiv:1611.01891): latent 64, alpha 0.1, Adam with eps 1e-4.

    The label's encoders are tables with a row for each class, which over ten classes are whatever their two layers on a
    one-hot vector can be, but are not trained alike.
    """
    figures = (
        Figure(partial(protocols.multiple, **IMAGE), "q(z | image, label)", published),
        Figure(partial(protocols.single, **IMAGE), "q(z | image)"),
        Figure(partial(protocols.joint, **IMAGE), "q(z | image, label)"),
        Figure(partial(protocols.conditional, **IMAGE), f"p(z) for log p(label), K = {protocols.PRIOR_DRAWS}"),
        Figure(partial(log_conditional, **IMAGE), "each under its own posterior"),
        Figure(partial(protocols.both_ways, **IMAGE), "each under its own posterior"),
    )
    recipe = partial(jmvae_kl, **SIZE, alpha=0.1, kl=objectives.warm_up(WARM_UP))
    return _of_digits(title, data, recipe, figures, eps=1e-4)


def _mvae(title: str, data: Data, x: Published = (), both: Published = (), conditional: Published = ()) -> Reproduction:
    """Wu & Goodman 2018 (arXiv:1802.05335): latent 64, the label's likelihood times 50. Their figures are from a
    secondary source, and say nothing of the proposal: each here is under its own posterior."""
    figures = (
        Figure(partial(protocols.single, **IMAGE), "q(z | image)", x),
        Figure(partial(protocols.joint, **IMAGE), "q(z | image, label)", both),
        Figure(partial(log_conditional, **IMAGE), "each under its own posterior", conditional),
    )
    recipe = partial(mvae, **SIZE, label_weight=50.0, kl=objectives.warm_up(WARM_UP))
    return _of_digits(title, data, recipe, figures, eps=1e-8)


REPRODUCTIONS: Mapping[str, Reproduction] = {
    "jmvae-mnist": _jmvae(
        "JMVAE-kl(0.1) on MNIST", datasets.mnist, (("Suzuki et al. 2016", -86.86), ("a reproduction of it", -86.85))
    ),
    "jmvae-fashion": _jmvae("JMVAE-kl(0.1) on Fashion-MNIST, which is not in the paper", datasets.fashion),
    "mvae-mnist": _mvae(
        "MVAE on MNIST", datasets.mnist, ((UNSURE, -86.026),), ((UNSURE, -86.255),), ((UNSURE, -83.970),)
    ),
    "mvae-fashion": _mvae("MVAE on Fashion-MNIST", datasets.fashion),
}
"""The names of ``pyro-mm reproduce``."""


"""The names of ``pyro-mm reproduce`` for tables of many recipes."""
