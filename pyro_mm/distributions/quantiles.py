"""Inverse-CDF sampling: draws as functions of uniform noise."""

from __future__ import annotations

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, TransformedDistribution

from .mixture import Mixture
from .where import Where

MARGIN = 1e-15  # least distance of a uniform from 0 and 1, where an inverse CDF is infinite


def has_mixture(fn: Distribution) -> bool:
    """Return True if a draw from a distribution selects a component, which takes one more uniform."""
    if isinstance(fn, Mixture):
        return True
    if isinstance(fn, Where):
        return has_mixture(fn.p) or has_mixture(fn.q)
    return hasattr(fn, "base_dist") and has_mixture(fn.base_dist)


def component_at(mixture: Mixture, u: Tensor) -> Tensor:
    """Return the component of a mixture at a uniform: the inverse CDF of its weights.

    Args:
        mixture: of C components.
        u: uniforms of the mixture's batch shape.

    Returns:
        Integers below C, of the batch shape.
    """
    cumulative = mixture.log_weights.double().exp().cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]  # the last component with a weight then ends at 1 exactly
    return (u[..., None] >= cumulative).sum(-1).clamp(max=mixture.num_components - 1)


def quantile(fn: Distribution, u: Tensor, choice: Tensor) -> Tensor:
    """Transform uniforms to a draw, by the inverse CDF of every entry.

    Args:
        fn: the distribution.
        u: uniforms of the draw's shape, ``(*batch_shape, *event_shape)``.
        choice: uniforms of the batch shape, which select the components of a mixture.

    Returns:
        The draw.

    Raises:
        NotImplementedError: a family whose inverse CDF is not known.

    Example:
        >>> from pyro.distributions import Normal
        >>> quantile(Normal(10.0, 2.0), torch.tensor([0.5, 0.975]), torch.zeros(2))
        tensor([10.0000, 13.9199])
    """
    if isinstance(fn, Mixture):
        return quantile(fn.chosen(component_at(fn, choice)), u, choice)
    if isinstance(fn, Where):
        return fn.choose(quantile(fn.p, u, choice), quantile(fn.q, u, choice))
    if isinstance(fn, Independent) and fn.reinterpreted_batch_ndims and has_mixture(fn):
        raise NotImplementedError("a mixture inside to_event chooses a component for each of its elements")
    if isinstance(fn, Independent | MaskedDistribution | ExpandedDistribution):
        return quantile(fn.base_dist, u, choice)
    if isinstance(fn, TransformedDistribution):
        x = quantile(fn.base_dist, u, choice)
        for transform in fn.transforms:
            x = transform(x)
        return x
    u = u.clamp(MARGIN, 1 - MARGIN)
    if isinstance(fn, MultivariateNormal):
        value: Tensor = fn.loc + (fn.scale_tril @ torch.special.ndtri(u)[..., None])[..., 0]
        return value
    return fn.icdf(u)
