"""MNIST and labels by JMVAE-kl with an explicit likelihood alone, and with a discriminator of images beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ... import datasets
from ...batch.batch import Batch
from ...nn import MLP
from ...objectives import ALL, EACH, Discriminator, Objective, Term, warm_up
from ...recipes.modality_networks import ModalityNetworks
from ...recipes.networks import Recipe, joint_guide, shared_latent_model
from ...training.callbacks import WeightAverage
from .generated_images import draw_images, measure, train_judge
from .study import Sample, Study

LABEL_WEIGHT = 10.0  # of a label's likelihood beside that of all pixels
PENALTY = 0.1  # of the discriminator's gradient
LEAKY_RELU = partial(nn.LeakyReLU, 0.2)


def sample_data(seed: int, directory: str | None = None, every: int = 1) -> Sample:
    """Return grey MNIST, 2,000 test rows of it, with a judge; the same for all seeds.

    Args:
        seed: unused; every study has it.
        directory: the folder of the data files.
        every: take one training row of so many.
    """
    train, test = datasets.mnist(directory, binarize=None)
    train, test = train[torch.arange(0, train.size, every)], test[torch.arange(0, test.size, 5)]
    return Sample(train, test, train_judge(train, test, epochs=5))


def recipe(
    batch: Batch,
    latent: int,
    hidden: tuple[int, ...],
    alpha: float = 1.0,
    warm_up_steps: int = 0,
    weight: float | None = None,
) -> Recipe:
    """Build JMVAE-kl, or JMVAE-GAN, with the same networks.

    Args:
        batch: training rows.
        latent: the dimension of z.
        hidden: sizes of the hidden layers of all networks.
        alpha: weight of the KLs from the joint posterior to those of one modality. These KLs spread the posterior of a
            label over all that lies between its images: with the usual 0.1 its images are less often of the label.
        warm_up_steps: steps over which the weight of the prior's KL rises to 1.
        weight: of the discriminator in the decoder's loss; None for no discriminator.
    """
    parts = ModalityNetworks(batch, hidden)
    kl = warm_up(warm_up_steps) if warm_up_steps else 1.0
    table = Objective([Term(ALL, ALL, likelihood={"label": LABEL_WEIGHT}, kl=kl), Term(ALL, (), EACH, kl=alpha)])
    model, guide = shared_latent_model(parts, latent), joint_guide(parts, latent)
    if weight is None:
        return Recipe(model, guide, table)
    net = MLP(batch["image"][0].numel(), 1, hidden, activation=LEAKY_RELU)
    discriminator = Discriminator(net, weight, penalty=PENALTY)
    return Recipe(model, guide, table.with_discriminators({"image": discriminator}))


def _decay(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a constant step size over the first half of the epochs, which falls to 0 over the second."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, 2 * (1 - epoch / epochs)))


def _members(latent: int, hidden: tuple[int, ...], steps: int = 0) -> dict[str, Callable[[Batch], Recipe]]:
    make = partial(recipe, latent=latent, hidden=hidden, warm_up_steps=steps)
    with_discriminator = {f"JMVAE-GAN, weight {weight}": partial(make, weight=float(weight)) for weight in (5, 20)}
    return {"JMVAE-kl": make, **with_discriminator}


_SHORT = Study(
    title="MNIST: JMVAE with a discriminator of images beside the explicit likelihood alone",
    groups={"10,000 images": partial(sample_data, every=6)},
    members=_members(16, (256, 256)),
    measure=measure,
    epochs=150,
    batch_size=128,
    optimizer=lambda run, parameters: torch.optim.Adam(parameters, 1e-3, betas=(0.5, 0.99)),
    scheduler=_decay,
    seeds=1,
    callbacks=lambda: [WeightAverage(0.995)],
    images=draw_images,
)
MNIST = replace(
    _SHORT,
    full=replace(
        _SHORT,
        groups={"60,000 images": sample_data},
        members=_members(64, (512, 512), 20 * 469),
        epochs=100,
        seeds=5,
        compile=True,
    ),
)
