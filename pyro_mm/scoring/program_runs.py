"""Runs of a pair's guide, and of its model at the guide's draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .reduction import LazyMapping, SiteReducer
from .structure import PairStructure, in_data_plate, latent_sites
from .term_pair import TermPair, check_prior_gradient


def propose(pair: TermPair, structure: PairStructure, draw: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Run the pair's guide, and leave its trace and log q in the pair.

    Each pathwise value becomes a node of the autograd graph of its own.

    Args:
        pair: the pair.
        structure: its structure.
        draw: may give the messages of latent sites other values; None draws as the guide does.
    """
    pair.draw = draw
    with ExitStack() as stack:
        if structure.enumerates:
            stack.enter_context(poutine.enum(first_available_dim=pair.enum_dim))
        pair.guide()
    pair.draw = None  # so that a second run of the guide draws as it does
    if pair.prior and torch.is_grad_enabled():
        check_prior_gradient(pair.prior)
    trace = pair.trace.copy()
    pair.drawn = latent_sites(pair.trace)
    for name, site in pair.drawn.items():
        if site["value"].requires_grad:
            # a node that only the scores hang on: its gradient is theirs, not that of sites sampled after it
            trace.nodes[name] = site | {"value": site["value"].view_as(site["value"])}
    pair.trace = trace
    shape = SiteReducer(pair)

    def log_prob(site: dict[str, Any]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not pair.views.freeze_encoder):
            return shape.log_prob(site)

    pair.log_q = LazyMapping({name: partial(log_prob, site) for name, site in pair.row_latents().items()})


def run_model(pair: TermPair, structure: PairStructure) -> Any:
    """Run the pair's model against ``pair.trace``, with its discrete sites enumerated, and return its trace."""
    free_dim = min([pair.enum_dim + 1, *enumerated_dims(latent_sites(pair.trace)).values()]) - 1
    with ExitStack() as stack:
        traced = stack.enter_context(poutine.trace())
        if structure.enumerates:
            stack.enter_context(poutine.enum(first_available_dim=free_dim))
        stack.enter_context(poutine.replay(trace=pair.trace))
        pair.model()
    return traced.trace


def enumerated_dims(sites: Mapping[str, Any]) -> dict[str, int]:
    """Return the batch dimension, negative, of each enumerated site."""
    return {name: site["infer"]["_enumerate_dim"] for name, site in sites.items() if "_enumerate_dim" in site["infer"]}


def check_given(pair: TermPair, model_trace: Any) -> None:
    """Raise a ValueError if a latent that is given lies in the plate of the rows in the model."""
    for name, site in latent_sites(model_trace).items():
        if name in (pair.views.given_latents or ()) and in_data_plate(site):
            raise ValueError(
                f"site {name!r} lies in the plate 'data' in the model and outside it in the guide: a latent is of each "
                "row in both, or of none in both"
            )
