"""Recipes as values, and the priors, stories and guides that several of them share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeAlias

import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import nn

from .. import conditionals, posteriors
from ..batch.batch import check_batch
from ..models import SharedLatent
from ..nn import MLP
from ..posteriors.guide import Guide
from ..utils.arguments import check_counts, check_shape, describe
from .modality_networks import ModalityNetworks, check_networks

Estimator: TypeAlias = ELBO | None
P = ParamSpec("P")
LATENT = 16
HIDDEN = (128,)


class Recipe(NamedTuple):
    """A model, a guide and an objective that a paper proposes: ``model, guide, objective = mvae(train)``.

    Attributes:
        model: the generative story p(z, x_1 .. x_M).
        guide: the posterior q(z | x_S).
        objective: the loss to train both by: an :class:`~pyro_mm.objectives.Objective`, or a
            :class:`~pyro_mm.objectives.VAEGAN`.
    """

    model: nn.Module
    guide: Guide
    objective: Any


def check_recipe_arguments(make: Callable[P, Recipe]) -> Callable[P, Recipe]:
    """Decorate a recipe with checks of ``batch``, ``latent``, ``hidden``, ``estimator`` and ``networks``.

    Args:
        make: a function with at least these parameters.

    Returns:
        The function, which raises a TypeError or a ValueError before it builds anything.
    """

    @functools.wraps(make)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Recipe:
        try:
            given = inspect.signature(make).bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"recipe {make.__name__}: {error}; expected {inspect.signature(make)}") from None
        given.apply_defaults()
        check_batch(given.arguments["batch"])
        check_counts(latent=given.arguments["latent"])
        check_shape("hidden", given.arguments["hidden"])
        check_networks(given.arguments["networks"], given.arguments["batch"])
        estimator = given.arguments["estimator"]
        if estimator is not None and not isinstance(estimator, ELBO):
            raise TypeError(f"expected estimator to be a pyro.infer.ELBO or None, got {describe(estimator)}")
        return make(*args, **kwargs)

    return checked


# -- priors -------------------------------------------------------------------------------------------------------


def standard_prior(size: int, family: type[dist.Normal] | type[dist.Laplace] = dist.Normal) -> dist.Distribution:
    """Return a Normal or Laplace with location 0 and scale 1, of event shape ``(size,)``."""
    return family(torch.zeros(size), 1.0).to_event(1)


class LearnedScalePrior(nn.Module):
    """A Laplace distribution with location 0 and trainable scales, which ignores its inputs.

    Args:
        size: the event shape is ``(size,)``.
    """

    def __init__(self, size: int):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(size))

    def forward(self, *_: Any) -> dist.Distribution:
        """Return the distribution, of batch shape ``()``."""
        return dist.Laplace(torch.zeros_like(self.log_scale), self.log_scale.exp(), validate_args=False).to_event(1)


class LearnedClassFrequencies(nn.Module):
    """A Categorical with trainable logits, which ignores its inputs.

    Args:
        number: the number of classes.
    """

    def __init__(self, number: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(number))

    def forward(self, *_: Any) -> dist.Distribution:
        """Return the Categorical, of batch shape ``()``."""
        return dist.Categorical(logits=self.logits, validate_args=False)


# -- models and guides --------------------------------------------------------------------------------------------


def shared_latent_model(
    parts: ModalityNetworks, latent: int, prior: dist.Distribution | nn.Module | None = None
) -> SharedLatent:
    """Build a story with one latent ``(latent,)`` behind all modalities.

    Args:
        parts: makers of networks.
        latent: dimensions of z.
        prior: p(z); None for a standard Normal.
    """
    prior = standard_prior(latent) if prior is None else prior
    return SharedLatent(prior, {name: parts.decoder(name, latent) for name in parts.names})


def unimodal_encoders(
    parts: ModalityNetworks, latent: int, family: type[nn.Module] = conditionals.Normal
) -> dict[str, nn.Module]:
    """Build q(z | x_m) for every modality.

    Args:
        parts: makers of networks.
        latent: dimensions of z.
        family: a conditional with a location and a scale, such as ``conditionals.Laplace``.
    """
    return {name: family(parts.encoder(name, 2 * latent)) for name in parts.names}


def product_guide(parts: ModalityNetworks, latent: int) -> Guide:
    """Build a guide with the product of the experts of all modalities and of the prior expert.

    Args:
        parts: makers of networks.
        latent: dimensions of z.
    """
    return Guide(z=posteriors.ProductOfExperts(unimodal_encoders(parts, latent)))


def make_joint_encoder(
    parts: ModalityNetworks, latent: int, partial: nn.Module | None = None, names: tuple[str, ...] | None = None
) -> posteriors.JointEncoder:
    """Build a joint encoder whose head has the last of the hidden layers, and whose feature networks have the others.

    Args:
        parts: makers of networks, with one hidden layer at least.
        latent: dimensions of z.
        partial: the posterior of rows that lack a modality; None for zeros in place of its features.
        names: the modalities; None for all.

    Raises:
        ValueError: no hidden layer.
    """
    hidden = parts.hidden
    if not hidden:
        raise ValueError("expected hidden to be the sizes of one layer at least, got none: the head is its last")
    width = hidden[-1]
    networks = {name: features_after_relu(parts, name) for name in (parts.names if names is None else names)}
    head = conditionals.Normal(MLP(width * len(networks), 2 * latent, hidden[-1:]))
    return posteriors.JointEncoder(networks, head, partial)


def features_after_relu(parts: ModalityNetworks, name: str) -> nn.Module:
    """Build the features of a modality, as many as the last hidden layer has units, without that layer."""
    return nn.Sequential(parts.encoder(name, parts.hidden[-1], parts.hidden[:-1]), nn.ReLU())


def joint_guide(parts: ModalityNetworks, latent: int) -> Guide:
    """Build a guide with a joint encoder, and for incomplete rows the product of unimodal encoders, without a prior.

    Args:
        parts: makers of networks.
        latent: dimensions of z.
    """
    unimodal = posteriors.ProductOfExperts(unimodal_encoders(parts, latent), prior=None)
    return Guide(z=make_joint_encoder(parts, latent, unimodal))
