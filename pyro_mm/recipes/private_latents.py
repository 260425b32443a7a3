"""Recipes with a latent of each modality's own beside the shared one."""

from __future__ import annotations

import pyro.distributions as dist
from torch import nn

from .. import conditionals, objectives, posteriors
from ..batch.batch import Batch
from ..models import PrivateLatents
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
    decoder_network,
    feature_network,
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
) -> Recipe:
    """DMVAE: a product of experts for what is shared, and what is private apart from it.

    Lee & Pavlovic 2021 (arXiv:2012.13024). Where they reconstruct a modality from what another one shares with it, its
    private latent is still that of its own encoder; here it is drawn from its prior, as it is where the modality is
    missing in earnest, so that each of the bounds is one. No modality's likelihood is weighed, and nothing is discrete.
    Encoders of z and of w share no layers.
    """
    names = list(batch)
    model = PrivateLatents(
        standard_prior(latent),
        {name: standard_prior(private) for name in names},
        {name: decoder_network(batch, name, latent + private, hidden) for name in names},
    )
    own = {f"w_{name}": posteriors.Private(name, e) for name, e in unimodal_encoders(batch, private, hidden).items()}
    guide = Guide(z=posteriors.ProductOfExperts(unimodal_encoders(batch, latent, hidden)), **own)
    return Recipe(model, guide, objectives.dmvae(estimator, kl=kl))


@check_recipe_arguments
def mmvae_plus(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    private: int = PRIVATE,
    beta: Number = 1.0,
) -> Recipe:
    """MMVAE+: a mixture of experts for what is shared; private latents of others come from an auxiliary prior r_m.

    Palumbo et al. 2023 (MMVAE+, ICLR): Laplace posteriors and priors, r_m centred at zero with learned scales. Their
    term of expert m leaves log p(w_l) - log r_l(w_l) out, and so has r_l for the prior of every other w_l; it is in
    here, by which all terms bound one log p(x), and r_l is drawn to p(w_l). Scales are not normalised over dimensions,
    p(z) is not learned, and several draws are a mean of bounds, not an importance-weighted one. Encoders of z and of w
    share no layers.
    """
    names, laplace = list(batch), conditionals.Laplace
    model = PrivateLatents(
        standard_prior(latent, dist.Laplace),
        {name: standard_prior(private, dist.Laplace) for name in names},
        {name: decoder_network(batch, name, latent + private, hidden) for name in names},
    )

    def own(name: str) -> nn.Module:
        encoder = laplace(feature_network(batch, name, 2 * private, hidden))
        return posteriors.Private(name, encoder, missing=LearnedScalePrior(private))

    shared = posteriors.MixtureOfExperts(unimodal_encoders(batch, latent, hidden, laplace))
    guide = Guide(z=shared, **{f"w_{name}": own(name) for name in names})
    return Recipe(model, guide, objectives.mixture_mean(beta, estimator))
