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
from .kinds import number_of_classes
from .modality_networks import Hidden, ModalityNetworks, NetworksOf
from .networks import (  # fmt: skip
    HIDDEN,
    LATENT,
    Estimator,
    LearnedClassFrequencies,
    Recipe,
    check_recipe_arguments,
    make_joint_encoder,
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
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """VAE of one modality; the others are not in the story, and are not read.

    Model: one latent behind the modality, with a standard Normal prior. Guide: its Normal encoder. Objective: the ELBO.
    A row without the modality counts nothing.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        modality: its name.
        kl: weight of the prior's KL, or a warm-up of it.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    Raises:
        ValueError: the modality is unknown, or of no kind that there are networks for.

    References:
        Kingma & Welling 2014 (arXiv:1312.6114).
    """
    parts = ModalityNetworks(batch, hidden, networks)
    encoder = conditionals.Normal(parts.encoder(modality, 2 * latent))
    guide = Guide(z=posteriors.ProductOfExperts({modality: encoder}, prior=None))
    model = SharedLatent(standard_prior(latent), {modality: parts.decoder(modality, latent)})
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
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """CVAE: one modality given a label, which both the decoder and the encoder see.

    Model: :class:`pyro_mm.models.ConditionalLatent` with a standard Normal p(z), and an embedding of the label for the
    decoder. Its label has a distribution, so that the ELBO bounds log p(target, given), which is log p(target | given)
    plus log p(given). Guide: a joint encoder of both where the target is present, else p(z). Objective: the ELBO. A row
    without a label is encoded with zeros for its features, and its label is drawn.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        target: the modality that is decoded.
        given: the label that it is given.
        learn_given: True to train the probabilities of the labels; False for equal ones.
        kl: weight of the prior's KL, or a warm-up of it.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    Raises:
        ValueError: ``given`` is not a label.

    References:
        Sohn et al. 2015 (NIPS). Departures: p(z) in place of their p(z | given), a relaxation that they name, and no
        network beside that predicts from p(z | given).
    """
    parts = ModalityNetworks(batch, hidden, networks)
    if parts.kind(given) != "class":
        raise ValueError(f"expected a label to be given, integers of shape (N,); {given!r} is {parts.kind(given)}")
    check_flags(learn_given=learn_given)

    classes = number_of_classes(batch, given)
    label_prior = LearnedClassFrequencies(classes) if learn_given else dist.Categorical(logits=torch.zeros(classes))
    prior = standard_prior(latent)
    width = min(classes, hidden[-1])
    decoders = {target: parts.decoder(target, latent + width)}
    model = ConditionalLatent(prior, (given, label_prior), nn.Embedding(classes, width), decoders)

    posterior = make_joint_encoder(parts, latent, names=(target, given))
    return Recipe(model, Guide(z=posteriors.Given(target, posterior, prior)), objectives.elbo(estimator, kl=kl))
