"""Published results, with the data, recipe, training and estimators that reproduce them."""

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
    """A likelihood as a paper estimates it, in nats per row, as the mean over all test rows.

    Args:
        estimate: from (model, guide, batch, num_particles=, seed=) to the likelihood of each row.
        proposal: the proposal, in words.
        published: pairs (source, value) of published results; empty if there is none.
    """

    estimate: Callable[..., Evidence]
    proposal: str
    published: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Reproduction:
    """A recipe trained and evaluated as a paper did.

    Args:
        title: the title of the table.
        data: from ``directory=`` to (train, test).
        recipe: from training rows to (model, guide, objective).
        epochs: epochs of training.
        batch_size: rows per minibatch.
        optimizer: from parameters to an optimiser.
        figures: the published likelihoods; the course of the first one is recorded during training.
        num_particles: draws per row of the likelihoods.
        pixels: the kind of pixels, in words, for the title.
        compile: trace and compile the training step.
        transform: applied to every minibatch; None for none.
    """

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
UNVERIFIED = "Wu & Goodman 2018, unverified"
SIZE: Mapping[str, Any] = {"latent": 64, "hidden": (512, 512)}
WARM_UP = 200 * 600  # steps: 60,000 rows are 600 batches of 100
Data = Callable[..., tuple[Batch, Batch]]
Published = tuple[tuple[str, float], ...]


def _two_layers_of_512(
    title: str, data: Data, recipe: Callable[[Batch], Recipe], figures: Sequence[Figure], eps: float
) -> Reproduction:
    """Build a reproduction at the sizes of Suzuki et al. 2016 and Wu & Goodman 2018.

    Two hidden layers of 512 units, minibatches of 100 rows, 500 epochs, a warm-up of the prior's KL over the first
    200, and training pixels sampled anew in every epoch.
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
    """Build the reproduction of JMVAE-kl: latent of 64 dimensions, alpha 0.1, Adam with eps 1e-4.

    The encoders of the label are embeddings. Over ten classes they can represent every function that the paper's two
    layers on a one-hot vector can, but they train differently.

    References:
        Suzuki, Nakayama & Matsuo 2016 (arXiv:1611.01891).
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
    return _two_layers_of_512(title, data, recipe, figures, eps=1e-4)


def _mvae(
    title: str, data: Data, image: Published = (), joint: Published = (), conditional: Published = ()
) -> Reproduction:
    """Build the reproduction of MVAE: latent of 64 dimensions, the label's likelihood times 50.

    The published figures are from a secondary source that does not name the proposal; here each likelihood has its own
    posterior as proposal.

    References:
        Wu & Goodman 2018 (arXiv:1802.05335).
    """
    figures = (
        Figure(partial(protocols.single, **IMAGE), "q(z | image)", image),
        Figure(partial(protocols.joint, **IMAGE), "q(z | image, label)", joint),
        Figure(partial(log_conditional, **IMAGE), "each under its own posterior", conditional),
    )
    recipe = partial(mvae, **SIZE, label_weight=50.0, kl=objectives.warm_up(WARM_UP))
    return _two_layers_of_512(title, data, recipe, figures, eps=1e-8)


REPRODUCTIONS: Mapping[str, Reproduction] = {
    "jmvae-mnist": _jmvae(
        "JMVAE-kl(0.1) on MNIST", datasets.mnist, (("Suzuki et al. 2016", -86.86), ("a reproduction of it", -86.85))
    ),
    "jmvae-fashion": _jmvae("JMVAE-kl(0.1) on Fashion-MNIST, which is not in the paper", datasets.fashion),
    "mvae-mnist": _mvae(
        "MVAE on MNIST", datasets.mnist, ((UNVERIFIED, -86.026),), ((UNVERIFIED, -86.255),), ((UNVERIFIED, -83.970),)
    ),
    "mvae-fashion": _mvae("MVAE on Fashion-MNIST", datasets.fashion),
}
"""The names of ``pyro-mm reproduce`` for one paper each."""
