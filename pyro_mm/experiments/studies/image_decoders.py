"""Digits of 8 x 8 pixels and their labels, with one kind of image decoder after the other in the same story."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

from ... import conditionals, datasets
from ...batch.batch import Batch
from ...conditionals.unconditional import Unconditional
from ...models import PrivateLatents, SharedLatent
from ...nn import MLP
from ...objectives import ALL, VAEGAN, Critic, Discriminator, Objective, Term, warm_up
from ...posteriors import ProductOfExperts
from ...posteriors.guide import Guide
from ...recipes.networks import Recipe, standard_prior
from ...training.callbacks import WeightAverage
from .generated_images import draw_images, measure, train_judge
from .jmvae_gan import recipe as jmvae
from .study import Sample, Study

LATENT = 8
NOISE = 8
CLASSES = 10
SHAPE = (8, 8)
PIXELS = 64
LEVELS = 17  # of a pixel
CONTEXT = 32  # of the flow
HIDDEN = (128, 128)
LABEL_WEIGHT = 10.0
WARM_UP = 600  # steps, of KL and critic for the guide
PENALTY = 0.1
SETS: tuple[Any, ...] = (ALL, ("label",), ("image",))  # modalities that the three terms encode

_leaky = partial(nn.LeakyReLU, 0.2)


def sample_data(seed: int, directory: str | None = None) -> Sample:
    """Return the grey digits that are shipped, the same for all seeds, with a judge of them.

    Args:
        seed: unused; every study has it.
        directory: unused, since no file is read.
    """
    train, test = datasets.digits(grey=True)
    return Sample(train, test, train_judge(train, test, epochs=60))


# -- recipes ----------------------------------------------------------------------------------------------------------


def explicit(batch: Batch) -> Recipe:
    """Build the story with Bernoulli pixels, by three terms: both encoded, the label alone, the image alone."""
    image = conditionals.Bernoulli(MLP(LATENT, PIXELS, HIDDEN, activation=_leaky), SHAPE)
    return Recipe(_story(image), _guide(), _table())


def with_discriminator(batch: Batch, weight: float = 1.0, features: str | None = None) -> Recipe:
    """Build :func:`explicit` with a discriminator of images beside the likelihood.

    Args:
        batch: training rows.
        weight: of the discriminator in the loss of the decoder.
        features: layer of the discriminator whose likelihood stands for that of the pixels; None for the pixels.
    """
    model, guide, table = explicit(batch)
    net = MLP(PIXELS, 1, HIDDEN, activation=_leaky)
    discriminator = Discriminator(net, weight, penalty=PENALTY, features=features)
    return Recipe(model, guide, table.with_discriminators({"image": discriminator}))


def implicit(batch: Batch, against: str) -> Recipe:
    """Build the story with images of a generator, by the same terms and a critic.

    Args:
        batch: training rows.
        against: "posterior", the three-way critic, or "prior".
    """
    generator = nn.Sequential(MLP(LATENT + NOISE, PIXELS, HIDDEN, activation=_leaky), nn.Sigmoid())
    net = MLP(PIXELS + LATENT, 3 if against == "posterior" else 1, HIDDEN, activation=_leaky)
    critic = Critic(net, against, penalty=PENALTY)  # type: ignore[arg-type]
    model = _story(conditionals.Implicit(generator, NOISE, SHAPE))
    return Recipe(model, _guide(), _table(warm_up(WARM_UP)).with_critics({"image": critic}))


def flow(batch: Batch) -> Recipe:
    """Build the story with images of a flow, by the same terms; uniform dequantisation noise is a latent."""
    net = MLP(LATENT, CONTEXT, HIDDEN[:1], activation=_leaky)
    pixels = conditionals.ImageFlow(net, SHAPE, CONTEXT, steps=2, hidden=32, margin=0.0)
    noise = dist.Uniform(torch.zeros(SHAPE), 1.0).to_event(2)
    decoders = {"image": conditionals.Dequantized(pixels, LEVELS), "label": _label_decoder()}
    model = PrivateLatents(standard_prior(LATENT), {"image": noise}, decoders)
    return Recipe(model, _guide(w_image=Unconditional(noise)), _table())


def _story(image: nn.Module) -> SharedLatent:
    return SharedLatent(standard_prior(LATENT), {"image": image, "label": _label_decoder()})


def _label_decoder() -> nn.Module:
    return conditionals.Categorical(MLP(LATENT, CLASSES, (64,), activation=nn.SiLU))


def _guide(**noises: Any) -> Guide:
    """Build the product of experts of image and label, beside the posteriors of noises."""
    experts = {
        "image": conditionals.Normal(MLP(PIXELS, 2 * LATENT, HIDDEN[:1], activation=nn.SiLU)),
        "label": conditionals.Normal(nn.Embedding(CLASSES, 2 * LATENT)),
    }
    return Guide(z=ProductOfExperts(experts), **noises)


def _table(weight: Any = 1.0) -> Objective:
    """Build the three terms.

    Args:
        weight: of the image's likelihood and of the KL.
    """
    likelihood = {"image": weight, "label": LABEL_WEIGHT}
    return Objective([Term(encoded, ALL, likelihood=likelihood, kl=weight) for encoded in SETS])


# -- the study --------------------------------------------------------------------------------------------------------


def _optimizer(run: Recipe, parameters: Any) -> torch.optim.Optimizer:
    """Return Adam, with a smaller first moment for players of a game."""
    game = isinstance(run.objective, VAEGAN) or bool(run.objective.critics)
    return torch.optim.Adam(parameters, 1e-3, betas=(0.5 if game else 0.9, 0.99))


def _decay(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that is constant for the first half, and falls linearly in the second."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: max(0.02, min(1.0, 2 * (1 - epoch / epochs))))


_jmvae = partial(jmvae, latent=LATENT, hidden=HIDDEN)

MEMBERS: Mapping[str, Callable[[Batch], Recipe]] = {
    "explicit": explicit,
    "VAE-GAN": with_discriminator,
    "VAE-GAN of features": partial(with_discriminator, features="layers.3"),  # the last hidden layer
    "critic, posterior": partial(implicit, against="posterior"),
    "critic, prior": partial(implicit, against="prior"),
    "flow": flow,
    "JMVAE-kl, alpha 0.1": partial(_jmvae, alpha=0.1),
    "JMVAE-kl": _jmvae,
    "JMVAE-GAN": partial(_jmvae, weight=1.0),
}

DIGITS = Study(
    title="Digits of 8 x 8 pixels and labels, with images of four kinds",
    groups={"1,437 rows": sample_data},
    members=MEMBERS,
    measure=measure,
    epochs=210,
    batch_size=128,
    optimizer=_optimizer,
    scheduler=_decay,
    callbacks=lambda: [WeightAverage(0.995)],
    images=draw_images,
)
