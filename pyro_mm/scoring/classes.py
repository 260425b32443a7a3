r"""Split of a pair's joint density by the classes of one discrete latent, or by the components of a mixture prior.

.. math:: p(x_B, z) = \sum_c p(x_B, z, y = c), \qquad \text{or} \qquad
          p(x_B, z) = \sum_c \pi_c \, p_c(z) \, p(x_B | z)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributions.base import base_distribution
from ..distributions.mixture import Mixture
from .reduction import SiteReducer, eliminate
from .structure import in_data_plate


def split_by_class(site: Mapping[str, Any], others: list[Tensor], shape: SiteReducer) -> Tensor:
    """Return the log joint density with every enumerated site but one summed out.

    Args:
        site: the site whose classes are kept apart: an enumerated one, or one whose prior is a mixture.
        others: log-factors of all other sites, with the dimensions of enumerated ones.
        shape: the reducer of the pair.

    Returns:
        ``(C, K, T, N)``, in nats.
    """
    dim = site["infer"].get("_enumerate_dim")
    factors = [_class_last(x, dim) for x in others]
    if dim is None:
        factors.append(_component_factor(site, shape))
    else:
        factors.append(_class_last(shape.log_prob(dict(site)), dim))

    # the classes are the last dimension now, so that all others lie one further to the left
    parts = eliminate(factors, shape.pair.enum_dim - 1)
    joint = sum(parts[1:], parts[0])
    return torch.stack([shape.full(x) for x in joint.unbind(-1)])


def _class_last(x: Tensor, dim: int | None) -> Tensor:
    """Move the dimension ``dim``, negative, of a log-factor to the end; add one of size 1 if there is none."""
    return x[..., None] if dim is None or x.dim() < -dim else x.movedim(dim, -1)


def _component_factor(site: Mapping[str, Any], shape: SiteReducer) -> Tensor:
    """Return the log-density of each component of a site's mixture, weighted, ``(.., C)``."""
    densities = component_densities(site["fn"], site["value"])
    assert densities is not None  # classes_of_site refuses other sites
    if site["mask"] is not None:
        # a masked site weighs nothing: its components share a weight of one
        mask = torch.as_tensor(site["mask"], device=densities.device)[..., None]
        densities = torch.where(mask, densities, -math.log(densities.shape[-1]))
    return torch.stack([shape.rows(x, dict(site)) for x in densities.unbind(-1)], -1)


def component_densities(d: Any, value: Tensor) -> Tensor | None:
    r"""Return the log-densities :math:`\log \pi_c p_c(z)` of a mixture's components, ``(*batch, C)``.

    Args:
        d: a mixture, possibly transformed.
        value: z, of the event shape of ``d``.

    Returns:
        None for a distribution that is no mixture.
    """
    if isinstance(d, Mixture):
        log_weights = d.log_weights
        log_p = d.components.log_prob(value.unsqueeze(-1 - d.event_dim))
        densities: Tensor | None = (log_weights + log_p).masked_fill(log_weights.isneginf(), -math.inf)
        return densities
    if isinstance(d, torch.distributions.MixtureSameFamily):
        log_weights = d.mixture_distribution.logits.log_softmax(-1)
        return log_weights + d.component_distribution.log_prob(value.unsqueeze(-1 - len(d.event_shape)))
    if isinstance(d, torch.distributions.TransformedDistribution):
        base_value = value
        for transform in reversed(d.transforms):
            base_value = transform.inv(base_value)
        densities = component_densities(d.base_dist, base_value)
        if densities is None or len(d.base_dist.event_shape) != len(d.event_shape):
            return None
        jacobian = d.log_prob(value) - d.base_dist.log_prob(base_value)
        transformed: Tensor = densities + jacobian[..., None]
        return transformed
    return None


def classes_of_site(name: str, site: Mapping[str, Any], in_guide: bool) -> Tensor:
    """Return the classes of a latent site of the model, ``(C, *event)``.

    They are the values of a discrete site that is summed out, and the numbers of the components of a mixture prior.

    Args:
        name: of the site.
        site: the site in a trace of the model, where what can be summed out is enumerated.
        in_guide: True if the guide has it too.

    Raises:
        ValueError: a site without classes, one that is drawn and not summed out, or one in plates within a row.
    """
    if not in_data_plate(site):
        raise ValueError(f"site {name!r} lies outside the plate 'data', and so is of no row: it has no class per row")
    fn = site["fn"]
    inner = [f.name for f in site["cond_indep_stack"] if f.vectorized and f.name not in ("data", "particles", "terms")]
    if "_enumerate_dim" in site["infer"]:
        support = fn.enumerate_support(expand=False)
        values: Tensor = support.reshape(len(support), *fn.event_shape)
    elif fn.has_enumerate_support:
        remedy = "leave it out of the guide, or sum it out with pyro.infer.config_enumerate(guide)"
        raise ValueError(
            f"site {name!r} is drawn by the guide, and its classes have no weights of their own: {remedy}"
            if in_guide
            else f"site {name!r} is not summed out here, and its classes have no weights of their own"
        )
    else:
        densities = component_densities(fn, site["value"])
        if densities is None:
            family = type(base_distribution(fn)).__name__
            raise ValueError(
                f"site {name!r} has no classes: its prior is a {family}, neither a discrete distribution that is "
                "summed out nor a mixture"
            )
        values = torch.arange(densities.shape[-1], device=densities.device)
    if inner:
        raise ValueError(
            f"site {name!r} lies in the plate {inner[0]!r} within each row, so that a row has several classes: "
            "take a site directly in the plate 'data'"
        )
    return values
