"""Recipes with a joint encoder, and encoders of single modalities."""

from __future__ import annotations

from .. import objectives
from ..batch.batch import Batch
from ..objectives.terms import Number
from ..posteriors.guide import Guide
from .modality_networks import Hidden, ModalityNetworks, NetworksOf
from .networks import (  # fmt: skip
    HIDDEN,
    LATENT,
    Estimator,
    Recipe,
    check_recipe_arguments,
    joint_guide,
    make_joint_encoder,
    shared_latent_model,
)


@check_recipe_arguments
def jmvae_zero(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """JMVAE-zero: a joint encoder with zeros in place of what is missing, on which it is not trained.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: a joint encoder without a partial
    posterior. Objective: the ELBO.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Suzuki et al. 2016 (arXiv:1611.01891), their baseline. The zeros stand for features, not for values.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    guide = Guide(z=make_joint_encoder(parts, latent))
    return Recipe(shared_latent_model(parts, latent), guide, objectives.elbo(estimator))


@check_recipe_arguments
def jmvae_kl(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    alpha: float = 0.1,
    kl: Number = 1.0,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """JMVAE-kl: a joint encoder, and unimodal encoders that are drawn near to it.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: a joint encoder, and for incomplete
    rows the product of unimodal Normal encoders, without a prior. Objective: :func:`pyro_mm.objectives.jmvae_kl`.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        alpha: weight of the KLs from the joint posterior to the unimodal ones.
        kl: weight of the prior's KL, or a warm-up of it.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Suzuki et al. 2016 (arXiv:1611.01891), who warm ``kl`` up.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    objective = objectives.jmvae_kl(alpha, estimator, kl=kl)
    return Recipe(shared_latent_model(parts, latent), joint_guide(parts, latent), objective)


@check_recipe_arguments
def telbo(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """TELBO: a joint encoder trained with the decoders, and unimodal encoders trained against the decoders held fixed.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: a joint encoder, and for incomplete
    rows the product of unimodal Normal encoders, without a prior. Objective: :func:`pyro_mm.objectives.telbo`.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Vedantam et al. 2018 (arXiv:1705.10762). They weigh the likelihoods, and have a product of experts over the
        attributes of an incomplete description.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    return Recipe(shared_latent_model(parts, latent), joint_guide(parts, latent), objectives.telbo(estimator))


@check_recipe_arguments
def vaevae_joint(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """VAEVAE with a joint encoder: the evidence of every modality, and of the others given it.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: a joint encoder, and for incomplete
    rows the product of unimodal Normal encoders, without a prior; :func:`vaevae` has a product of experts. Objective:
    :func:`pyro_mm.objectives.vaevae`. A row with one modality adds the bounds of that one.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    References:
        Wu & Goodman 2019 (arXiv:1912.05075), without their adversarial and flow likelihoods.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    return Recipe(shared_latent_model(parts, latent), joint_guide(parts, latent), objectives.vaevae(estimator))
