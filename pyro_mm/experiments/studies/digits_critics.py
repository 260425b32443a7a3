"""Digits of 8 x 8 pixels and their labels: images by a likelihood, or implicit and trained by critics."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import conditionals, datasets
from ...batch.batch import Batch
from ...distributions.sample_statistics import squared_mmd
from ...metrics import classifier
from ...models import SharedLatent
from ...nn import MLP
from ...objectives import ALL, Critic, Objective, Term, warm_up
from ...posteriors import ProductOfExperts
from ...posteriors.guide import Guide
from ...recipes.networks import Recipe, standard_prior
from ...sampling.encode import encode
from ...training.callbacks import WeightAverage
from ...utils.seeding import temporary_seed
from .study import Measurements, Sample, Study

LATENT = 8
NOISE = 8
CLASSES = 10
PIXELS = 64
LABEL_WEIGHT = 10.0
WARM_UP = 600  # steps, of KL and critic for the guide
PENALTY = 0.1
DRAWS = 1000

_leaky = partial(nn.LeakyReLU, 0.2)


def sample_data(seed: int, directory: str | None = None) -> Sample:
    """Return the digits that are shipped, and a classifier of them, the same for all seeds.

    Args:
        seed: unused; every study has it.
        directory: unused; every study has it.
    """
    train, test = datasets.digits(grey=True)
    judge, _ = classifier(train["image"], train["label"], test["image"], test["label"], epochs=30)
    return Sample(train, test, judge)


def recipe(batch: Batch, against: str | None) -> Recipe:
    """Build a story of image and label with terms that encode both, the label alone and the image alone.

    Args:
        batch: training rows.
        against: "posterior" or "prior"; None for Bernoulli pixels.
    """
    if against is None:
        image: nn.Module = conditionals.Bernoulli(MLP(LATENT, PIXELS, (128, 128), activation=_leaky), (8, 8))
        weight: Any = 1.0
    else:
        generator = nn.Sequential(MLP(LATENT + NOISE, PIXELS, (128, 128), activation=_leaky), nn.Sigmoid())
        image = conditionals.Implicit(generator, NOISE, (8, 8))
        weight = warm_up(WARM_UP)
    label = conditionals.Categorical(MLP(LATENT, CLASSES, (64,), activation=nn.SiLU))
    experts = {
        "image": conditionals.Normal(MLP(PIXELS, 2 * LATENT, (128,), activation=nn.SiLU)),
        "label": conditionals.Normal(nn.Embedding(CLASSES, 2 * LATENT)),
    }
    likelihood = {"image": weight, "label": LABEL_WEIGHT}
    sets: tuple[Any, ...] = (ALL, ("label",), ("image",))
    objective = Objective([Term(encoded, ALL, likelihood=likelihood, kl=weight) for encoded in sets])
    if against is not None:
        net = MLP(PIXELS + LATENT, 3 if against == "posterior" else 1, (128, 128), activation=_leaky)
        critic = Critic(net, against, penalty=PENALTY)  # type: ignore[arg-type]
        objective = objective.with_critics({"image": critic})
    model = SharedLatent(standard_prior(LATENT), {"image": image, "label": label})
    return Recipe(model, Guide(z=ProductOfExperts(experts)), objective)


def measure(run: Recipe, sample: Sample, seed: int, fitted: bool = True) -> Measurements:
    """Measure coherence and quality of images.

    Args:
        run: a trained recipe.
        sample: its data, and the classifier.
        seed: of the draws.
        fitted: unused, since nothing here is a likelihood.

    Returns:
        Column -> value, of draws and, where there is a mean, of means: the share of images generated from a label that
        the classifier gives this label, and their squared maximum mean discrepancy from test images, under Gaussian
        kernels, times 1000, of images from the prior; the share of image and label of one draw of the prior that agree;
        and the accuracy of labels given images.
    """
    model: Any = run.model
    rows = sample.test
    wanted = torch.arange(CLASSES, device=rows.device).repeat(DRAWS // CLASSES)
    with torch.no_grad(), temporary_seed(seed, rows.device):
        given = Batch({"image": rows["image"][:1].expand(DRAWS, 8, 8), "label": wanted}).only("label")
        of_label = encode(run.guide, given)["z"].sample()
        of_prior = torch.randn(DRAWS, LATENT, device=rows.device)
        drawn_label = model.decoders["label"](of_prior).sample()
        of_image = encode(run.guide, rows.only("image"))["z"].mean
        told = model.decoders["label"](of_image).probs.argmax(-1)
        found: dict[str, Any] = {"label from image": (told == rows["label"]).float().mean().item()}
        for name, images in _images(model, of_label).items():
            found[f"coherence{name}"] = (_classes(sample.truth, images) == wanted).float().mean().item()
        for name, images in _images(model, of_prior).items():
            found[f"agreement{name}"] = (_classes(sample.truth, images) == drawn_label).float().mean().item()
            found[f"1000 MMD^2{name}"] = 1000 * _discrepancy(images, rows["image"])
    return found


def _images(model: Any, z: Tensor) -> dict[str, Tensor]:
    """Return draws of images, and means of them if there are any, by the ending of their columns."""
    d = model.decoders["image"](z)
    images = {"": d.sample()}
    if not isinstance(model.decoders["image"], conditionals.Implicit):
        images[", means"] = d.mean
    return images


def _classes(judge: Any, images: Tensor) -> Tensor:
    classes: Tensor = judge(images).argmax(-1)
    return classes


def _discrepancy(images: Tensor, reference: Tensor) -> float:
    """Return the squared maximum mean discrepancy of images from others, unbiased."""
    x, y = images.flatten(1), reference.flatten(1)
    distances = torch.pdist(y)
    width = distances.median().item()
    some = x[: len(y)]
    return float(squared_mmd(some, y, kernel="gaussian", bandwidth=(0.5 * width, width, 2 * width)))


def _optimizer(run: Recipe, parameters: Any) -> torch.optim.Optimizer:
    implicit = isinstance(run.objective, Objective) and bool(run.objective.critics)
    return torch.optim.Adam(parameters, 1e-3, betas=(0.5 if implicit else 0.9, 0.99))


def _decay(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that is constant for the first half, and falls linearly in the second."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: max(0.02, min(1.0, 2 * (1 - epoch / epochs))))


MEMBERS: dict[str, str | None] = {"explicit": None, "critic, posterior": "posterior", "critic, prior": "prior"}

DIGITS = Study(
    title="Digits of 8 x 8 pixels and labels: images by a likelihood, and implicit ones",
    groups={"1,437 rows": sample_data},
    members={name: partial(recipe, against=against) for name, against in MEMBERS.items()},
    measure=measure,
    epochs=210,
    batch_size=128,
    optimizer=_optimizer,
    scheduler=_decay,
    seeds=5,
    compile=True,
    callbacks=lambda: [WeightAverage(0.995)],
)
