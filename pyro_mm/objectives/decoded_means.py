"""Means of one modality that a story decodes from latents of its prior or of the guide, and the parameters behind."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from ..batch.batch import Batch
from ..distributions.pushforward import find_pushforward
from ..distributions.support import unwrap
from ..handlers.plates import KnownPlates
from ..handlers.rewrite import EditSites
from ..scoring.program import Program
from ..scoring.structure import latent_sites
from ..utils.reachable import ReachableObjects


def prior_site(model: Program, batch: Batch, name: str, *, uniform: bool = False) -> dict[str, Any]:
    """Return the site of a modality, decoded from latents of the prior.

    Args:
        model: a callable of a batch.
        batch: N rows, of which the number and the covariates are used.
        name: the modality.
        uniform: True to draw real latents from U(-1, 1) in the place of the prior.
    """
    return _site(model, batch.only(), name, EditSites(_draw_uniform) if uniform else nullcontext())


def posterior_site(model: Program, guide: Program, batch: Batch, name: str) -> dict[str, Any]:
    """Return the site of a modality, decoded from one draw of the guide given all that is present.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        name: the modality.
    """
    with poutine.block(), poutine.trace() as guided, KnownPlates():
        guide(batch)
    return _site(model, batch, name, poutine.replay(trace=guided.trace))


def mean_of(site: dict[str, Any]) -> Tensor:
    """Return the mean of a site's distribution, ``(N, *event)``."""
    mean: Tensor = unwrap_masks(site["fn"]).mean
    return mean


def data_scale(site: dict[str, Any]) -> float:
    """Return the scale of a subsampled data plate around a site: the size of the data over the number of rows."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.name == "data" and frame.vectorized]
    return frames[0].full_size / frames[0].size if frames else 1.0


def unwrap_masks(fn: Any) -> Any:
    """Return a distribution without its masks."""
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def decoder_parameters(model: Program, batch: Batch, name: str) -> list[Tensor]:
    """Return the parameters of p(x_m | z) that require a gradient.

    Args:
        model: a callable of a batch.
        batch: a few rows.
        name: the modality m.

    Raises:
        ValueError: there is none, or one that something else of the story depends on too.
    """
    with torch.enable_grad():
        with poutine.block(), poutine.trace() as traced, EditSites(_draw_without_gradient):
            model(batch.only())
        sites = {n: site for n, site in traced.trace.nodes.items() if site["type"] == "sample"}
        own = unwrap_masks(sites[name]["fn"])
        value = own.sample()
        known = _parameters(model)
        found = _used(own.mean.sum() + own.log_prob(value).sum(), known)
        others = [site for n, site in sites.items() if n != name and n in latent_sites(traced.trace)]
        others += [site for n, site in sites.items() if n != name and site["infer"].get("is_auxiliary", False)]
        elsewhere = sum((_log_density(site) for site in others), torch.zeros((), device=value.device))
    if not found:
        raise ValueError(f"modality {name!r}: its decoder has no parameters that require a gradient")
    if shared := set(map(id, found)) & set(map(id, _used(elsewhere, known))):
        shapes = ", ".join(str(tuple(p.shape)) for p in found if id(p) in shared)
        raise ValueError(
            f"modality {name!r}: something else of the story depends on parameters of its decoder too, of shapes "
            f"{shapes}. Its decoder is trained by an update of its own: give it networks of its own"
        )
    return found


def _site(model: Program, batch: Batch, name: str, handler: Any) -> dict[str, Any]:
    """Return the site of a modality in a run of the model."""
    with poutine.block(), poutine.trace() as traced, handler, KnownPlates():
        model(batch)
    site: dict[str, Any] = traced.trace.nodes[name]
    return site


def _draw_uniform(msg: dict[str, Any]) -> None:
    """Give a latent a draw from U(-1, 1), if its support is that of real numbers."""
    support = msg["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if msg["value"] is None and support is constraints.real:
        like = msg["fn"].sample()
        msg["value"] = 2 * torch.rand_like(like) - 1
        msg["done"] = True


def _draw_without_gradient(msg: dict[str, Any]) -> None:
    """Give a latent a draw that no gradient passes through."""
    if msg["value"] is None:
        msg["value"] = msg["fn"].sample()
        msg["done"] = True


def _log_density(site: dict[str, Any]) -> Tensor:
    """Return a number that depends on the parameters that a site depends on: its log-density, or a draw without one."""
    if (generated := find_pushforward(site["fn"])) is not None:
        return generated.rsample().sum()
    fn = unwrap_masks(site["fn"])
    total: Tensor = fn.log_prob(site["value"].detach()).sum()
    return total


def _parameters(model: Program) -> list[Tensor]:
    """Return the parameters of all modules that a program refers to, each once."""
    modules = ReachableObjects({"model": model}).all_modules()
    found = {id(p): p for module in modules for p in module.parameters(recurse=False) if p.requires_grad}
    return list(found.values())


def _used(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Return those parameters that a value depends on."""
    if not value.requires_grad or not parameters:
        return []
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def unreached_parameters(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Return those parameters that a value does not depend on."""
    used = set(map(id, _used(value.sum(), parameters)))
    return [p for p in parameters if id(p) not in used]


def is_continuous(fn: Any) -> bool:
    """Return True if a distribution has a mean of the shape of its values, by which they can be judged."""
    base = unwrap(fn)
    if isinstance(base, torch.distributions.Categorical | torch.distributions.OneHotCategorical):
        return False
    try:
        mean: Tensor = unwrap_masks(fn).mean
    except (NotImplementedError, AttributeError):
        return False
    return mean.is_floating_point() and mean.shape == torch.Size([*fn.batch_shape, *fn.event_shape])
