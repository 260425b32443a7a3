"""Ancestral sampling: draws from a model, parents first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import SURROGATE, Presence, add_event_dims
from ..distributions.base import base_distribution
from ..distributions.support import unwrap
from ..distributions.token_sequence import TokenSequence
from ..handlers.rewrite import EditSites
from ..scoring.evaluation import evaluating, move_result
from ..scoring.structure import factor_sites, in_data_plate, latent_sites, observed_sites, private_modality
from ..utils.arguments import check_programs

SiteValues = dict[str, Tensor]
"""Site -> value."""


@torch.no_grad()
def simulate(model: Callable[[Batch], Any], batch: Batch, *, audit: bool = True) -> tuple[Batch, dict[str, Tensor]]:
    """Simulate rows from a model, together with the latents that made them.

    The latents are an exact draw from the posterior p(z | x) of the simulated rows, which makes such rows a test bed
    for guides (:func:`~pyro_mm.calibration`) and for likelihoods (:func:`~pyro_mm.bidirectional`). Draws come from
    torch's generator, and modules run in evaluation mode.

    Args:
        model (callable): a story, called with a batch.
        batch (Batch): N rows. Their number, masks and covariates are used, and their values are not.
        audit (bool): False skips the audit of the model (:mod:`pyro_mm.scoring.audit`) and its errors.

    Returns:
        (rows, latents): the batch with simulated values under the same masks, and latent site -> ``(*plates, N,
        *event)``, plates being those within a row. Sequences have the lengths of the batch, or those at which their
        tokens end.

    Raises:
        ValueError: a story that observes a site which is no modality of the batch, such as a ``pyro.factor``.

    Example:
        >>> import torch, pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"x": torch.ones(3, 2)})
        >>> rows, latents = mm.simulate(model, mm.Batch({"x": torch.zeros(5, 3)}))
        >>> rows["x"].shape, latents["z"].shape
        (torch.Size([5, 3]), torch.Size([5, 2]))
    """
    check_programs(model=model)
    with evaluating(model, None, batch, audit=audit) as rows:
        with poutine.block(), poutine.trace() as traced:
            model(rows.only())
        if factors := factor_sites(traced.trace, rows):
            raise ValueError(
                f"the story observes {sorted(factors)[0]!r}, which is no modality of the batch, and simulated "
                "latents would have to be weighed by it: make it a modality, or leave it out"
            )

        sites = {name: site for name, site in observed_sites(traced.trace).items() if name in rows}
        for name, site in sites.items():
            if ignored := getattr(base_distribution(_unmasked(site["fn"])), "ignores_parents", None):
                raise ValueError(
                    f"modality {name!r}: its draws do not depend on {ignored}, so that simulated rows and latents "
                    "would be no draw from their joint distribution. For rows alone take generate(model, guide, "
                    "Batch.empty(n, batch)); for a test of the guide, a story of noisy values (datasets.dequantize)"
                )
        values = {name: to_sample_layout(site, rows.size)[0] for name, site in sites.items()}
        latents = {name: site["value"] for name, site in latent_sites(traced.trace).items()}
        lengths = {name: _lengths_of(sites[name]["fn"], values[name]) for name in rows.lengths if name in values}
        ended = {name: length for name, length in lengths.items() if length is not None}
        return move_result((rows.replaced(values).with_lengths(ended), latents), rows, batch)


def to_sample_layout(site: Any, size: int, value: Tensor | None = None, event_dim: int | None = None) -> Tensor:
    """Bring the value of a site to ``(S, N, *plates, *event)``, samples first and rows second.

    A site outside the plate "data", which is of no row, is brought to ``(S, *plates, *event)``.

    Args:
        site: a site of a trace, in the plates "particles" (or not), "data" (or not) and those within a row.
        size: N.
        value: another value of the site's batch shape.
        event_dim: the number of event dimensions of that value.
    """
    x = site["value"] if value is None else value
    event_dim = site["fn"].event_dim if event_dim is None else event_dim
    batch_dim = x.dim() - event_dim
    event = x.shape[batch_dim:]

    plates = {frame.name: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    particles = plates.pop("particles", None)
    plates.pop("data", None)
    within_row = {frame.dim: frame.size for frame in plates.values()}

    if particles is None:
        samples = 1
        nesting = max([1, batch_dim, *(-dim for dim in within_row)])
    else:
        samples = particles.size
        nesting = -particles.dim - 1
    sizes = [within_row[dim] for dim in sorted(within_row)]
    if not in_data_plate(site):
        x = x.expand(samples, *(within_row.get(dim, 1) for dim in range(-nesting, 0)), *event)
        return x.reshape(samples, *sizes, *event)
    x = x.expand(samples, *(within_row.get(dim, 1) for dim in range(-nesting, -1)), size, *event)
    return x.reshape(samples, *sizes, size, *event).movedim(1 + len(sizes), 1)


class AncestralSampler(EditSites):
    """Handler that samples every modality, and those latents from the prior that no present modality informs.

    A latent in the plate "data" keeps its value in the rows that :meth:`informed_rows` names, and is drawn given its
    parents' values in the others. Descendants of a modality see its value where it is observed, and the draw elsewhere.

    Args:
        batch: N rows.
        modalities: names of the model's modalities.
        mean: True to return means in the place of draws, or the names of the modalities whose means to return.
        surrogates: True to keep private latents that the guide infers for missing modalities.

    Attributes:
        samples: modality -> draws or means, ``(S, N, *plates, *event)``, after a run of the model.
        lengths: sequence -> numbers of valid steps of its draws, ``(S, N, *plates)``: those of the batch, or those at
            which its tokens end.
    """

    def __init__(self, batch: Batch, modalities: frozenset[str], mean: bool | frozenset[str], surrogates: bool = True):
        super().__init__(self._sample_latent, self._sample_modality)
        self.batch = batch
        self.mean = mean
        self.samples: SiteValues = {}
        self.lengths: SiteValues = {}
        self._modalities = modalities
        self._surrogates = surrogates

    def informed_rows(self, site: Any) -> Presence:
        """Return the rows in which a present modality informs a latent: its own one if the latent is private.

        A private latent that the guide infers from other modalities, by a surrogate, is informed by any of them.
        """
        by_any = self._surrogates and site["infer"].get(SURROGATE, False)
        modality = None if by_any else private_modality(site["name"], self._modalities)
        rows = self.batch.rows if modality is None else self.batch.presence(modality)
        return rows if isinstance(rows, bool) or in_data_plate(site) else True

    def _sample_latent(self, msg: dict[str, Any]) -> None:
        if msg["value"] is None:
            return  # a latent that the trace lacks, which the model draws
        rows = self.informed_rows(msg)
        if rows is not True:
            msg["value"] = select(rows, msg["value"], msg["fn"].sample(), msg["fn"].event_dim)

    def _sample_modality(self, msg: dict[str, Any]) -> None:
        if not in_data_plate(msg):
            return
        name, fn = msg["name"], msg["fn"]
        while isinstance(fn, dist.MaskedDistribution):
            fn = fn.base_dist
        if isinstance(fn, dist.Unit):
            return

        sample = fn.sample()
        held = not msg["infer"].get("is_auxiliary", False)  # False for a modality of which the batch holds nothing
        present = self.batch.presence(name) if name in self.batch else held
        msg["value"] = select(present, msg["value"], sample, fn.event_dim)

        in_mean = self.mean if isinstance(self.mean, bool) else name in self.mean
        event_dim = fn.event_dim + (in_mean and _is_categorical(fn))  # probabilities have one more dimension
        value = mean_of_modality(name, fn) if in_mean else sample
        self.samples[name] = to_sample_layout(msg, self.batch.size, value, event_dim)
        lengths = _lengths_of(fn, sample)
        if lengths is None and name in self.batch.lengths and not self.batch.has_end_marks:
            lengths = self.batch.lengths[name].expand(fn.batch_shape)
        if lengths is not None:
            self.lengths[name] = to_sample_layout(msg, self.batch.size, lengths, 0)


def _lengths_of(fn: Any, draw: Tensor) -> Tensor | None:
    """Return the numbers of tokens of draws of strings, of the distribution's batch shape; None for other draws."""
    d = unwrap(fn)
    return d.lengths_of(draw) if isinstance(d, TokenSequence) and d.end is not None else None


def select(mask: Presence, one: Tensor, other: Tensor, event_dim: int) -> Tensor:
    """Return ``one`` where the mask holds and ``other`` elsewhere; the mask is of their batch shape, or a bool."""
    if isinstance(mask, Tensor):
        return torch.where(add_event_dims(mask, event_dim), one, other)
    return one if mask else other


def mean_of_modality(name: str, fn: Any) -> Tensor:
    """Return the mean of a distribution; of a Categorical, the probabilities of its classes, ``(.., C)``.

    Raises:
        ValueError: a family whose mean is not known.
    """
    if not _is_categorical(fn):
        try:
            mean: Tensor = fn.mean
            return mean
        except (NotImplementedError, AttributeError) as error:
            family = type(unwrap(fn)).__name__
            raise ValueError(
                f"modality {name!r}: {family} has no mean that is known: take draws, mean=False, or "
                "name the modalities whose means you want, as in mean=[..]"
            ) from error
    probabilities: Tensor = unwrap(fn).probs
    return probabilities


def _unmasked(fn: Any) -> Any:
    """Return a distribution without its masks."""
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    return fn


def _is_categorical(fn: Any) -> bool:
    return isinstance(unwrap(fn), torch.distributions.Categorical)
