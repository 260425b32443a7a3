"""Recipes whose posterior pools unimodal experts: products, mixtures, and objectives that encode subsets."""

from __future__ import annotations

import pyro.distributions as dist

from .. import conditionals, estimators, objectives, posteriors
from ..batch.batch import Batch
from ..objectives.terms import Number
from ..posteriors.guide import Guide
from .networks import (  # fmt: skip
    HIDDEN,
    LATENT,
    Estimator,
    Hidden,
    LearnedScalePrior,
    Recipe,
    check_recipe_arguments,
    is_label,
    product_guide,
    shared_latent_model,
    standard_prior,
    unimodal_encoders,
)


@check_recipe_arguments
def mvae(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    label_weight: float = 1.0,
    kl: Number = 1.0,
) -> Recipe:
    """MVAE: a product of experts, and the sum of the joint bound and the unimodal ones.

    Wu & Goodman 2018 (arXiv:1802.05335). They weigh the label's likelihood by 50 and warm ``kl`` up. The weight here
    is 1: any other makes the sum a surrogate, and on the digits 10 and 50 made every likelihood worse.
    """
    weights = {name: label_weight for name in batch if is_label(batch, name)}
    objective = objectives.mvae(estimator=estimator, likelihood=weights or 1.0, kl=kl)
    return Recipe(shared_latent_model(batch, latent, hidden), product_guide(batch, latent, hidden), objective)


@check_recipe_arguments
def vaevae(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """Wu & Goodman's objective of every modality's evidence and the others' given it.

    Wu & Goodman 2019 (arXiv:1912.05075). The posterior here is a product of experts; :func:`vaevae_joint` has a joint
    encoder.
    """
    return Recipe(
        shared_latent_model(batch, latent, hidden), product_guide(batch, latent, hidden), objectives.vaevae(estimator)
    )


@check_recipe_arguments
def mvtcae(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """MVTCAE: a product of experts without the prior, and bounds given each modality besides the joint one.

    Hwang et al. 2021 (NeurIPS). With beta = 1.
    """
    guide = Guide(z=posteriors.ProductOfExperts(unimodal_encoders(batch, latent, hidden), prior=None))
    return Recipe(shared_latent_model(batch, latent, hidden), guide, objectives.mvtcae(estimator=estimator))


@check_recipe_arguments
def mopoe(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """MoPoE, as it is trained: the mean over all subsets of the bounds that encode the product of a subset's experts.

    Sutter et al. 2021 (arXiv:2105.02470). Without their beta; every subset's product has the prior expert. The mixture
    of these products is ``posteriors.MixtureOfProducts``, and its own, tighter bound ``objectives.mopoe``.
    """
    objective = objectives.subset_mean(estimator=estimator)
    return Recipe(shared_latent_model(batch, latent, hidden), product_guide(batch, latent, hidden), objective)


@check_recipe_arguments
def mmjsd(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """mmJSD: a Jensen-Shannon divergence between the experts and the prior, with their product as dynamic prior.

    Sutter et al. 2020 (arXiv:2006.08242). Without their modality-specific latents.
    """
    return Recipe(
        shared_latent_model(batch, latent, hidden),
        product_guide(batch, latent, hidden),
        objectives.mmjsd(estimator=estimator),
    )


@check_recipe_arguments
def mmvae(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    num_particles: int = 10,
    looser: bool = True,
    learn_prior: bool = False,
) -> Recipe:
    """MMVAE: a mixture of Laplace experts, with K importance-weighted draws from each.

    Shi et al. 2019 (arXiv:1911.03393). ``looser`` is the bound that they train, the mean over experts of logarithms;
    without it the logarithm of the mean. The gradient is plain reparameterisation in place of their DReG, which is
    biased with a stratified mixture; scales are not normalised over the dimensions of z, and the prior's are learned
    only if asked for; and no modality's likelihood is weighed.
    """
    experts = unimodal_encoders(batch, latent, hidden, conditionals.Laplace)
    prior = LearnedScalePrior(latent) if learn_prior else standard_prior(latent, dist.Laplace)
    guide = Guide(z=posteriors.MixtureOfExperts(experts))
    objective = objectives.mmvae(num_particles, looser=looser, estimator=estimator)
    return Recipe(shared_latent_model(batch, latent, hidden, prior), guide, objective)


@check_recipe_arguments
def unimodal_mean(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """A mixture of experts trained expert by expert, each reconstructing all: looser than the mixture's own bound.

    The form with one particle that much work after Shi et al. 2019 (arXiv:1911.03393) trains under MMVAE's name,
    with Gaussian experts.
    """
    guide = Guide(z=posteriors.MixtureOfExperts(unimodal_encoders(batch, latent, hidden)))
    return Recipe(shared_latent_model(batch, latent, hidden), guide, objectives.unimodal_mean(estimator))


@check_recipe_arguments
def mmvm(
    batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None, beta: Number = 1.0
) -> Recipe:
    """MMVM: every modality reconstructed from its own latent, and these latents tied softly to each other.

    Sutter et al. 2024 (arXiv:2403.05300). They have no posterior given several modalities; what stands there, for
    evaluation, is the product of the experts, which this trains no more than it trains p(z): draws from the prior mean
    little, and a likelihood is one of the decoders under a prior that they have not met. In missing rows the sums are
    over what is there.
    """
    guide = Guide(z=posteriors.ProductOfExperts(unimodal_encoders(batch, latent, hidden), prior=None))
    return Recipe(shared_latent_model(batch, latent, hidden), guide, objectives.mmvm(beta, estimator))


@check_recipe_arguments
def code(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    correlation: float = 0.4,
    kl: Number = 1.0,
) -> Recipe:
    """CoDE-VAE: the mean over all subsets of the bounds that encode the consensus of a subset's dependent experts.

    Mancisidor et al. 2025 (arXiv:2505.01134). They learn the weights of the subsets' bounds, which are equal here; the
    correlation is one number, theirs is chosen by cross-validation; and no modality's likelihood is weighed.
    """
    guide = Guide(z=posteriors.DependentExperts(unimodal_encoders(batch, latent, hidden), correlation))
    return Recipe(shared_latent_model(batch, latent, hidden), guide, objectives.subset_mean(estimator=estimator, kl=kl))


@check_recipe_arguments
def hoelder(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """Hölder pooling of order 1/2: a mixture of the experts and, as far as they overlap, of all their pairs.

    arXiv:2606.13381, of which the pool is taken and not the training: the bound here is that of the mixture, a draw
    from every component and the weights as they are. That is M (M + 1) / 2 decodes
    of every modality; with ``AnalyticKL()`` it is one.
    """
    guide = Guide(z=posteriors.HoelderPooling(unimodal_encoders(batch, latent, hidden)))
    stratified = estimators.IWAE(1, stratified="outside") if estimator is None else estimator
    return Recipe(shared_latent_model(batch, latent, hidden), guide, objectives.elbo(stratified))
