"""Recipes of Wu & Goodman 2019 for images beside other modalities, with convolutions of one size in all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from ... import conditionals
from ...batch.batch import Batch
from ...nn import Convolutional, Deconvolutional
from ...objectives import Objective
from ...objectives.terms import ALL, EACH, OTHERS, Term
from ...recipes import Networks, Recipe, vae, vaevae, vaevae_flow, vaevae_joint

IMAGE = "image"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the networks of a recipe.

    Attributes:
        latent: dimensions of z.
        hidden: units of the hidden layer of every network, and of recurrent states.
        channels: of the convolutions of an image's encoder, and in reverse of its decoder.
        flow_steps: of each scale of a flow of images.
        flow_channels: of its couplings' networks.
    """

    latent: int = 32
    hidden: int = 128
    channels: tuple[int, ...] = (16, 32)
    flow_steps: int = 2
    flow_channels: int = 16


def convolutions(batch: Batch, sizes: Sizes, decode: bool = True) -> dict[str, Networks]:
    """Return the networks of the image, for ``networks=`` of a recipe.

    Args:
        batch: rows, for the shape of the image.
        sizes: of the networks.
        decode: False for the encoder alone.
    """
    shape = batch[IMAGE].shape[1:]

    def encoder(out: int) -> nn.Module:
        layers = Convolutional(shape, sizes.hidden, sizes.channels)
        return nn.Sequential(layers, nn.ReLU(), nn.Linear(sizes.hidden, out))

    def decoder(inputs: int) -> nn.Module:
        up = Deconvolutional(sizes.hidden, shape, sizes.channels[::-1])
        return conditionals.Bernoulli(nn.Sequential(nn.Linear(inputs, sizes.hidden), nn.ReLU(), up), shape)

    return {IMAGE: Networks(encoder, decoder if decode else None)}


def with_convolutions(make: Callable[..., Recipe], batch: Batch, sizes: Sizes) -> Recipe:
    """Build a recipe whose images are encoded and decoded by convolutions.

    Args:
        make: the recipe.
        batch: training rows.
        sizes: of the networks.
    """
    return make(batch, sizes.latent, (sizes.hidden,), networks=convolutions(batch, sizes))


def with_flow(batch: Batch, sizes: Sizes) -> Recipe:
    """Build the symmetrised bound with a product of experts, and images of bits decoded by a flow."""
    networks = convolutions(batch, sizes, decode=False)
    flow: dict[str, Any] = {"steps": sizes.flow_steps, "channels": sizes.flow_channels}
    return vaevae_flow(batch, sizes.latent, (sizes.hidden,), networks=networks, **flow)


def with_weight(weight: float, batch: Batch, sizes: Sizes) -> Recipe:
    """Build the product of experts with all likelihoods but the image's weighted: a surrogate, and no bound.

    Args:
        weight: of these likelihoods.
        batch: training rows.
        sizes: of the networks.
    """
    run = with_convolutions(vaevae, batch, sizes)
    weights = {name: weight for name in batch if name != IMAGE}
    table = [
        Term(EACH, EACH, average=True, likelihood=weights),
        Term(ALL, OTHERS, EACH, average=True, likelihood=weights),
    ]
    return Recipe(run.model, run.guide, Objective(table))


MEMBERS: Mapping[str, Callable[[Batch, Sizes], Recipe]] = {
    "image alone": partial(with_convolutions, vae),
    "product of experts": partial(with_convolutions, vaevae),
    "joint encoder": partial(with_convolutions, vaevae_joint),
    "text x 20, product of experts": partial(with_weight, 20.0),
    "flow of images": with_flow,
}
"""The VAE of the image, and the symmetrised bound in its forms."""


def members(sizes: Sizes, *names: str) -> dict[str, Callable[[Batch], Recipe]]:
    """Return members as functions of training rows.

    Args:
        sizes: of all networks.
        names: keys of ``MEMBERS``; none for all.
    """

    def of_size(make: Callable[[Batch, Sizes], Recipe]) -> Callable[[Batch], Recipe]:
        return lambda batch: make(batch, sizes)

    return {name: of_size(MEMBERS[name]) for name in names or MEMBERS}
