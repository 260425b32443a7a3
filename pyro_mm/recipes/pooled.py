"""Recipes whose posterior pools unimodal experts: products, mixtures, and objectives that encode subsets."""

from __future__ import annotations

import pyro.distributions as dist
import torch

from .. import conditionals, objectives, posteriors
from ..batch import Batch
from ..guides import Guide
from .parts import HIDDEN, LATENT, Estimator, Hidden, Recipe, encoders, is_label, product, story


def mvae(
    batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None, label_weight: float = 1.0
) -> Recipe:
    """MVAE: a product of experts, and the sum of the joint bound and the unimodal ones.

    Wu & Goodman 2018 (arXiv:1802.05335). They weigh the label's likelihood by 50 and warm the KL up. The weight here
    is 1: any other makes the sum a surrogate, and on the digits 10 and 50 made every likelihood worse.
    """
    weights = {name: label_weight for name in batch if is_label(batch, name)}
    objective = objectives.mvae(estimator=estimator, likelihood=weights or 1.0)
    return Recipe(story(batch, latent, hidden), product(batch, latent, hidden), objective)


def vaevae(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """Wu & Goodman's objective of every modality's evidence and the others' given it.

    Wu & Goodman 2019 (arXiv:1912.05075). The posterior here is a product of experts.
    """
    return Recipe(story(batch, latent, hidden), product(batch, latent, hidden), objectives.vaevae(estimator))


def mvtcae(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """MVTCAE: a product of experts without the prior, and bounds given each modality besides the joint one.

    Hwang et al. 2021 (NeurIPS). With beta = 1.
    """
    guide = Guide(z=posteriors.ProductOfExperts(encoders(batch, latent, hidden), prior=None))
    return Recipe(story(batch, latent, hidden), guide, objectives.mvtcae(estimator=estimator))


def mopoe(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """MoPoE, as it is trained: the mean over all subsets of the bounds that encode the product of a subset's experts.

    Sutter et al. 2021 (arXiv:2105.02470). Without their beta; every subset's product has the prior expert. The mixture
    of these products is ``posteriors.MixtureOfProducts``, and its own, tighter bound ``objectives.mopoe``.
    """
    objective = objectives.subset_mean(estimator=estimator)
    return Recipe(story(batch, latent, hidden), product(batch, latent, hidden), objective)


def mmjsd(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """mmJSD: a Jensen-Shannon divergence between the experts and the prior, with their product as dynamic prior.

    Sutter et al. 2020 (arXiv:2006.08242). Without their modality-specific latents.
    """
    return Recipe(story(batch, latent, hidden), product(batch, latent, hidden), objectives.mmjsd(estimator=estimator))


def mmvae(
    batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None, num_particles: int = 10
) -> Recipe:
    """MMVAE: a mixture of Laplace experts, with K importance-weighted draws from each.

    Shi et al. 2019 (arXiv:1911.03393), the looser bound that they train. The gradient is plain reparameterisation in
    place of their DReG, which is biased with a stratified mixture; the prior's scale is not learned; and no
    modality's likelihood is weighed.
    """
    experts = encoders(batch, latent, hidden, conditionals.Laplace)
    prior = dist.Laplace(torch.zeros(latent), 1.0).to_event(1)
    guide = Guide(z=posteriors.MixtureOfExperts(experts))
    return Recipe(story(batch, latent, hidden, prior), guide, objectives.mmvae(num_particles, estimator=estimator))


def unimodal_mean(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """A mixture of experts trained expert by expert, each reconstructing all: looser than the mixture's own bound.

    The form with one particle that much work after Shi et al. 2019 (arXiv:1911.03393) trains under MMVAE's name,
    with Gaussian experts.
    """
    guide = Guide(z=posteriors.MixtureOfExperts(encoders(batch, latent, hidden)))
    return Recipe(story(batch, latent, hidden), guide, objectives.unimodal_mean(estimator))
