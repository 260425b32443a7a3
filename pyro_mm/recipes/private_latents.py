"""Recipes with a shared latent and a private one for each modality."""

from __future__ import annotations

import pyro.distributions as dist
from torch import nn

from .. import conditionals, objectives, posteriors
from ..batch.batch import Batch
from ..models import PrivateLatents
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
    standard_prior,
    unimodal_encoders,
)

PRIVATE = 4


@check_recipe_arguments
def dmvae(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    private: int = PRIVATE,
    kl: Number = 1.0,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """DMVAE: a product of experts for the shared latent, and a private latent for each modality.

    Model: a shared latent and a private one for each modality, with standard Normal priors. Guide: the product of
    Normal experts and the prior expert for z, and a Normal encoder for each w_m, which shares no layers with it.
    Objective: :func:`pyro_mm.objectives.dmvae`.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        private: dimensions of each w_m.
        kl: weight of the prior's KL, or a warm-up of it.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Lee & Pavlovic 2021 (arXiv:2012.13024). Departures: where they reconstruct a modality from what another one
        shares with it, they encode its private latent; here it is drawn from its prior, as it is where the modality is
        missing, so that each term is a bound. No modality's likelihood is weighed, and no latent is discrete.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    names = list(batch)
    model = PrivateLatents(
        standard_prior(latent),
        {name: standard_prior(private) for name in names},
        {name: parts.decoder(name, latent + private) for name in names},
    )
    private_encoders = unimodal_encoders(parts, private)
    private_posteriors = {f"w_{name}": posteriors.Private(name, net) for name, net in private_encoders.items()}
    shared_posterior = posteriors.ProductOfExperts(unimodal_encoders(parts, latent))
    guide = Guide(z=shared_posterior, **private_posteriors)
    return Recipe(model, guide, objectives.dmvae(estimator, kl=kl))


@check_recipe_arguments
def mmvae_plus(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    private: int = PRIVATE,
    beta: Number = 1.0,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """MMVAE+: a mixture of Laplace experts for the shared latent, and auxiliary priors for private ones.

    Model: a shared latent and a private one for each modality, with standard Laplace priors. Guide: the mixture of
    Laplace experts for z, and a Laplace encoder for each w_m, which shares no layers with it; where m is missing, w_m
    comes from a Laplace r_m with location 0 and learned scales. Objective: :func:`pyro_mm.objectives.mixture_mean`.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        private: dimensions of each w_m.
        beta: weight of the log-ratios of priors and posteriors.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Palumbo et al. 2023 (MMVAE+, ICLR). Departures: their term of expert m leaves out log p(w_l) - log r_l(w_l), so
        that r_l is the prior of every other w_l; it is included here, so that all terms bound one log p(x), and r_l is
        drawn to p(w_l). Scales are not normalised over dimensions, p(z) is not learned, and several draws are a mean of
        bounds, not an importance-weighted one.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    names = list(batch)
    model = PrivateLatents(
        standard_prior(latent, dist.Laplace),
        {name: standard_prior(private, dist.Laplace) for name in names},
        {name: parts.decoder(name, latent + private) for name in names},
    )

    def private_posterior(name: str) -> nn.Module:
        encoder = conditionals.Laplace(parts.encoder(name, 2 * private))
        return posteriors.Private(name, encoder, missing=LearnedScalePrior(private))

    shared_posterior = posteriors.MixtureOfExperts(unimodal_encoders(parts, latent, conditionals.Laplace))
    guide = Guide(z=shared_posterior, **{f"w_{name}": private_posterior(name) for name in names})
    return Recipe(model, guide, objectives.mixture_mean(beta, estimator))
