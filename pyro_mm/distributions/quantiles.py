"""Inverse-CDF sampling: draws as functions of uniform noise."""

from __future__ import annotations

import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, MultivariateNormal, TransformedDistribution

from .mixture import Mixture
from .where import Where

MARGIN = 1e-15  # kept from 0 and 1, where the inverse of a distribution function is infinite


def has_mixture(fn: Distribution) -> bool:
    """Whether a draw chooses a component, for which it needs a uniform of its own."""
    if isinstance(fn, Mixture):
        return True
    if isinstance(fn, Where):
        return has_mixture(fn.p) or has_mixture(fn.q)
    return hasattr(fn, "base_dist") and has_mixture(fn.base_dist)


def component_at(mixture: Mixture, u: Tensor) -> Tensor:
    """The component that the uniform u, of the mixture's batch shape, falls on."""
    cumulative = mixture.log_weights.double().exp().cumsum(-1)
    cumulative = cumulative / cumulative[..., -1:]  # so that the last component in use ends at 1 exactly
    return (u[..., None] >= cumulative).sum(-1).clamp(max=mixture.num_components - 1)


def quantile(fn: Distribution, u: Tensor, choice: Tensor) -> Tensor:
    """A draw made of uniforms: ``u`` of the draw's shape, and ``choice`` of its batch shape for a component.

    Raises:
        NotImplementedError: for a family whose inverse distribution function is not known.
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
        return fn.loc + (fn.scale_tril @ torch.special.ndtri(u)[..., None])[..., 0]
    return fn.icdf(u)
