"""Recipes whose decoders learn from a discriminator too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import nn

from .. import objectives
from ..batch.batch import Batch
from ..nn import MLP, Convolutional
from ..objectives.terms import Number
from ..objectives.vae_gan import VAEGAN, Discriminator
from ..utils.arguments import check_number
from .modality_networks import Hidden, ModalityNetworks, NetworksOf, convolution_channels
from .networks import HIDDEN, LATENT, Estimator, Recipe, check_recipe_arguments, joint_guide, shared_latent_model

LEAKY_RELU = partial(nn.LeakyReLU, 0.2)
IMAGES = ("bits", "grey", "array")  # kinds of modalities that get a discriminator, if they have two dimensions or more


@check_recipe_arguments
def jmvae_gan(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    alpha: float = 0.1,
    kl: Number = 1.0,
    weight: float = 1.0,
    *,
    networks: NetworksOf = None,
    discriminators: Mapping[str, Discriminator] | None = None,
) -> Recipe:
    """JMVAE-GAN: JMVAE-kl whose decoders of images also learn from a discriminator of what they generate.

    Model, guide and table: those of :func:`jmvae_kl`. Images are VAE-GAN modalities
    (:mod:`pyro_mm.objectives.vae_gan`): they keep their explicit likelihood, of which all evidence is, and the decoder
    and the discriminator of each have updates of their own.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        alpha: weight of the KLs from the joint posterior to the unimodal ones.
        kl: weight of the prior's KL, or a warm-up of it.
        weight: of each discriminator in the loss of its decoder; the paper's is 1.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.
        discriminators: modality -> :class:`~pyro_mm.objectives.Discriminator`, each with a weight of its own; None for
            one of every image, with leaky ReLUs: convolutions of a colour image, else a perceptron.

    Raises:
        ValueError: a batch without images and no discriminators.

    References:
        Suzuki et al. 2016 (arXiv:1611.01891). They train by Adam with a step size of 1e-4 and a first moment of 0.5,
        warm ``kl`` up over 20 of 100 epochs, and draw latents of generated images from U(-1, 1):
        ``Discriminator(latents="uniform")``.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    model, guide = shared_latent_model(parts, latent), joint_guide(parts, latent)
    table = objectives.jmvae_kl(check_number("alpha", alpha), estimator, kl=kl)
    if discriminators is None:
        images = [name for name in parts.names if parts.kind(name) in IMAGES and len(parts.event(name)) > 1]
        if not images:
            raise ValueError(
                "the batch has no images, floats (N, H, W) or (N, C, H, W): name the modalities of discriminators"
            )
        discriminators = {name: Discriminator(_network(parts, name), weight) for name in images}
    return Recipe(model, guide, VAEGAN(table, discriminators))


def _network(parts: ModalityNetworks, name: str) -> nn.Module:
    """Build a discriminator of an image: convolutions if it has colours, else a perceptron."""
    event, hidden = parts.event(name), parts.hidden
    channels = convolution_channels(event)
    if not channels:
        values = parts.batch[name][0].numel()
        return MLP(values, 1, hidden, activation=LEAKY_RELU)
    width = hidden[-1] if hidden else channels[-1]
    convolutions = Convolutional(event, width, channels, activation=LEAKY_RELU)
    return nn.Sequential(convolutions, LEAKY_RELU(), nn.Linear(width, 1))
