"""Draws from a model, ancestor by ancestor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import Presence, over_events
from ..distributions.base import base_distribution
from ..scoring.evaluation import evaluating, returned
from ..scoring.structure import factor_sites, latent_sites, observed_sites, private_modality
from ..utils.arguments import check_programs

SiteValues = dict[str, Tensor]


def to_sample_layout(site: Any, size: int, value: Tensor | None = None, event_dim: int | None = None) -> Tensor:
    """The value of a site, or another one of its batch shape, as ``(S, N, *plates, *event)``."""
    x, event_dim = site["value"] if value is None else value, site["fn"].event_dim if event_dim is None else event_dim
    plates = {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    particles, _ = plates.pop("particles", None), plates.pop("data", None)
    inner = {frame.dim: frame.size for frame in plates.values()}
    lead, event = x.dim() - event_dim, x.shape[x.dim() - event_dim :]
    nesting = max([1, lead, *(-dim for dim in inner)]) if particles is None else -particles.dim - 1
    samples = 1 if particles is None else particles.size
    x = x.expand(samples, *(inner.get(dim, 1) for dim in range(-nesting, -1)), size, *event)
    return x.reshape(samples, *(inner[dim] for dim in sorted(inner)), size, *event).movedim(1 + len(inner), 1)


@torch.no_grad()
def simulate(model: Callable[[Batch], Any], batch: Batch, *, audit: bool = True) -> tuple[Batch, dict[str, Tensor]]:
    """Rows drawn from the model itself, with the latents that made them: an exact draw from p(z | x) of those rows.

    Args:
        batch: says how many rows, which modalities each of them has, and the covariates; its values are not used.
        audit: False spares the audit of the model (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

    Returns:
        (rows, latents): the batch with drawn values under the same masks, and latent site -> ``(N, *event)``, with the
        plates within a row to the left of N.
    """
    check_programs(model=model)
    with evaluating(model, None, batch, audit=audit) as rows:
        with poutine.block(), poutine.trace() as drawn:
            model(rows.only())
        if weighed := factor_sites(drawn.trace, rows):
            raise ValueError(
                f"the story observes {sorted(weighed)[0]!r}, which is no modality of the batch, so that rows cannot be "
                "simulated: a draw of its latents would have to be weighed by it. Make it a modality, or leave it out"
            )
        sites = {name: site for name, site in observed_sites(drawn.trace).items() if name in rows}
        values = {name: to_sample_layout(site, rows.size)[0] for name, site in sites.items()}
        found = rows.replaced(values), {name: site["value"] for name, site in latent_sites(drawn.trace).items()}
        return returned(found, rows, batch)


class AncestralSampler(Messenger):
    """Draws every modality anew, and from p the latents that nothing present informs on, given their parents' values.

    Descendants of a modality see its value where it was observed, and the draw elsewhere.
    """

    def __init__(self, batch: Batch, modalities: frozenset[str], mean: bool):
        super().__init__()
        self.batch, self._modalities, self.mean = batch, modalities, mean
        self.modalities: SiteValues = {}

    def informed(self, site: Any) -> Presence:
        """The rows in which something that is present informs on a latent."""
        modality = private_modality(site["name"], self._modalities)
        there = self.batch.rows if modality is None else self.batch.presence(modality)
        return there if isinstance(there, bool) or in_data_plate(site) else True

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        if msg["is_observed"] and in_data_plate(msg):
            self._observed(msg)
        elif not msg["is_observed"] and msg["value"] is not None and (there := self.informed(msg)) is not True:
            msg["value"] = select(there, msg["value"], msg["fn"].sample(), msg["fn"].event_dim)

    def _observed(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        while isinstance(fn, dist.MaskedDistribution):
            fn = fn.base_dist
        if isinstance(fn, dist.Unit):
            return
        missing = msg["infer"].get("is_auxiliary", False)  # a modality of which the batch holds nothing
        there, drawn = self.batch.presence(name) if name in self.batch else not missing, fn.sample()
        msg["value"] = select(there, msg["value"], drawn, fn.event_dim)
        event_dim = fn.event_dim + (self.mean and _is_categorical(fn))
        self.modalities[name] = to_sample_layout(
            msg, self.batch.size, mean_of_modality(name, fn) if self.mean else drawn, event_dim
        )


def in_data_plate(site: Any) -> bool:
    return any(frame.name == "data" for frame in site["cond_indep_stack"])


def select(mask: Presence, one: Tensor, other: Tensor, event_dim: int) -> Tensor:
    if isinstance(mask, Tensor):
        return torch.where(over_events(mask, event_dim), one, other)
    return one if mask else other


def _is_categorical(fn: Any) -> bool:
    while isinstance(fn, torch.distributions.Independent | dist.Independent):
        fn = fn.base_dist
    return isinstance(fn, torch.distributions.Categorical)


def mean_of_modality(name: str, fn: Any) -> Tensor:
    """Return the mean of a modality's distribution. Raises a ValueError for a family whose mean is not known."""
    if not _is_categorical(fn):
        try:
            return fn.mean
        except (NotImplementedError, AttributeError) as error:
            family = type(base_distribution(fn)).__name__
            raise ValueError(
                f"modality {name!r}: {family} has no mean that is known: take draws, mean=False"
            ) from error
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn.probs
