"""Particles that are scored a second time, with gradients, after some were chosen by their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .model_scores import score_model
from .program_runs import propose
from .scores import Scores
from .structure import PairStructure, latent_sites
from .term_pair import TermPair
from .views import TermViews


def no_rescoring_reason(structure: PairStructure, views: TermViews) -> str | None:
    """Return the reason why a particle that is scored twice would not be scored the same, or None."""
    if structure.random:
        return "networks draw random numbers, as dropout does in training mode, and would draw others"
    if structure.normalises:
        return "what depends on latents goes through batch normalisation in training mode, whose rows would be others"
    # what the prior was drawn given, in terms that encode it, is chosen with its draws
    drawing = [masks for t, masks in enumerate(views.decode.terms()) if t not in views.prior_terms]
    if structure.model_only and drawing:
        return f"latent {sorted(structure.model_only)[0]!r} is in the model only, and would be drawn anew"
    for name in sorted(structure.parents):
        if any(masks.get(name, False) is not True for masks in drawing):
            return f"modality {name!r} is the parent of another one and missing in some rows, and would be drawn anew"
    return None


def rescore(pair: TermPair, structure: PairStructure, log_component: Tensor | None, index: Tensor) -> Scores:
    """Recompute the particles ``index``, ``(C, T, N)``, of a pair with gradients."""
    some = TermPair(pair.source_model, pair.source_guide, pair.views, len(index))
    terms = index.shape[1:2] if pair.views.terms > 1 else ()

    def take_chosen(value: Tensor, events: int) -> Tensor:
        if not pair.plated:
            return value
        dim = value.dim() - events + pair.particle_dim
        place = index.reshape(len(index), *terms, *[1] * (pair.views.nesting - 1), index.shape[-1], *[1] * events)
        shape = (*value.shape[:dim], len(index), *value.shape[dim + 1 :])
        value = value.gather(dim, place.expand(shape))
        return value if some.plated else value.squeeze(dim)

    def at_chosen(sites: Mapping[str, Any]) -> poutine.Trace:
        chosen = poutine.Trace()  # without the plates, whose sizes are other ones
        for name, site in sites.items():
            value = site["value"]
            chosen.add_node(name, **site | {"value": take_chosen(value, value.dim() - len(site["fn"].batch_shape))})
        return chosen

    chosen = at_chosen(latent_sites(pair.trace))
    if pair.views.encode_prior is not False:
        missing = {name: (take_chosen(x, events), events) for name, (x, events) in pair.missing_of_prior.items()}
        some.prior = some.draw_prior(at_chosen(pair.prior or {}), missing)
    with poutine.replay(trace=chosen):
        propose(some, structure)
    scores = score_model(some, structure)
    scores.log_component = None if log_component is None else log_component.gather(0, index)
    return scores


def resampled_kl(divergence: Callable[[Scores], Tensor], rescore_some: Callable[[], Scores], scores: Scores) -> Tensor:
    """Return the KL of all particles, with the gradient of that of some of them.

    Args:
        divergence: computes the KL of scores.
        rescore_some: scores some particles again, with gradients.
        scores: those of all particles.
    """
    with torch.no_grad():
        value = divergence(scores)
    if not torch.is_grad_enabled():
        return value
    some = rescore_some().kl()
    return value + some - some.detach()
