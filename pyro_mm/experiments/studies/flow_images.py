"""MNIST and labels with dequantised pixels, by a Normal decoder of images and by a flow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ... import conditionals, datasets, metrics
from ...batch.batch import Batch
from ...evidence.evidence import Evidence
from ...evidence.likelihood import log_marginal
from ...models import SharedLatent
from ...nn import MLP
from ...objectives import ALL, Objective, Term
from ...posteriors import ProductOfExperts
from ...posteriors.guide import Guide
from ...recipes.networks import Recipe, standard_prior
from ...sampling.predictive import generate
from ..estimates import BY_GUIDE, estimate
from .generated_images import kernel_widths
from .jmvae_gan import sample_data as sample_grey_mnist
from .study import Images, Measurements, Number, Sample, Study

SHAPE = (28, 28)
PIXELS = 784
LEVELS = 256
CLASSES = 10
LATENT = 16
HIDDEN = (512, 512)
CONTEXT = 64  # of the flow
STEPS = 6  # of each scale of the flow
CHANNELS = 64  # of its couplings' networks
PARTICLES = 200
EVIDENCE_ROWS = 200  # test images whose likelihoods are estimated
PERMUTATIONS = 199
SHOWN = 20  # images of a line of a picture

Kind = Literal["Normal, one scale", "Normal", "flow"]


def dequantize(rows: Batch) -> Batch:
    """Add noise to the grey levels of images, anew at every call."""
    return datasets.dequantize(rows, "image", LEVELS)


def sample_data(seed: int, directory: str | None = None, every: int = 1) -> Sample:
    """Return grey levels of MNIST, and 2,000 dequantised test rows with a judge; the same for all seeds.

    Args:
        seed: unused; every study has it.
        directory: the folder of the data files.
        every: take one training row of so many.
    """
    sample = sample_grey_mnist(seed, directory, every)
    return sample._replace(test=datasets.dequantize(sample.test, "image", LEVELS, seed=0))


def recipe(batch: Batch, kind: Kind) -> Recipe:
    """Build a story of image and label by the bounds of log p(image, label) given both, and given the image alone.

    Args:
        batch: training rows; unused, since the sizes are those of MNIST.
        kind: of the images' decoder: a Normal of one learned scale, one with a scale of each pixel by the network, or
            a flow.
    """
    image: nn.Module
    if kind == "flow":
        net = MLP(LATENT, CONTEXT, HIDDEN)
        image = conditionals.ImageFlow(net, SHAPE, CONTEXT, steps=STEPS, hidden=CHANNELS)
    elif kind == "Normal":
        image = conditionals.Normal(MLP(LATENT, 2 * PIXELS, HIDDEN), SHAPE)
    else:
        image = conditionals.Normal(MLP(LATENT, PIXELS, HIDDEN), SHAPE, scale=nn.Parameter(torch.tensor(0.0)))
    decoders = {"image": image, "label": conditionals.Categorical(MLP(LATENT, CLASSES, (64,)))}
    experts = {
        "image": conditionals.Normal(MLP(PIXELS, 2 * LATENT, HIDDEN)),
        "label": conditionals.Normal(nn.Embedding(CLASSES, 2 * LATENT)),
    }
    guide = Guide(z=ProductOfExperts(experts))
    return Recipe(SharedLatent(standard_prior(LATENT), decoders), guide, Objective([_term(ALL), _term(("image",))]))


def _term(encoded: Any) -> Term:
    return Term(encoded, ALL, average=True)


def measure(run: Recipe, sample: Sample, seed: int, fitted: bool = True) -> Measurements:
    r"""Measure bits per dimension of dequantised images, and the distance of draws from test images.

    .. math:: b = - \frac{\log p(y) - D \log L}{D \log 2}

    of images y of D pixels and L levels, an upper bound of the bits by which the levels could be stored.

    Args:
        run: a trained recipe.
        sample: its data, with the judge.
        seed: of the draws.
        fitted: estimate likelihoods by proposals fitted to each row, beside those by the guide.

    Returns:
        Column -> value with its standard error: bits per dimension of an image by log p(image), and its log p, with the
        share of rows that are not to be trusted; 1000 times the kernel distance of draws from the prior, between pixels
        and between features of the judge; the share of image and label of one draw of the prior that agree; and the
        share of labels that are right given an image.
    """
    model, guide, _ = run
    judge: Any = sample.truth
    rows = sample.test
    some = rows[torch.arange(0, rows.size, max(1, rows.size // EVIDENCE_ROWS))].only("image")
    found: dict[str, Number] = {}
    likelihoods = estimate(log_marginal, model, guide, some, num_particles=PARTICLES, seed=seed, fitted=fitted)
    found["bits per dimension"] = bits_per_dimension(likelihoods.evidence)
    if likelihoods.by_guide is not None:
        found[f"bits per dimension{BY_GUIDE}"] = bits_per_dimension(likelihoods.by_guide)
    found |= likelihoods.columns("log p(image)")

    drawn = generate(model, guide, rows.only(), seed=seed)
    images, labels = drawn["image"][0], drawn["label"][0]
    distance = partial(metrics.kernel_distance, rows["image"], images, kernel="gaussian", seed=seed)
    distances = {
        "distance × 1000": distance(bandwidth=kernel_widths(rows), permutations=PERMUTATIONS),
        "of features × 1000": distance(judge.features, permutations=PERMUTATIONS),
    }
    found |= {name: (1000 * each.value, 1000 * each.standard_error) for name, each in distances.items()}
    found["agreement"] = metrics.Share.of(judge(images).argmax(-1) == labels)[:2]
    predicted = generate(model, guide, rows.only("image"), 10, mean=["label"], seed=seed)["label"].mean(0).argmax(-1)
    found["label from image"] = metrics.Share.of(predicted == rows["label"])[:2]
    return found


def bits_per_dimension(evidence: Evidence) -> tuple[float, float]:
    """Return the bits per pixel of dequantised images from their log-density, and the standard error.

    Args:
        evidence: log p(image) of each row.
    """
    value, error = evidence.mean()
    nats = PIXELS * math.log(2)
    return (PIXELS * math.log(LEVELS) - value) / nats, error / nats


def draw_images(run: Recipe, sample: Sample, seed: int) -> Mapping[str, Images]:
    """Return draws of the prior, below test images."""
    shown = sample.test[:SHOWN]
    drawn = generate(run.model, run.guide, shown.only(), seed=seed)["image"][0]
    return {"draws from the prior": Images(drawn, truth=shown["image"])}


def _decay(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a constant step size over the first half of the epochs, which falls to 0 over the second."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, 2 * (1 - epoch / epochs)))


_KINDS: tuple[Kind, ...] = ("Normal, one scale", "Normal", "flow")
MEMBERS: Mapping[str, Callable[[Batch], Recipe]] = {kind: partial(recipe, kind=kind) for kind in _KINDS}

MNIST = Study(
    title="MNIST: a Normal decoder of dequantised images, and a flow",
    groups={"20,000 images": partial(sample_data, every=3)},
    members=MEMBERS,
    measure=measure,
    epochs=25,
    batch_size=200,
    optimizer=lambda run, parameters: torch.optim.Adam(parameters, 1e-3),
    scheduler=_decay,
    transform=dequantize,
    seeds=1,
    images=draw_images,
)
"""Wants a GPU: a step of the flow takes seconds on a core."""
