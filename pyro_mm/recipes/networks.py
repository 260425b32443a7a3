"""Networks of the recipes, chosen by the kind of each modality, and the models and guides made of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeAlias

import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import nn

from .. import conditionals, posteriors
from ..batch.batch import Batch, check_batch
from ..models import SharedLatent
from ..nn import MLP
from ..objectives.objective import Objective
from ..posteriors.guide import Guide
from ..utils.arguments import check_counts, check_name, check_shape, describe

Hidden: TypeAlias = Sequence[int]
Estimator: TypeAlias = ELBO | None
P = ParamSpec("P")
LATENT = 16
HIDDEN = (128,)


class Recipe(NamedTuple):
    """A model, a guide and an objective that a paper proposes: ``model, guide, objective = mvae(train)``.

    Attributes:
        model: the generative story p(z, x_1 .. x_M).
        guide: the posterior q(z | x_S).
        objective: the loss to train both by.
    """

    model: nn.Module
    guide: Guide
    objective: Objective


def check_recipe_arguments(make: Callable[P, Recipe]) -> Callable[P, Recipe]:
    """Decorate a recipe with checks of ``batch``, ``latent``, ``hidden`` and ``estimator``.

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
        estimator = given.arguments["estimator"]
        if estimator is not None and not isinstance(estimator, ELBO):
            raise TypeError(f"expected estimator to be a pyro.infer.ELBO or None, got {describe(estimator)}")
        return make(*args, **kwargs)

    return checked


# -- kinds of modalities ------------------------------------------------------------------------------------------


def is_label(batch: Batch, name: str) -> bool:
    """Return True for a label, integers of shape ``(N,)``, and False for an image, floats of shape ``(N, H, W)``.

    Raises:
        ValueError: the modality is of neither kind, unknown, or without values in the batch.
    """
    check_batch(batch)
    check_name("modality", name, batch)
    if not batch.holds(name):
        raise ValueError(
            f"modality {name!r}: the batch holds no values of it, which the networks take their sizes from"
        )
    value = batch[name]
    is_image = value.is_floating_point() and value.dim() > 2
    if not is_image and (value.is_floating_point() or value.dim() != 1):
        raise ValueError(
            f"{name!r} is neither an image, floats of shape (N, H, W), nor a label, integers of shape (N,): it is "
            f"{value.dtype} of shape {tuple(value.shape)}. A recipe has no networks for it; write the story instead"
            + (", or make it integers, .long(), if it is a label" if value.dim() == 1 else "")
        )
    return not is_image


def number_of_classes(batch: Batch, name: str) -> int:
    """Return the number of classes of a label: one more than its largest value in the batch."""
    check_name("modality", name, batch)
    return int(batch[name].max()) + 1


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


# -- networks of one modality -------------------------------------------------------------------------------------


def decoder_network(batch: Batch, name: str, inputs: int, hidden: Hidden) -> nn.Module:
    """Build p(x_m | z): a Categorical for a label, independent Bernoulli pixels for an image.

    Args:
        batch: rows from which the kind and the size of the modality are read.
        name: the modality m.
        inputs: the size of z, ``(.., inputs)``.
        hidden: sizes of the hidden layers.
    """
    if is_label(batch, name):
        return conditionals.Categorical(MLP(inputs, number_of_classes(batch, name), hidden))
    event = batch[name].shape[1:]
    return conditionals.Bernoulli(MLP(inputs, event.numel(), hidden), event)


def feature_network(batch: Batch, name: str, out: int, hidden: Hidden) -> nn.Module:
    """Build a map from values to features ``(.., out)``: a perceptron for an image, an embedding for a label.

    Args:
        batch: rows from which the kind and the size of the modality are read.
        name: the modality.
        out: the number of features.
        hidden: sizes of the hidden layers, which an embedding does not have.
    """
    if is_label(batch, name):
        return nn.Embedding(number_of_classes(batch, name), out)
    return MLP(batch[name][0].numel(), out, hidden)


# -- models and guides --------------------------------------------------------------------------------------------


def shared_latent_model(
    batch: Batch, latent: int, hidden: Hidden, prior: dist.Distribution | nn.Module | None = None
) -> SharedLatent:
    """Build a story with one latent ``(latent,)`` behind all modalities of a batch.

    Args:
        batch: rows from which kinds and sizes of the modalities are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of each decoder.
        prior: p(z); None for a standard Normal.
    """
    prior = standard_prior(latent) if prior is None else prior
    return SharedLatent(prior, {name: decoder_network(batch, name, latent, hidden) for name in batch})


def unimodal_encoders(
    batch: Batch, latent: int, hidden: Hidden, family: type[nn.Module] = conditionals.Normal
) -> dict[str, nn.Module]:
    """Build q(z | x_m) for every modality of a batch.

    Args:
        batch: rows from which kinds and sizes of the modalities are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers.
        family: a conditional with a location and a scale, such as ``conditionals.Laplace``.
    """
    return {name: family(feature_network(batch, name, 2 * latent, hidden)) for name in batch}


def product_guide(batch: Batch, latent: int, hidden: Hidden) -> Guide:
    """Build a guide with the product of the experts of all modalities and of the prior expert.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
    """
    return Guide(z=posteriors.ProductOfExperts(unimodal_encoders(batch, latent, hidden)))


def make_joint_encoder(
    batch: Batch, latent: int, hidden: Hidden, partial: nn.Module | None = None
) -> posteriors.JointEncoder:
    """Build a joint encoder whose head has the last of the hidden layers, and whose feature networks have the others.

    Args:
        batch: rows from which kinds and sizes of the modalities are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers, one at least.
        partial: the posterior of rows that lack a modality; None for zeros in place of its features.

    Raises:
        ValueError: no hidden layer.
    """
    if not hidden:
        raise ValueError("expected hidden to be the sizes of one layer at least, got none: the head is its last")
    width = hidden[-1]
    networks = {name: nn.Sequential(feature_network(batch, name, width, hidden[:-1]), nn.ReLU()) for name in batch}
    head = conditionals.Normal(MLP(width * len(networks), 2 * latent, hidden[-1:]))
    return posteriors.JointEncoder(networks, head, partial)


def joint_guide(batch: Batch, latent: int, hidden: Hidden) -> Guide:
    """Build a guide with a joint encoder, and for incomplete rows the product of unimodal encoders, without a prior.

    Args:
        batch: rows from which the modalities, their kinds and sizes are read.
        latent: dimensions of z.
        hidden: sizes of the hidden layers of every network.
    """
    unimodal = posteriors.ProductOfExperts(unimodal_encoders(batch, latent, hidden), prior=None)
    return Guide(z=make_joint_encoder(batch, latent, hidden, unimodal))
