"""What papers report, and all that it takes to measure the same: data, recipe, training, estimator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import datasets, objectives, protocols
from ..batch import Batch
from ..evidence import Evidence
from ..likelihood import log_conditional
from .flows import jnf, jnf_second
from .joint import jmvae_kl, jmvae_zero, telbo, vaevae_joint
from .parts import Recipe
from .pooled import code, hoelder, mmjsd, mmvae, mmvm, mopoe, mvae, mvtcae, unimodal_mean, vaevae
from .private import dmvae, mmvae_plus
from .single import cvae, vae


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


@dataclass(frozen=True)
class Member:
    """A recipe among others of its family: of the image alone, of the image given the label, or of both."""

    recipe: Callable[[Batch], Recipe]
    encodes_image: bool = True  # whether the latent can be inferred from the image alone
    knows_label: bool = True  # whether the label is in its story
    second: Callable[[Recipe], Recipe] | None = None  # from what was trained to a second stage, of as many epochs


@dataclass(frozen=True)
class Family:
    """Recipes trained alike on the same data, to be measured side by side.

    With more than one of ``fractions``, each of them is also trained on rows of which only one in so many is paired,
    the others having one modality each.
    """

    title: str
    data: Callable[..., tuple[Batch, Batch]]
    members: Mapping[str, Member]
    epochs: int
    batch_size: int
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    num_particles: int
    pixels: str
    fractions: tuple[int, ...] = (1,)
    compile: bool = True
    transform: None = None


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


def _family(title: str, data: Data) -> Family:
    """No paper's: one latent of 20 dimensions, one hidden layer of 400 everywhere, Adam, and no weighed likelihood."""
    size: Mapping[str, Any] = {"latent": 20, "hidden": (400,)}
    return Family(
        title=title,
        data=data,
        members={
            "VAE": Member(partial(vae, **size), knows_label=False),
            "CVAE": Member(partial(cvae, **size), encodes_image=False),
            "JMVAE-zero": Member(partial(jmvae_zero, **size)),
            "JMVAE-kl": Member(partial(jmvae_kl, **size)),
            "MVAE": Member(partial(mvae, **size)),
            "TELBO": Member(partial(telbo, **size)),
            "VAEVAE": Member(partial(vaevae, **size)),
            "MMVAE": Member(partial(mmvae, **size)),
            "MoPoE": Member(partial(mopoe, **size)),
            "MVTCAE": Member(partial(mvtcae, **size)),
            "mmJSD": Member(partial(mmjsd, **size)),
            "JNF": Member(partial(jnf, **size), second=jnf_second),
        },
        epochs=20,
        batch_size=128,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3, fused=True),
        num_particles=1000,
        pixels="pixels drawn once",
    )


def _weak() -> Family:
    """No paper's either: the digits that need no file, at the sizes of the recipes, and every objective that trains on
    rows with one modality each."""
    members = {
        "JMVAE-zero": jmvae_zero, "JMVAE-kl": jmvae_kl, "MVAE": mvae, "TELBO": telbo, "VAEVAE": vaevae,
        "VAEVAE, joint encoder": vaevae_joint, "MMVAE": mmvae, "mean of unimodal": unimodal_mean, "MoPoE": mopoe,
        "MVTCAE": mvtcae, "mmJSD": mmjsd, "DMVAE": dmvae, "MMVAE+": mmvae_plus, "MMVM": mmvm, "CoDE": code,
        "Hoelder": hoelder,
    }  # fmt: skip
    return Family(
        title="Digits and labels, few of them paired",
        data=lambda directory=None, binarize=None: datasets.digits(),
        members={name: Member(recipe) for name, recipe in members.items()},
        epochs=100,
        batch_size=128,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 3e-3, fused=True),
        num_particles=1000,
        pixels="pixels 0 or 1",
        fractions=(1, 2, 4, 8, 16),
        compile=False,
    )


FAMILIES: Mapping[str, Family] = {
    "family-mnist": _family("Twelve models of MNIST images and labels", datasets.mnist),
    "family-fashion": _family("Twelve models of Fashion-MNIST images and labels", datasets.fashion),
    "weak-digits": _weak(),
}
"""The names of ``pyro-mm reproduce`` for tables of many recipes."""
