"""Recipes with normalizing flows: unimodal posteriors in two stages, and decoders of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

from .. import conditionals, objectives, posteriors
from ..batch.batch import Batch
from ..conditionals.unconditional import Unconditional
from ..models import PrivateLatents
from ..nn import MLP
from ..objectives.objective import Objective
from ..objectives.terms import ALL, EACH, Term
from ..posteriors.guide import Guide
from ..utils.arguments import check_flags, check_integer, describe
from ..utils.global_state import import_zuko
from .modality_networks import Hidden, ModalityNetworks, NetworksOf
from .networks import (  # fmt: skip
    HIDDEN,
    LATENT,
    Estimator,
    Recipe,
    check_recipe_arguments,
    features_after_relu,
    make_joint_encoder,
    shared_latent_model,
    standard_prior,
    unimodal_encoders,
)

CONTEXT = 64  # size of what a flow of images sees of its parents


@check_recipe_arguments
def jnf(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    transforms: int = 2,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """JNF, first stage: a joint VAE, with frozen normalizing flows for :func:`jnf_second`.

    Model: one latent behind all modalities, with a standard Normal prior. Guide: a joint encoder, and for rows with one
    of two modalities a masked autoregressive flow q(z | x_m), frozen. Objective: the ELBO. The rows of both stages
    should be complete: an incomplete one is encoded by flows that are not trained yet.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        transforms: number of autoregressive transforms of each flow.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    Raises:
        ValueError: three modalities or more. Given some of several, the paper samples a product of flows by Hamiltonian
            Monte Carlo, which is no distribution that a guide could have.

    References:
        Senellart, Chadebec & Allassonnière 2023 (arXiv:2305.11832), without the features from deep canonical
        correlation of their variant.
    """
    parts = ModalityNetworks(batch, hidden, networks)
    zuko = import_zuko()

    def flow(name: str) -> nn.Module:
        net = features_after_relu(parts, name)
        transform = zuko.flows.MAF(latent, hidden[-1], transforms=transforms, hidden_features=tuple(hidden[-1:]))
        return conditionals.Flow(net, transform)

    partial = posteriors.Either({name: flow(name) for name in batch}).requires_grad_(False)
    guide = Guide(z=make_joint_encoder(parts, latent, partial))
    return Recipe(shared_latent_model(parts, latent), guide, objectives.elbo(estimator))


def jnf_second(run: Recipe) -> Recipe:
    r"""JNF, second stage: fit the flows to the joint posterior. Freezes model and joint encoder, in place.

    .. math:: \min \sum_m KL(q(z | x) \| q(z | x_m))

    by one draw from q(z | x) per row.

    Args:
        run: the recipe of the first stage after its training, or any with a joint encoder and a posterior for
            incomplete rows (``partial``).

    Returns:
        The same model and guide with the objective of the second stage.

    Raises:
        TypeError: ``run`` is not a Recipe, or its posterior of z is not a joint encoder with a ``partial``.
    """
    if not isinstance(run, Recipe):
        raise TypeError(f"expected run to be a Recipe, got {describe(run)}")
    posterior = dict(run.guide.posteriors.items()).get("z")
    if not isinstance(posterior, posteriors.JointEncoder) or posterior.partial is None:
        raise TypeError(f"expected a JointEncoder with a partial posterior for z, got {type(posterior).__name__}")
    run.model.requires_grad_(False)
    run.guide.requires_grad_(False)
    posterior.partial.requires_grad_(True)
    return Recipe(run.model, run.guide, Objective([Term(ALL, (), EACH)]))


@check_recipe_arguments
def vaevae_flow(
    batch: Batch,
    latent: int = LATENT,
    hidden: Hidden = HIDDEN,
    estimator: Estimator = None,
    levels: int = 2,
    variational: bool = False,
    steps: int = 4,
    channels: int = 32,
    *,
    networks: NetworksOf = None,
) -> Recipe:
    """VAEVAE with images decoded by flows, and labels and all else by kind: a model of its own for each modality.

    Model: one latent behind all modalities, with a standard Normal prior, and for every image dequantisation noise as a
    private latent (``conditionals.Dequantized``), so that its likelihood is a probability of levels. Guide: a product
    of Normal encoders and the prior expert, and the noise, uniform or by a flow given the image. Objective:
    ``objectives.vaevae``.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network but those of the flows.
        estimator: estimator of every bound; None for one draw, with KLs in closed form where known (``AnalyticKL()``).
        levels: of a pixel, whose values are multiples of ``1 / (levels - 1)``.
        variational: True for noise by a flow.
        steps: of each scale of a flow. There are two scales where height and width can be halved twice, else one.
        channels: of the flows' networks.
        networks: modality -> :class:`Networks`, or the name of a kind; None to choose all by kind.

    Raises:
        ValueError: an image whose height or width is odd.

    References:
        Wu & Goodman 2019 (arXiv:1912.05075); Ho et al. 2019 (Flow++, arXiv:1902.00275).
    """
    parts = ModalityNetworks(batch, hidden, networks)
    check_flags(variational=variational)
    check_integer("levels", levels, least=2)

    def flow(name: str, net: nn.Module) -> conditionals.ImageFlow:
        shape = batch[name].shape[1:]
        scales = 2 if all(size % 4 == 0 for size in shape[-2:]) else 1
        return conditionals.ImageFlow(net, shape, CONTEXT, scales=scales, steps=steps, hidden=channels, margin=0.0)

    priors: dict[str, dist.Distribution] = {}
    decoders: dict[str, nn.Module] = {}
    noises: dict[str, Callable[..., Any]] = {}
    for name in batch:
        if parts.has_decoder(name) or not _is_image(parts, name):
            decoders[name] = parts.decoder(name, latent)
            continue
        shape = batch[name].shape[1:]
        priors[name] = dist.Uniform(torch.zeros(shape), 1.0).to_event(len(shape))
        decoders[name] = conditionals.Dequantized(flow(name, MLP(latent, CONTEXT, hidden)), levels)
        noises[f"w_{name}"] = Unconditional(priors[name])
        if variational:
            encoder = flow(name, parts.encoder(name, CONTEXT))
            noises[f"w_{name}"] = posteriors.Private(name, encoder, missing=priors[name])

    experts = posteriors.ProductOfExperts(unimodal_encoders(parts, latent))
    guide = Guide(z=experts, **noises)
    return Recipe(PrivateLatents(standard_prior(latent), priors, decoders), guide, objectives.vaevae(estimator))


def _is_image(parts: ModalityNetworks, name: str) -> bool:
    """Return True for floats of shape ``(N, H, W)`` or ``(N, C, H, W)`` that are no sequence."""
    return parts.kind(name) in ("bits", "grey", "array") and len(parts.event(name)) in (2, 3)
