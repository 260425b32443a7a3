"""Families of recipes that are trained alike on the same data, to be measured side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import datasets
from ..batch.batch import Batch
from ..recipes import Recipe
from ..recipes.experts import code, hoelder, mmjsd, mmvae, mmvm, mopoe, mvae, mvtcae, unimodal_mean, vaevae
from ..recipes.flows import jnf, jnf_second, vaevae_flow
from ..recipes.joint_encoder import jmvae_kl, jmvae_zero, telbo, vaevae_joint
from ..recipes.private_latents import dmvae, mmvae_plus
from ..recipes.unimodal import cvae, vae
from .published import Data


@dataclass(frozen=True)
class Member:
    """A recipe of a family: of the image alone, of the image given the label, or of both.

    Args:
        recipe: from training rows to (model, guide, objective).
        encodes_image: the latent can be inferred from the image alone.
        knows_label: the story has the label.
        knows_mean: the mean image given z is known, and is what is judged; False for draws.
        second: from the trained recipe to a second stage, trained for as many epochs; None for none.
    """

    recipe: Callable[[Batch], Recipe]
    encodes_image: bool = True
    knows_label: bool = True
    knows_mean: bool = True
    second: Callable[[Recipe], Recipe] | None = None


@dataclass(frozen=True)
class Family:
    """Recipes trained alike on the same data, to be measured side by side.

    Args:
        title: the title of the tables.
        data: from ``directory=`` and ``binarize=`` to (train, test).
        members: name -> recipe.
        epochs: epochs of training, of each stage.
        batch_size: rows per minibatch.
        optimizer: from parameters to an optimiser.
        num_particles: draws per row of the likelihoods.
        pixels: the kind of pixels, in words, for the title.
        fractions: numbers n; for each, every member is trained with one row in n paired, and one modality in every
            other row. ``(1,)`` is one training on whole rows.
        compile: trace and compile the training step.
        transform: none; every kind of reproduction has this attribute.
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


def _family_of_twelve(title: str, data: Data) -> Family:
    """Build the family of twelve recipes, at sizes of no particular paper.

    One latent of 20 dimensions, one hidden layer of 400 units everywhere, Adam, and no weighted likelihoods.
    """
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


def _weakly_paired() -> Family:
    """Build the family for few paired rows: digits, and all recipes that train on rows with one modality each.

    Sizes are the defaults of the recipes, and of no particular paper.
    """
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


def _weak_supervision() -> Family:
    """Build the family of Wu & Goodman's bound in its forms, and a VAE, with one row in 1 to 64 paired.

    Sizes are the defaults of the recipes. Images are decoded by Bernoullis, and in the last member by a flow.
    """
    size: Mapping[str, Any] = {"latent": 16, "hidden": (128,)}
    return Family(
        title="Digits and labels by the symmetrised bound, few of them paired",
        data=lambda directory=None, binarize=None: datasets.digits(),
        members={
            "VAE": Member(partial(vae, **size), knows_label=False),
            "product of experts": Member(partial(vaevae, **size)),
            "joint encoder": Member(partial(vaevae_joint, **size)),
            "flow of images": Member(partial(vaevae_flow, **size, steps=2, channels=16), knows_mean=False),
        },
        epochs=60,
        batch_size=128,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 3e-3, fused=True),
        num_particles=100,
        pixels="pixels 0 or 1",
        fractions=(1, 2, 4, 8, 16, 32, 64),
        compile=False,
    )


FAMILIES: Mapping[str, Family] = {
    "family-mnist": _family_of_twelve("Twelve models of MNIST images and labels", datasets.mnist),
    "family-fashion": _family_of_twelve("Twelve models of Fashion-MNIST images and labels", datasets.fashion),
    "weak-digits": _weakly_paired(),
    "weak-supervision": _weak_supervision(),
}
"""The names of ``pyro-mm reproduce`` for tables of many recipes."""
