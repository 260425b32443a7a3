"""Recipes with a joint encoder, and encoders of one modality beside it."""

from __future__ import annotations

from .. import objectives
from ..batch.batch import Batch
from ..objectives.terms import Number
from ..posteriors.guide import Guide
from .networks import (
    HIDDEN,
    LATENT,
    Estimator,
    Hidden,
    Recipe,
    check_recipe_arguments,
    joint_guide,
    make_joint_encoder,
    shared_latent_model,
)


@check_recipe_arguments
def jmvae_zero(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """JMVAE-zero: a joint encoder that is given zeros for what is missing, and never trained on them.

    Suzuki et al. 2016 (arXiv:1611.01891), their baseline. Zeros stand for features, not for the values.
    """
    guide = Guide(z=make_joint_encoder(batch, latent, hidden))
    return Recipe(shared_latent_model(batch, latent, hidden), guide, objectives.elbo(estimator))


@check_recipe_arguments
def jmvae_kl(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    alpha: float = 0.1,
    kl: Number = 1.0,
) -> Recipe:
    """JMVAE-kl: a joint encoder, and unimodal encoders drawn near to it.

    Suzuki et al. 2016 (arXiv:1611.01891). They warm up ``kl``, the weight of the prior's KL.
    """
    objective = objectives.jmvae_kl(alpha, estimator, kl=kl)
    return Recipe(shared_latent_model(batch, latent, hidden), joint_guide(batch, latent, hidden), objective)


@check_recipe_arguments
def telbo(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """The triple ELBO: a joint encoder trained with the decoders, and unimodal encoders trained against them.

    Vedantam et al. 2018 (arXiv:1705.10762). They weigh the likelihoods, and have a product of experts over the
    attributes of an incomplete description.
    """
    return Recipe(
        shared_latent_model(batch, latent, hidden), joint_guide(batch, latent, hidden), objectives.telbo(estimator)
    )


@check_recipe_arguments
def vaevae_joint(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """Wu & Goodman's objective of every modality's evidence and the others' given it, with a joint encoder.

    Wu & Goodman 2019 (arXiv:1912.05075). With three modalities or more, what is given several but not all of them is
    the product of their encoders. Without their adversarial and flow likelihoods, and rows that have one modality only
    add the bounds of that one. :func:`vaevae` has a product of experts.
    """
    return Recipe(
        shared_latent_model(batch, latent, hidden), joint_guide(batch, latent, hidden), objectives.vaevae(estimator)
    )
