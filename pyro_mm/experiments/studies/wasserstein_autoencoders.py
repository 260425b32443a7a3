"""Autoencoders of MNIST whose codes are pulled to the prior by a batch statistic, or by a KL, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import conditionals, datasets
from ...batch.batch import Batch
from ...distributions.sample_statistics import sliced_wasserstein, squared_mmd
from ...models import SharedLatent
from ...nn import MLP
from ...objectives import MMD, Objective, SlicedWasserstein, elbo
from ...posteriors import Either
from ...posteriors.guide import Guide
from ...recipes.networks import Recipe, standard_prior
from ...sampling.encode import encode
from ...utils.seeding import temporary_seed
from .study import Measurements, Number, Sample, Study

LATENT = 8
FEATURES = 256
SCALE = 1.0  # of the likelihood of a pixel
EVERY = 5  # one test image of so many
BLOCKS = 10  # of test rows, whose spread gives the errors
WEIGHT = 10.0  # of a statistic, per row


def sample_data(seed: int, directory: str | None = None, every: int = 1) -> Sample:
    """Return grey images of MNIST, the same for all seeds.

    The rows are spread over the files: the first half of the test file is of other writers than the second, and codes
    of the first 2,000 images alone had three times the MMD of the training images from the prior.

    Args:
        seed: unused; every study has it.
        directory: the folder of the data files.
        every: take one training image of so many.
    """
    train, test = datasets.mnist(directory, binarize=None)
    images = [Batch({"image": rows["image"][::step]}) for rows, step in ((train, every), (test, EVERY))]
    return Sample(*images)


def recipe(batch: Batch, objective: Callable[[], Objective], deterministic: bool, latent: int = LATENT) -> Recipe:
    """Build an autoencoder of images with perceptrons of one hidden layer, equal in all members.

    Args:
        batch: training rows, for the shape of the images.
        objective: the constructor of the objective.
        deterministic: True for a code, a Delta; False for a diagonal Normal.
        latent: the dimension of z.
    """
    event = batch["image"].shape[1:]
    decoder = conditionals.Normal(MLP(latent, event.numel(), (FEATURES,)), event, scale=SCALE)
    family = conditionals.Delta if deterministic else conditionals.Normal
    encoder = family(MLP(event.numel(), latent if deterministic else 2 * latent, (FEATURES,)))
    posterior = Either({"image": encoder})
    return Recipe(SharedLatent(standard_prior(latent), {"image": decoder}), Guide(z=posterior), objective())


def measure(run: Recipe, sample: Sample, seed: int, fitted: bool = True) -> Measurements:
    """Measure reconstruction and the distance of codes from the prior on the test rows.

    Args:
        run: a trained recipe.
        sample: its data.
        seed: of all draws.
        fitted: unused, since nothing here is a likelihood.

    Returns:
        Column -> (mean over blocks of test rows, standard error): the squared error of an image, summed over pixels,
        from a draw of its posterior and from the mean; and of such draws, against as many of the prior, the squared MMD
        under an inverse multiquadric kernel of squared bandwidth twice the dimension, and the sliced Wasserstein
        distance, squared.
    """
    model, guide, _ = run
    rows = sample.test
    with torch.no_grad(), temporary_seed(seed, rows.device):
        posterior = encode(guide, rows)["z"]
        z = posterior.sample()
        prior = torch.randn_like(z)
        errors = {
            "squared error": _squared_errors(model, z, rows["image"]),
            "from the mean": _squared_errors(model, posterior.mean, rows["image"]),
        }
        order = torch.randperm(len(z), device=z.device)  # the test file is sorted by groups of writers
        pairs = [*zip(z[order].chunk(BLOCKS), prior.chunk(BLOCKS), strict=True)]
        width = (2 * z.shape[-1]) ** 0.5
        mmd = torch.stack([squared_mmd(x, y, kernel="imq", bandwidth=width) for x, y in pairs])
        sliced = torch.stack([sliced_wasserstein(x, y, projections=200) for x, y in pairs])
    found: dict[str, Number] = {name: _mean(each) for name, each in errors.items()}
    return found | {"MMD^2": _mean(mmd), "SW^2": _mean(sliced)}


def _squared_errors(model: Any, z: Tensor, image: Tensor) -> Tensor:
    """Return the squared error of each image, summed over pixels, ``(N,)``."""
    errors: Tensor = (model.decoders["image"](z).mean - image).square().flatten(1).sum(-1)
    return errors


def _mean(each: Tensor) -> tuple[float, float]:
    """Return the mean of independent values and its standard error."""
    return each.mean().item(), (each.std() / len(each) ** 0.5).item()


MEMBERS: dict[str, tuple[Callable[[], Objective], bool]] = {
    "autoencoder": (lambda: elbo(kl=0), True),
    "WAE, MMD": (lambda: elbo(kl=0) + WEIGHT * MMD("z"), True),
    "WAE, MMD imq": (lambda: elbo(kl=0) + WEIGHT * MMD("z", kernel="imq"), True),
    "WAE, sliced": (lambda: elbo(kl=0) + WEIGHT * SlicedWasserstein("z"), True),
    "InfoVAE": (lambda: elbo(kl=0.1) + WEIGHT * MMD("z"), False),
    "VAE": (elbo, False),
}

_SHORT = Study(
    title="MNIST: reconstruction by Wasserstein autoencoders, and their codes against the prior",
    groups={"20,000 images": partial(sample_data, every=3)},
    members={
        name: partial(recipe, objective=objective, deterministic=code) for name, (objective, code) in MEMBERS.items()
    },
    measure=measure,
    epochs=20,
    batch_size=100,
    optimizer=lambda run, parameters: torch.optim.Adam(parameters, 1e-3),
    seeds=2,
    compile=True,
)
MNIST = replace(_SHORT, full=replace(_SHORT, groups={"60,000 images": sample_data}, epochs=60, seeds=5))
