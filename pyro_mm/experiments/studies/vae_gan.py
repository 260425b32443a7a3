"""Images and labels by JMVAE with an explicit likelihood alone, and with a discriminator of images beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ... import datasets, metrics
from ...batch.batch import Batch
from ...evidence.likelihood import log_marginal
from ...nn import MLP
from ...objectives import ALL, EACH, Discriminator, Objective, Term, warm_up
from ...recipes.modality_networks import ModalityNetworks
from ...recipes.networks import Recipe, joint_guide, shared_latent_model
from ...sampling.predictive import generate
from .study import Measurements, Number, Sample, Study

ALPHA = 0.1  # weight of the KLs from the joint posterior to those of one modality
LABEL_WEIGHT = 10.0  # of a label's likelihood beside that of all pixels
PENALTY = 0.1  # of the discriminator's gradient
WIDTHS = (0.5, 1.0, 2.0)  # bandwidths of the kernel distance, in units of the median distance of test images
PARTICLES = 200
SAMPLES = 3  # per row, for the coherence
LEAKY_RELU = partial(nn.LeakyReLU, 0.2)


def digits(seed: int, directory: str | None = None) -> Sample:
    """Return grey digits of 8 x 8 pixels, the same for all seeds, with a judge of them.

    Args:
        seed: unused; every study has it.
        directory: unused, since no file is read.
    """
    train, test = datasets.digits(grey=True)
    return Sample(train, test, _judge(train, test, epochs=60))


def mnist(seed: int, directory: str | None = None, every: int = 1) -> Sample:
    """Return grey MNIST, 2,000 test rows of it, with a judge; the same for all seeds.

    Args:
        seed: unused; every study has it.
        directory: the folder of the data files.
        every: take one training row of so many.
    """
    train, test = datasets.mnist(directory, binarize=None)
    train, test = train[torch.arange(0, train.size, every)], test[torch.arange(0, test.size, 5)]
    return Sample(train, test, _judge(train, test, epochs=5))


def _judge(train: Batch, test: Batch, epochs: int) -> tuple[nn.Module, metrics.Share]:
    """Train a classifier of images; return it and its accuracy on the test rows."""
    given = train["image"], train["label"], test["image"], test["label"]
    return metrics.classifier(*given, epochs=epochs, hidden=64)


def recipe(
    batch: Batch, latent: int, hidden: tuple[int, ...], warm_up_steps: int = 0, weight: float | None = None
) -> Recipe:
    """Build JMVAE-kl, or JMVAE-GAN, with the same networks.

    Args:
        batch: training rows.
        latent: the dimension of z.
        hidden: sizes of the hidden layers of all networks.
        warm_up_steps: steps over which the weight of the prior's KL rises to 1.
        weight: of the discriminator in the decoder's loss; None for no discriminator.
    """
    parts = ModalityNetworks(batch, hidden)
    kl = warm_up(warm_up_steps) if warm_up_steps else 1.0
    table = Objective([Term(ALL, ALL, likelihood={"label": LABEL_WEIGHT}, kl=kl), Term(ALL, (), EACH, kl=ALPHA)])
    model, guide = shared_latent_model(parts, latent), joint_guide(parts, latent)
    if weight is None:
        return Recipe(model, guide, table)
    net = MLP(batch["image"][0].numel(), 1, hidden, activation=LEAKY_RELU)
    discriminator = Discriminator(net, weight, penalty=PENALTY)
    return Recipe(model, guide, table.with_discriminators({"image": discriminator}))


def measure(run: Recipe, sample: Sample, seed: int, fitted: bool = True) -> Measurements:
    """Measure coherence, agreement, distances of samples and the likelihood on the test rows.

    Args:
        run: a trained recipe.
        sample: its data, with the judge and its accuracy.
        seed: of all draws.
        fitted: unused; the likelihood is by draws of the guide.

    Returns:
        Column -> (value, standard error): the coherence of images given a label; the agreement of image and label
        from the prior; 1000 times the kernel distance of images from the prior; their density and coverage; each of
        the means of p(x | z), and the first and third for samples too; and log p(image, label).
    """
    model, guide, _ = run
    judge, _ = sample.truth
    rows = sample.test
    found: dict[str, Number] = {}
    for mean, suffix in ((True, ""), (False, ", samples")):
        coherent = metrics.cross_modal_coherence(
            model, guide, rows, "image", "label", judge, rows["label"], num_samples=SAMPLES, mean=mean, seed=seed
        )
        images, classes = _from_prior(run, rows, mean, seed)
        distance = metrics.kernel_distance(
            _pixels(rows["image"]), images, kernel="gaussian", bandwidth=_widths(rows), permutations=1, seed=seed
        )
        found[f"coherence{suffix}"] = coherent[:2]
        if mean:
            judged = judge(images.reshape(-1, *rows["image"].shape[1:]))
            found["agreement"] = metrics.Share.of(judged.argmax(-1) == classes)[:2]
        found[f"distance × 1000{suffix}"] = 1000 * distance.value, 1000 * distance.standard_error
        if mean:
            near = metrics.precision_recall(_pixels(rows["image"]), images, seed=seed)
            found["density"] = near.density, near.errors["density"]
            found["coverage"] = near.coverage, near.errors["coverage"]
    found["log p"] = log_marginal(model, guide, rows, num_particles=PARTICLES, seed=seed).mean()
    return found


def _from_prior(run: Recipe, rows: Batch, mean: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Return one image and one label of the prior for every row, ``(N, pixels)`` and ``(N,)``.

    Args:
        run: a trained recipe.
        rows: the test rows, whose number is taken.
        mean: True for means of images, and the likeliest label.
        seed: of the draws.
    """
    drawn = generate(run.model, run.guide, rows.only(), mean=mean, seed=seed)
    labels = drawn["label"][0].argmax(-1) if mean else drawn["label"][0]
    return _pixels(drawn["image"][0]), labels


def _pixels(images: Tensor) -> Tensor:
    return images.flatten(1)


def _widths(rows: Batch) -> tuple[float, ...]:
    """Return the bandwidths of the kernel distance."""
    pixels = _pixels(rows["image"])
    distances = torch.pdist(pixels)
    median = distances[distances > 0].median().item()
    return tuple(width * median for width in WIDTHS)


def _adam(run: Recipe, parameters: object, lr: float = 1e-3) -> torch.optim.Optimizer:
    """Return the optimiser of every player."""
    return torch.optim.Adam(parameters, lr, betas=(0.5, 0.99))  # type: ignore[arg-type]


def _decay(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a constant step size over the first half of the epochs, which falls to 0 over the second."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, 2 * (1 - epoch / epochs)))


def _members(
    latent: int, hidden: tuple[int, ...], weight: float, steps: int = 0
) -> dict[str, Callable[[Batch], Recipe]]:
    make = partial(recipe, latent=latent, hidden=hidden, warm_up_steps=steps)
    return {"JMVAE-kl": make, "JMVAE-GAN": partial(make, weight=weight)}


DIGITS = Study(
    title="Digits of 8 x 8: JMVAE with a discriminator of images beside the explicit likelihood alone",
    groups={"1,437 images": digits},
    members=_members(8, (128,), 1.0),
    measure=measure,
    epochs=120,
    batch_size=128,
    optimizer=_adam,
    scheduler=_decay,
)
_SHORT = Study(
    title="MNIST: JMVAE with a discriminator of images beside the explicit likelihood alone",
    groups={"10,000 images": partial(mnist, every=6)},
    members=_members(16, (256,), 5.0),
    measure=measure,
    epochs=5,
    batch_size=128,
    optimizer=_adam,
    scheduler=_decay,
    seeds=1,
)
MNIST = replace(
    _SHORT,
    full=replace(
        _SHORT,
        groups={"60,000 images": mnist},
        members=_members(64, (512, 512), 5.0, 20 * 469),
        epochs=100,
        seeds=5,
        compile=True,
    ),
)
