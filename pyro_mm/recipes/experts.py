"""Recipes whose posterior pools unimodal experts: products, mixtures, and objectives that encode subsets."""

from __future__ import annotations

import pyro.distributions as dist

from .. import conditionals, estimators, objectives, posteriors
from ..batch.batch import Batch
from ..objectives.terms import Number
from ..posteriors.guide import Guide
from .modality_networks import Hidden, ModalityNetworks, NetworksOf
from .networks import (  # fmt: skip
    HIDDEN,
    LATENT,
    Estimator,
    LearnedScalePrior,
    Recipe,
    check_recipe_arguments,
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
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """MVAE: a product of experts, trained on the joint bound and every unimodal one.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: the product of Normal experts and the
    prior expert. Objective: :func:`pyro_mm.objectives.mvae` without random subsets.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        label_weight: weight of a label's likelihood. Any other than 1 makes the sum a surrogate, not a bound.
        kl: weight of the prior's KL, or a warm-up of it.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Wu & Goodman 2018 (arXiv:1802.05335). They weigh the label's likelihood by 50, and warm ``kl`` up. On the
        digits the weights 10 and 50 made every likelihood worse.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    weights = {name: label_weight for name in batch if parts.is_class(name)}
    objective = objectives.mvae(estimator=estimator, likelihood=weights or 1.0, kl=kl)
    return Recipe(shared_latent_model(parts, latent), product_guide(parts, latent), objective)


@check_recipe_arguments
def vaevae(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """VAEVAE with a product of experts: the evidence of every modality, and of the others given it.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: the product of Normal experts and the
    prior expert; :func:`vaevae_joint` has a joint encoder. Objective: :func:`pyro_mm.objectives.vaevae`.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Wu & Goodman 2019 (arXiv:1912.05075).
    """
    parts = ModalityNetworks(batch, hidden, networks)
    return Recipe(shared_latent_model(parts, latent), product_guide(parts, latent), objectives.vaevae(estimator))


@check_recipe_arguments
def mvtcae(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """MVTCAE: a product of experts without a prior, trained on the joint bound and one given each modality.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: the product of Normal experts alone.
    Objective: :func:`pyro_mm.objectives.mvtcae` with alpha = 5 / 6 and beta = 1.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Hwang et al. 2021 (NeurIPS, Multi-View Representation Learning via Total Correlation Objective).
    """
    parts = ModalityNetworks(batch, hidden, networks)
    guide = Guide(z=posteriors.ProductOfExperts(unimodal_encoders(parts, latent), prior=None))
    return Recipe(shared_latent_model(parts, latent), guide, objectives.mvtcae(estimator=estimator))


@check_recipe_arguments
def mopoe(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """MoPoE as its authors train it: the mean over all subsets of bounds that encode a subset's product of experts.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: the product of Normal experts and the
    prior expert. Objective: :func:`pyro_mm.objectives.subset_mean` over all subsets. The mixture of these products is
    :class:`pyro_mm.posteriors.MixtureOfProducts`, and its own, tighter bound :func:`pyro_mm.objectives.mopoe`.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Sutter et al. 2021 (arXiv:2105.02470), without their beta.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    objective = objectives.subset_mean(estimator=estimator)
    return Recipe(shared_latent_model(parts, latent), product_guide(parts, latent), objective)


@check_recipe_arguments
def mmjsd(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """mmJSD: a Jensen-Shannon divergence between the experts and the prior, with their product as dynamic prior.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: the product of Normal experts and the
    prior expert. Objective: :func:`pyro_mm.objectives.mmjsd`, a surrogate.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Sutter et al. 2020 (arXiv:2006.08242), without their modality-specific latents.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    return Recipe(
        shared_latent_model(parts, latent),
        product_guide(parts, latent),
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
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """MMVAE: a mixture of Laplace experts, with K importance-weighted draws from each.

    Model: one latent behind all modalities, with a standard Laplace prior. Guide: the mixture of Laplace experts.
    Objective: :func:`pyro_mm.objectives.mmvae`.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: in place of the stratified ``IWAE`` that ``num_particles`` and ``looser`` describe.
        num_particles: draws K from each expert.
        looser: True for the bound that the authors train, the mean over experts of logarithms; False for the logarithm
            of the mean.
        learn_prior: True to train the scales of the prior.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Shi et al. 2019 (arXiv:1911.03393). Departures: the gradient is plain reparameterisation in place of DReG, which
        is biased for a stratified mixture; scales are not normalised over the dimensions of z; no modality's likelihood
        is weighed.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    experts = unimodal_encoders(parts, latent, conditionals.Laplace)
    prior = LearnedScalePrior(latent) if learn_prior else standard_prior(latent, dist.Laplace)
    guide = Guide(z=posteriors.MixtureOfExperts(experts))
    objective = objectives.mmvae(num_particles, looser=looser, estimator=estimator)
    return Recipe(shared_latent_model(parts, latent, prior), guide, objective)


@check_recipe_arguments
def unimodal_mean(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """MMVAE with one draw and Gaussian experts: the mean of bounds that each encode one modality and decode all.

    Looser than the mixture's own bound. Much work after MMVAE trains this under its name.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: the mixture of Normal experts.
    Objective: :func:`pyro_mm.objectives.unimodal_mean`.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Shi et al. 2019 (arXiv:1911.03393).
    """
    parts = ModalityNetworks(batch, hidden, networks)
    guide = Guide(z=posteriors.MixtureOfExperts(unimodal_encoders(parts, latent)))
    return Recipe(shared_latent_model(parts, latent), guide, objectives.unimodal_mean(estimator))


@check_recipe_arguments
def mmvm(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    beta: Number = 1.0,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """MMVM: every modality reconstructed from its own latent, with a soft tie between these latents.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: the product of Normal experts alone,
    which serves evaluation: the paper has no posterior given several modalities. Objective:
    :func:`pyro_mm.objectives.mmvm`, a surrogate, which trains neither that product nor p(z): draws from the prior mean
    little, and a likelihood is one of decoders under a prior that they were not trained with. In an incomplete row the
    sums are over the modalities that are present.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        beta: weight of the tie.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Sutter et al. 2024 (arXiv:2403.05300).
    """
    parts = ModalityNetworks(batch, hidden, networks)
    guide = Guide(z=posteriors.ProductOfExperts(unimodal_encoders(parts, latent), prior=None))
    return Recipe(shared_latent_model(parts, latent), guide, objectives.mmvm(beta, estimator))


@check_recipe_arguments
def code(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    correlation: float = 0.4,
    kl: Number = 1.0,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """CoDE-VAE: the mean over all subsets of bounds that encode the consensus of a subset's dependent experts.

    Model: one latent behind all modalities, with a standard Normal prior. Guide:
    :class:`pyro_mm.posteriors.DependentExperts`. Objective: :func:`pyro_mm.objectives.subset_mean` over all subsets.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        correlation: of the experts' errors, above -1 / (M - 1) and below 1.
        kl: weight of the prior's KL, or a warm-up of it.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Mancisidor et al. 2025 (arXiv:2505.01134). Departures: they learn the weights of the subsets' bounds, which are
        equal here; they choose the correlation by cross-validation; no modality's likelihood is weighed.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    guide = Guide(z=posteriors.DependentExperts(unimodal_encoders(parts, latent), correlation))
    return Recipe(shared_latent_model(parts, latent), guide, objectives.subset_mean(estimator=estimator, kl=kl))


@check_recipe_arguments
def hoelder(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """Hölder pooling of order 1/2: a mixture of the experts and of all their pairs, as far as these overlap.

    Model: one latent behind all modalities, with a standard Normal prior. Guide:
    :class:`pyro_mm.posteriors.HoelderPooling` of Normal experts. Objective: the ELBO of the mixture, by a draw from
    every component: M (M + 1) / 2 decodes of every modality. With ``estimator=AnalyticKL()`` it is one.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: None for ``IWAE(1, stratified="outside")``.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        arXiv:2606.13381, for the pool; the training is another one.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    guide = Guide(z=posteriors.HoelderPooling(unimodal_encoders(parts, latent)))
    chosen = estimators.IWAE(1, stratified="outside") if estimator is None else estimator
    return Recipe(shared_latent_model(parts, latent), guide, objectives.elbo(chosen))
