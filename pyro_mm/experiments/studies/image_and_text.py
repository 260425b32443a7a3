"""Recipes of Wu & Goodman 2019 for images beside other modalities: the symmetrised bound, and four kinds of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import conditionals
from ...batch.batch import Batch
from ...nn import MLP, Convolutional, Deconvolutional
from ...objectives import VAEGAN, Critic, Discriminator, Objective, warm_up
from ...objectives.terms import ALL, EACH, OTHERS, Number, Term
from ...recipes import Networks, Recipe, vae, vaevae, vaevae_flow, vaevae_joint

IMAGE = "image"
COUNTS = ("strokes",)  # modalities that are counts, and would be read as something else
NOISE = 16  # dimensions of an implicit image's noise
PENALTY = 0.1  # of the gradient of critic and discriminator
DISCRIMINATOR_WEIGHT = 5.0
CRITIC_WEIGHT = 10.0  # of the other modalities beside a critic, whose ratio is worth fewer nats than all pixels
WARM_UP = 1000  # steps, of KL and critic

_leaky = partial(nn.LeakyReLU, 0.2)


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


def image_networks(batch: Batch, sizes: Sizes, decode: bool = True) -> dict[str, Networks]:
    """Return the networks of the image, and the kind of counts, for ``networks=`` of a recipe.

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

    counts = {name: Networks(kind="counts") for name in COUNTS if name in batch}
    return {IMAGE: Networks(encoder, decoder if decode else None), **counts}


def with_convolutions(make: Callable[..., Recipe], batch: Batch, sizes: Sizes) -> Recipe:
    """Build a recipe whose images are encoded and decoded by convolutions.

    Args:
        make: the recipe.
        batch: training rows.
        sizes: of the networks.
    """
    return make(batch, sizes.latent, (sizes.hidden,), networks=image_networks(batch, sizes))


def with_flow(batch: Batch, sizes: Sizes) -> Recipe:
    """Build the symmetrised bound with a product of experts, and images of bits decoded by a flow."""
    networks = image_networks(batch, sizes, decode=False)
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
    return Recipe(run.model, run.guide, _weighted_table(batch, weight))


def _weighted_table(batch: Batch, weight: float, image: Number = 1.0) -> Objective:
    """Return the table of the symmetrised bound with weights.

    Args:
        batch: training rows.
        weight: of all likelihoods but the image's.
        image: weight of the image's likelihood and of the KLs, or a warm-up of them.
    """
    weights: dict[str, Number] = {name: image if name == IMAGE else weight for name in batch}
    table = [
        Term(EACH, EACH, average=True, likelihood=weights, kl=image),
        Term(ALL, OTHERS, EACH, average=True, likelihood=weights, kl=image),
    ]
    return Objective(table)


def with_discriminator(batch: Batch, sizes: Sizes) -> Recipe:
    """Build the product of experts whose images are a VAE-GAN modality: a likelihood, and a discriminator beside it."""
    run = with_convolutions(vaevae, batch, sizes)
    convolutions = Convolutional(batch[IMAGE].shape[1:], sizes.hidden, sizes.channels, _leaky)
    net = nn.Sequential(convolutions, _leaky(), nn.Linear(sizes.hidden, 1))
    discriminator = Discriminator(net, DISCRIMINATOR_WEIGHT, penalty=PENALTY)
    assert isinstance(run.objective, Objective)
    return Recipe(run.model, run.guide, VAEGAN(run.objective, {IMAGE: discriminator}))


def with_critic(batch: Batch, sizes: Sizes) -> Recipe:
    """Build the product of experts with implicit images, trained by critics against the posterior."""
    shape = batch[IMAGE].shape[1:]
    networks = image_networks(batch, sizes)

    def generator(inputs: int) -> nn.Module:
        up = Deconvolutional(sizes.hidden, shape, sizes.channels[::-1])
        net = nn.Sequential(nn.Linear(inputs + NOISE, sizes.hidden), nn.ReLU(), up, nn.Sigmoid())
        return conditionals.Implicit(net, NOISE, shape)

    networks[IMAGE] = replace(networks[IMAGE], decoder=generator)
    run = vaevae(batch, sizes.latent, (sizes.hidden,), networks=networks)
    critic = Critic(PairNetwork(shape, sizes), penalty=PENALTY)
    objective = _weighted_table(batch, CRITIC_WEIGHT, warm_up(WARM_UP)).with_critics({IMAGE: critic})
    return Recipe(run.model, run.guide, objective)


class PairNetwork(nn.Module):
    """The network of a critic of an image and a latent: convolutions, and a perceptron of their features and z.

    Args:
        shape: of the image.
        sizes: of the networks.
    """

    def __init__(self, shape: tuple[int, ...], sizes: Sizes):
        super().__init__()
        self.shape = tuple(shape)
        self.image = nn.Sequential(Convolutional(shape, sizes.hidden, sizes.channels, _leaky), _leaky())
        self.head = MLP(sizes.hidden + sizes.latent, 3, (sizes.hidden,), activation=_leaky)

    def forward(self, pairs: Tensor) -> Tensor:
        """Return logits ``(.., 3)`` of pairs ``(.., pixels + latent)``."""
        pixels = torch.Size(self.shape).numel()
        image = pairs[..., :pixels].unflatten(-1, self.shape)
        logits: Tensor = self.head(torch.cat([self.image(image), pairs[..., pixels:]], -1))
        return logits


MEMBERS: Mapping[str, Callable[[Batch, Sizes], Recipe]] = {
    "image alone": partial(with_convolutions, vae),
    "product of experts": partial(with_convolutions, vaevae),
    "joint encoder": partial(with_convolutions, vaevae_joint),
    "text x 20, product of experts": partial(with_weight, 20.0),
    "flow of images": with_flow,
    "VAE-GAN of images": with_discriminator,
    "implicit images": with_critic,
}
"""The VAE of the image, and the symmetrised bound in its forms and with other kinds of images."""


def adam(run: Recipe, parameters: Any) -> torch.optim.Optimizer:
    """Return the optimiser of a member: with a smaller step and first moment beside critics and discriminators."""
    plays = isinstance(run.objective, VAEGAN) or bool(getattr(run.objective, "critics", {}))
    return torch.optim.Adam(parameters, 1e-3 if plays else 2e-3, betas=(0.5 if plays else 0.9, 0.99), fused=True)


def decay(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a constant step size over the first half of the epochs, which falls to nearly 0 over the second."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, 2 * (1 - epoch / epochs)))


def members(sizes: Sizes, *names: str) -> dict[str, Callable[[Batch], Recipe]]:
    """Return members as functions of training rows.

    Args:
        sizes: of all networks.
        names: keys of ``MEMBERS``; none for all.
    """

    def of_size(make: Callable[[Batch, Sizes], Recipe]) -> Callable[[Batch], Recipe]:
        return lambda batch: make(batch, sizes)

    return {name: of_size(MEMBERS[name]) for name in names or MEMBERS}
