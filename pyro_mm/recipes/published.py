"""What papers report, and all that it takes to measure the same: data, recipe, training, estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import datasets, objectives, protocols
from ..batch import Batch
from ..evidence import Evidence
from ..likelihood import log_conditional
from .joint import jmvae_kl
from .parts import Recipe


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
    transform: Callable[[Batch], Batch] | None = None


IMAGE: Mapping[str, Any] = {"target": ("image",), "given": ("label",)}


def _jmvae(data: Callable[..., tuple[Batch, Batch]], title: str, published: tuple[tuple[str, float], ...]) -> Any:
    """Suzuki et al. 2016 (arXiv:1611.01891): latent 64, two hidden layers of 512, Adam with eps 1e-4, batches of 100,
    500 epochs, the weight of the prior's KL rising over the first 200, training pixels drawn anew in every epoch.
    """
    warm_up = objectives.warm_up(200 * 600)  # steps: 60,000 rows are 600 batches
    return Reproduction(
        title=title,
        data=partial(data, binarize="dynamic"),
        recipe=partial(jmvae_kl, latent=64, hidden=(512, 512), alpha=0.1, kl=warm_up),
        epochs=500,
        batch_size=100,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3, eps=1e-4, fused=True),
        figures=(
            Figure(partial(protocols.multiple, **IMAGE), "q(z | image, label)", published),
            Figure(partial(protocols.single, **IMAGE), "q(z | image)"),
            Figure(partial(protocols.joint, **IMAGE), "q(z | image, label)"),
            Figure(partial(protocols.conditional, **IMAGE), f"p(z) for log p(label), K = {protocols.PRIOR_DRAWS}"),
            Figure(partial(log_conditional, **IMAGE), "each under its own posterior"),
            Figure(partial(protocols.both_ways, **IMAGE), "each under its own posterior"),
        ),
        num_particles=1000,
        pixels="training pixels drawn anew in every epoch, test pixels once",
        transform=datasets.drawn("image"),
    )


REPRODUCTIONS: Mapping[str, Reproduction] = {
    "jmvae-mnist": _jmvae(
        datasets.mnist, "JMVAE-kl(0.1) on MNIST", (("Suzuki et al. 2016", -86.86), ("a reproduction of it", -86.85))
    ),
    "jmvae-fashion": _jmvae(datasets.fashion, "JMVAE-kl(0.1) on Fashion-MNIST, which is not in the paper", ()),
}
"""The names of ``pyro-mm reproduce``."""
