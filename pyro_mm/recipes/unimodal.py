"""Recipes for one modality, alone or given a label."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn

from .. import conditionals, objectives, posteriors
from ..batch.batch import Batch
from ..models import ConditionalLatent, SharedLatent
from ..objectives.objective import Objective
from ..objectives.terms import Number, Term
from ..posteriors.guide import Guide
from ..utils.arguments import check_flags
from .networks import (  # fmt: skip
    HIDDEN,
    LATENT,
    Estimator,
    Hidden,
    LearnedClassFrequencies,
    Recipe,
    check_recipe_arguments,
    decoder_network,
    feature_network,
    is_label,
    make_joint_encoder,
    number_of_classes,
    standard_prior,
)


@check_recipe_arguments
def vae(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    modality: str = "image",
    kl: Number = 1.0,
) -> Recipe:
    """The VAE of one modality: whatever else the rows hold is not in the story, and not looked at.

    Kingma & Welling 2014 (arXiv:1312.6114). Rows that lack the modality count nothing.
    """
    encoder = conditionals.Normal(feature_network(batch, modality, 2 * latent, hidden))
    guide = Guide(z=posteriors.ProductOfExperts({modality: encoder}, prior=None))
    model = SharedLatent(standard_prior(latent), {modality: decoder_network(batch, modality, latent, hidden)})
    return Recipe(model, guide, Objective([Term(modality, modality, kl=kl)], estimator))


@check_recipe_arguments
def cvae(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    target: str = "image",
    given: str = "label",
    learn_given: bool = False,
    kl: Number = 1.0,
) -> Recipe:
    """The conditional VAE: one modality given a label, which the decoder sees and so does the encoder.

    Sohn et al. 2015 (NIPS). To make the story a joint one the label has a distribution, uniform unless ``learn_given``:
    the bound is on log p(target, given), that on log p(target | given) but for log p(given). p(z) stands in the place
    of their p(z | given), a relaxation that they name, and there is no network that predicts from p(z | given) beside.
    Rows without a label are encoded with zeros for its features, and draw it.

    Raises:
        ValueError: what is given is no label.
    """
    if not is_label(batch, given):
        raise ValueError(f"expected a label to be given, integers of shape (N,), and {given!r} is an image")
    is_label(batch, target)  # or an image: raises where it is neither
    check_flags(learn_given=learn_given)
    both, number = {target: batch[target], given: batch[given]}, number_of_classes(batch, given)
    root = LearnedClassFrequencies(number) if learn_given else dist.Categorical(logits=torch.zeros(number))
    prior = standard_prior(latent)
    width = min(number, hidden[-1])
    decoders = {target: decoder_network(batch, target, latent + width, hidden)}
    model = ConditionalLatent(prior, (given, root), nn.Embedding(number, width), decoders)
    posterior = make_joint_encoder(Batch(both), latent, hidden)
    return Recipe(model, Guide(z=posteriors.Given(target, posterior, prior)), objectives.elbo(estimator, kl=kl))
