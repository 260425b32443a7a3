"""The networks of the recipes: for each modality of a batch, by its kind, and put together to stories and guides."""

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
LATENT, HIDDEN = 16, (128,)


class Recipe(NamedTuple):
    """What a paper proposes, as three values that can be taken apart: ``model, guide, objective = mvae(train)``."""

    model: nn.Module
    guide: Guide
    objective: Objective


def check_recipe_arguments(make: Callable[P, Recipe]) -> Callable[P, Recipe]:
    """Check the arguments that recipes share, for a function ``(batch, latent, hidden, estimator, ..)``."""

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


def is_label(batch: Batch, name: str) -> bool:
    """Whether a modality is a label, integers ``(N,)``, and not an image. Raises a ValueError if it is neither."""
    check_batch(batch)
    check_name("modality", name, batch)
    if not batch.holds(name):
        raise ValueError(
            f"modality {name!r}: the batch holds no values of it, which the networks take their sizes from"
        )
    value = batch[name]
    image = value.is_floating_point() and value.dim() > 2
    if not image and (value.is_floating_point() or value.dim() != 1):
        raise ValueError(
            f"{name!r} is neither an image, floats of shape (N, H, W), nor a label, integers of shape (N,): it is "
            f"{value.dtype} of shape {tuple(value.shape)}. A recipe has no networks for it; write the story instead"
            + (", or make it integers, .long(), if it is a label" if value.dim() == 1 else "")
        )
    return not image


def number_of_classes(batch: Batch, name: str) -> int:
    """The number of classes of a label: one more than the largest that the rows have."""
    check_name("modality", name, batch)
    return int(batch[name].max()) + 1


class LearnedScalePrior(nn.Module):
    """A distribution centred at zero, whose scales are parameters: a prior that is learned."""

    def __init__(self, size: int, family: type[dist.Normal] | type[dist.Laplace] = dist.Laplace):
        super().__init__()
        self.family, self.log_scale = family, nn.Parameter(torch.zeros(size))

    def forward(self, *_: Any) -> dist.Distribution:
        return self.family(torch.zeros_like(self.log_scale), self.log_scale.exp(), validate_args=False).to_event(1)


class LearnedClassFrequencies(nn.Module):
    """A Categorical whose logits are parameters."""

    def __init__(self, number: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(number))

    def forward(self, *_: Any) -> dist.Distribution:
        return dist.Categorical(logits=self.logits, validate_args=False)


def standard_prior(size: int, family: type[dist.Normal] | type[dist.Laplace] = dist.Normal) -> dist.Distribution:
    """A Normal or Laplace with location 0 and scale 1 for each of ``size`` entries, event shape ``(size,)``."""
    return family(torch.zeros(size), 1.0).to_event(1)


def decoder_network(batch: Batch, name: str, inputs: int, hidden: Hidden) -> nn.Module:
    """p(x_m | z) from ``(.., inputs)``: Categorical for a label, independent Bernoulli pixels for an image."""
    if is_label(batch, name):
        return conditionals.Categorical(MLP(inputs, number_of_classes(batch, name), hidden))
    event = batch[name].shape[1:]
    return conditionals.Bernoulli(MLP(inputs, event.numel(), hidden), event)


def shared_latent_model(
    batch: Batch, latent: int, hidden: Hidden, prior: dist.Distribution | nn.Module | None = None
) -> SharedLatent:
    """One latent ``(latent,)`` behind all modalities of the batch, standard Normal unless a prior is given."""
    prior = standard_prior(latent) if prior is None else prior
    return SharedLatent(prior, {name: decoder_network(batch, name, latent, hidden) for name in batch})


def feature_network(batch: Batch, name: str, out: int, hidden: Hidden) -> nn.Module:
    """From values to ``(.., out)``: a perceptron for an image, and for a label a table with a row for each class."""
    if is_label(batch, name):
        return nn.Embedding(number_of_classes(batch, name), out)
    return MLP(batch[name][0].numel(), out, hidden)


def unimodal_encoders(
    batch: Batch, latent: int, hidden: Hidden, family: type[nn.Module] = conditionals.Normal
) -> dict[str, nn.Module]:
    """q(z | x_m) of every modality, a Normal unless another family of location and scale is given."""
    return {name: family(feature_network(batch, name, 2 * latent, hidden)) for name in batch}


def product_guide(batch: Batch, latent: int, hidden: Hidden) -> Guide:
    """The product of the experts of all modalities and of the prior expert."""
    return Guide(z=posteriors.ProductOfExperts(unimodal_encoders(batch, latent, hidden)))


def make_joint_encoder(
    batch: Batch, latent: int, hidden: Hidden, partial: nn.Module | None = None
) -> posteriors.JointEncoder:
    """Features of one hidden layer less than an encoder, whose last one is the head's."""
    if not hidden:
        raise ValueError("expected hidden to be the sizes of one layer at least, got none: the head is its last")
    width = hidden[-1]
    parts = {name: nn.Sequential(feature_network(batch, name, width, hidden[:-1]), nn.ReLU()) for name in batch}
    head = conditionals.Normal(MLP(width * len(parts), 2 * latent, hidden[-1:]))
    return posteriors.JointEncoder(parts, head, partial)


def joint_guide(batch: Batch, latent: int, hidden: Hidden) -> Guide:
    """A joint encoder, and for rows that are not complete the unimodal encoders of what they have."""
    unimodal = posteriors.ProductOfExperts(unimodal_encoders(batch, latent, hidden), prior=None)
    return Guide(z=make_joint_encoder(batch, latent, hidden, unimodal))
