"""Particles from a guide: stratified, antithetic or quasi-random, with a share of the prior."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..batch.masks import over_events
from ..distributions.mixture import Mixture
from ..distributions.quantiles import component_at as component_of
from ..distributions.quantiles import has_mixture, quantile
from ..scoring.importance import propose
from ..scoring.reduction import SiteReducer
from ..scoring.scores import Scores
from ..scoring.structure import PairStructure, latent_sites
from ..scoring.term_pair import TermPair
from ..utils.seeding import part_seed
from .proposals import Proposal
from .streams import REPLICATES, Antithetic, QuasiRandom, Systematic

FIRST_STREAM = 2**32  # the parts of a seed that streams of noise are, after any number of blocks of draws


class GuideSampler:
    """K draws of every row of a batch from a proposal, block by block.

    ``group`` is the number of successive draws that depend on each other.
    """

    def __init__(self, proposal: Proposal, info: PairStructure, pair: TermPair, num_particles: int, seed: int):
        self.proposal, self.info = proposal, info
        if proposal.prior_share and "enumerated" in info.latents.values():
            raise ValueError("prior_share needs a guide without enumerated sites: let the model alone have them")
        with torch.no_grad(), poutine.block():
            pair.guide()
        rows, device = pair.views.encode.size, pair.views.encode.device
        sites, shape = latent_sites(pair.trace), SiteReducer(pair, unscaled=True)
        for site in sites.values():
            shape.scale(site)  # which refuses a site outside the plate "data"
        mixed = [name for name, site in sites.items() if has_mixture(site["fn"])]
        self.stratified = next((n for n in mixed if isinstance(sites[n]["fn"], Mixture)), None)
        if sites and self.stratified is not None and _plate_size(sites[self.stratified]["fn"], pair) > 1:
            self.stratified = None  # a plate within a row has several choices, which must not go in step
        strata = 1
        if proposal.stratify:
            strata = sites[self.stratified]["fn"].num_components if self.stratified is not None else 1
            if 0 < proposal.prior_share < 1:
                strata = max(strata, math.ceil(1 / proposal.prior_share))
            strata = max(1, min(strata, num_particles // REPLICATES))  # as the error needs many groups
        self.widths = {
            n: _plate_size(s["fn"], pair) * (math.prod(s["fn"].event_shape) + (n in mixed)) for n, s in sites.items()
        }
        repeat, dimensions = 1, sum(self.widths.values())
        self.noise: Antithetic | QuasiRandom | None = None
        if proposal.draws == "antithetic":
            repeat, self.noise = 2, Antithetic(rows, dimensions, part_seed(seed, FIRST_STREAM), device)
        self.group = strata * repeat
        if proposal.draws == "quasi":
            self.group = max(1, -(-num_particles // REPLICATES))
            self.noise = QuasiRandom(rows, dimensions + 1, self.group, part_seed(seed, FIRST_STREAM), device)
        uses = proposal.prior_share or (proposal.stratify and self.stratified is not None)
        of_strata = part_seed(seed, FIRST_STREAM + 1)
        self.strata = Systematic(num_particles, rows, strata, repeat, of_strata, device) if uses else None

    def propose(self, pair: TermPair) -> None:
        """Draws the next block, as many particles as the pair has, and leaves trace and log q in the pair."""
        k, share = pair.num_particles, self.proposal.prior_share
        u = None if self.noise is None else self.noise.take(k)
        choice = None if self.strata is None else self.strata.take(k)
        if u is not None and self.proposal.draws == "quasi":
            choice, u = u[..., 0] if choice is not None else None, u[..., 1:]
        prior = choice < share if share and choice is not None else None
        if choice is not None and share < 1:
            choice = ((choice - share) / (1 - share)).clamp(min=0)
        offset = 0

        def draw(msg: dict[str, Any]) -> None:
            nonlocal offset
            name, fn = msg["name"], msg["fn"]
            own = choice if name == self.stratified and self.proposal.stratify and share < 1 else None
            if u is None:
                if own is not None:
                    index = component_of(fn, _broadcastable(own, fn.batch_shape, pair))
                    msg["value"], msg["done"] = fn.component_sample(index), True
                return
            part = u[..., offset : offset + self.widths[name]]
            offset += self.widths[name]
            msg["value"], msg["done"] = _draw_from_uniforms(name, fn, part, own, pair), True

        propose(pair, self.info, draw)
        if prior is not None:
            self._mix(pair, prior)

    def log_weights(self, scores: Scores) -> Tensor:
        """The log-weights ``(K, N)``: log p(x, z) less the log-density of the whole proposal."""
        share = self.proposal.prior_share
        log_q = scores.log_proposal
        if share == 1:
            log_q = scores.log_prior
        elif share:
            log_q = torch.logaddexp(math.log1p(-share) + log_q, math.log(share) + scores.log_prior)
        return (sum(scores.likelihood.values(), scores.log_prior) - log_q)[:, 0]

    def _mix(self, pair: TermPair, prior: Tensor) -> None:
        """Puts draws from the model's prior where ``prior`` holds, and scores all of them under the guide."""
        drawn, trace = pair.draw_prior(), pair.trace.copy()
        for name, site in latent_sites(trace).items():
            if name not in drawn:
                raise ValueError(f"prior_share needs latents that the model has, and {name!r} is in the guide only")
            shape, event_dim = site["fn"].batch_shape, site["fn"].event_dim
            mask = over_events(_broadcastable(prior, shape, pair), event_dim)
            trace.nodes[name] = site | {"value": torch.where(mask, drawn[name]["value"], site["value"])}
        pair.trace = trace
        with poutine.replay(trace=trace):
            pair.guide()
        shape = SiteReducer(pair)
        pair.log_q = {name: shape.log_prob(site) for name, site in latent_sites(pair.trace).items()}


def _plate_size(fn: Any, pair: TermPair) -> int:
    """The size of the plates within a row at a site."""
    return math.prod(fn.batch_shape[pair.plated : -1])


def _broadcastable(x: Tensor, batch_shape: torch.Size, pair: TermPair) -> Tensor:
    """``(k, N)`` to broadcast with a site's batch shape: particles leftmost, rows last, plates in between."""
    return x.reshape(x.shape[0], *[1] * (len(batch_shape) - 2), x.shape[1]) if pair.plated else x[0]


def _draw_from_uniforms(name: str, fn: Any, u: Tensor, own: Tensor | None, pair: TermPair) -> Tensor:
    """The draw of a site from its uniforms ``(k, N, D)``; the last of them choose components, unless ``own`` does."""
    like, batch, event = fn.sample(), fn.batch_shape, fn.event_shape
    inner, numel = batch[pair.plated : -1], event.numel()
    u = u.reshape(*u.shape[:2], *inner, -1).movedim(1, 1 + len(inner))
    choice = u[..., -1] if own is None else own
    try:
        value = quantile(fn, u[..., :numel].reshape(batch + event), choice.reshape(batch))
    except NotImplementedError as error:
        raise ValueError(f"site {name!r} cannot be drawn from uniforms, so take draws='independent': {error}") from None
    return value.to(like.dtype).expand(like.shape)
