"""Particles from a guide: stratified, antithetic or quasi-random, with a share of the prior."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pyro import poutine
from torch import Tensor

from ..batch.masks import add_event_dims
from ..distributions.mixture import Mixture
from ..distributions.quantiles import component_at as component_of
from ..distributions.quantiles import has_mixture, quantile
from ..scoring.program_runs import propose
from ..scoring.reduction import SiteReducer
from ..scoring.scores import Scores
from ..scoring.term_pair import TermPair
from ..utils.seeding import part_seed
from .particle_sampler import ParticleSampler, RowBlock
from .streams import REPLICATES, Antithetic, QuasiRandom, Systematic

DrawMethod = Literal["independent", "antithetic", "quasi"]
DRAW_METHODS = ("independent", "antithetic", "quasi")
FIRST_STREAM = 2**32  # parts of a seed from here on are streams of uniforms; those below are blocks of particles

Sites = Mapping[str, dict[str, Any]]


class GuideSampler(ParticleSampler):
    r"""Particles from :math:`(1 - s) q(z | x_S) + s p(z)`.

    Uniforms come from streams with generators of their own, row by row and particle by particle, so that a sample does
    not depend on the blocks that it is taken in. One stream makes the draws (antithetic or quasi-random), another
    chooses between prior and guide and among the components of a mixture.

    Args:
        rows: the rows, the pair and the number of particles K.
        draws: the way to draw from the guide.
        stratify: True to draw from components, and from the prior, in their exact proportions.
        prior_share: s.

    Raises:
        ValueError: a share of the prior beside sites that the guide enumerates, a site that is scaled or outside the
            plate ``"data"``, or more than 21,201 quasi-random dimensions.
    """

    def __init__(self, rows: RowBlock, draws: DrawMethod, stratify: bool, prior_share: float):
        if prior_share and "enumerated" in rows.structure.latents.values():
            raise ValueError("prior_share needs a guide without enumerated sites: let the model alone have them")
        self.structure = rows.structure
        self.draws, self.stratify, self.prior_share = draws, stratify, prior_share
        self.needs_prior_density = prior_share > 0

        pair = rows.pair()
        with torch.no_grad(), poutine.block():
            pair.guide()
        sites = pair.row_latents()
        reducer = SiteReducer(pair, unscaled=True)
        for site in sites.values():
            reducer.scale(site)  # raises for a site that is scaled or outside the plate "data"

        mixtures = {name for name, site in sites.items() if has_mixture(site["fn"])}
        self.mixture_site = _stratifiable_mixture(sites, pair)
        self.uniforms_per_site = {
            name: _plate_size(site["fn"], pair) * (math.prod(site["fn"].event_shape) + (name in mixtures))
            for name, site in sites.items()
        }
        self._make_streams(rows, self._num_strata(sites, rows.num_particles))

    def _num_strata(self, sites: Sites, num_particles: int) -> int:
        """Return the number of strata that a group of particles covers, at most K / 20: errors need many groups."""
        if not self.stratify:
            return 1
        strata = 1 if self.mixture_site is None else sites[self.mixture_site]["fn"].num_components
        if 0 < self.prior_share < 1:
            strata = max(strata, math.ceil(1 / self.prior_share))
        return max(1, min(strata, num_particles // REPLICATES))

    def _make_streams(self, rows: RowBlock, strata: int) -> None:
        """Make the streams of uniforms, and find the size of the groups of particles that share them."""
        dimensions = sum(self.uniforms_per_site.values())
        seed = part_seed(rows.seed, FIRST_STREAM)
        repeat = 1
        self.group_size = strata
        self.uniforms: Antithetic | QuasiRandom | None = None
        if self.draws == "antithetic":
            repeat = 2
            self.group_size = 2 * strata
            self.uniforms = Antithetic(rows.size, dimensions, seed, rows.device)
        elif self.draws == "quasi":
            self.group_size = max(1, -(-rows.num_particles // REPLICATES))
            self.uniforms = QuasiRandom(rows.size, dimensions + 1, self.group_size, seed, rows.device)

        self.choices: Systematic | None = None
        if self.prior_share or (self.stratify and self.mixture_site is not None):
            choice_seed = part_seed(rows.seed, FIRST_STREAM + 1)
            self.choices = Systematic(rows.num_particles, rows.size, strata, repeat, choice_seed, rows.device)

    def draw(self, pair: TermPair) -> None:
        uniforms = None if self.uniforms is None else self.uniforms.take(pair.num_particles)
        choice = None if self.choices is None else self.choices.take(pair.num_particles)
        if uniforms is not None and self.draws == "quasi":
            # the first coordinate of the points chooses, in the place of the systematic sample
            choice = None if choice is None else uniforms[..., 0]
            uniforms = uniforms[..., 1:]

        share = self.prior_share
        from_prior = choice < share if share and choice is not None else None
        if choice is not None and share < 1:
            choice = ((choice - share) / (1 - share)).clamp(min=0)  # uniform again, where the guide is drawn from

        self._draw_guide(pair, uniforms, choice if self.stratify and share < 1 else None)
        if from_prior is not None:
            self._mix_with_prior(pair, from_prior)

    def skip(self, pair: TermPair) -> None:
        for stream in (self.uniforms, self.choices):
            if stream is not None:
                stream.take(pair.num_particles)

    def _draw_guide(self, pair: TermPair, uniforms: Tensor | None, choice: Tensor | None) -> None:
        """Run the guide.

        Args:
            pair: k particles of N rows.
            uniforms: ``(k, N, D)``, from which all sites are drawn; None for independent draws.
            choice: ``(k, N)``, by which the stratified mixture takes its component; None to leave it to chance.
        """
        used = 0

        def draw_site(msg: dict[str, Any]) -> None:
            nonlocal used
            name, fn = msg["name"], msg["fn"]
            if name not in self.uniforms_per_site:
                return  # a latent that all rows share
            component_choice = choice if name == self.mixture_site else None
            if uniforms is not None:
                width = self.uniforms_per_site[name]
                own = uniforms[..., used : used + width]
                used += width
                msg["value"] = _draw_from_uniforms(name, fn, own, component_choice, pair)
                msg["done"] = True
            elif component_choice is not None:
                index = component_of(fn, _broadcastable(component_choice, fn.batch_shape, pair))
                msg["value"] = fn.component_sample(index)
                msg["done"] = True

        propose(pair, self.structure, draw_site)

    def log_density(self, scores: Scores, rows: slice = slice(None)) -> Tensor:
        share = self.prior_share
        if share == 1:
            return scores.log_prior[:, 0]
        log_guide = scores.log_proposal[:, 0]
        if not share:
            return log_guide
        return torch.logaddexp(math.log1p(-share) + log_guide, math.log(share) + scores.log_prior[:, 0])

    def _mix_with_prior(self, pair: TermPair, from_prior: Tensor) -> None:
        """Replace particles by draws from the model's prior, and score all of them under the guide.

        Args:
            pair: k particles of N rows, drawn from the guide.
            from_prior: the particles to replace, boolean ``(k, N)``.
        """
        prior = pair.draw_prior(pair.given_values())
        trace = pair.trace.copy()
        for name, site in pair.row_latents().items():
            if name not in prior:
                raise ValueError(f"prior_share needs latents that the model has, and {name!r} is in the guide only")
            mask = add_event_dims(_broadcastable(from_prior, site["fn"].batch_shape, pair), site["fn"].event_dim)
            trace.nodes[name] = site | {"value": torch.where(mask, prior[name]["value"], site["value"])}
        pair.trace = trace

        with poutine.replay(trace=trace):
            pair.guide()
        reducer = SiteReducer(pair)
        pair.log_q = {name: reducer.log_prob(site) for name, site in pair.row_latents().items()}


def _stratifiable_mixture(sites: Sites, pair: TermPair) -> str | None:
    """Return the first site that is a mixture, unless a plate within a row makes several choices at it."""
    first = next((name for name, site in sites.items() if isinstance(site["fn"], Mixture)), None)
    if first is None or _plate_size(sites[first]["fn"], pair) > 1:
        return None  # the choices of one row would go in step
    return first


def _plate_size(fn: Any, pair: TermPair) -> int:
    """Return the size of the plates within a row at a site."""
    return math.prod(fn.batch_shape[pair.plated : -1])


def _broadcastable(x: Tensor, batch_shape: torch.Size, pair: TermPair) -> Tensor:
    """Reshape ``(k, N)`` to broadcast with a site's batch shape: particles leftmost, rows last, plates between."""
    return x.reshape(x.shape[0], *[1] * (len(batch_shape) - 2), x.shape[1]) if pair.plated else x[0]


def _draw_from_uniforms(name: str, fn: Any, u: Tensor, component_choice: Tensor | None, pair: TermPair) -> Tensor:
    """Return the draw of a site that its uniforms give.

    Args:
        name: of the site, for an error.
        fn: its distribution.
        u: uniforms ``(k, N, D)``; in a mixture the last one chooses the component.
        component_choice: uniforms ``(k, N)`` that choose it instead.
        pair: the pair of the site.

    Raises:
        ValueError: a distribution without an inverse distribution function.
    """
    like = fn.sample()
    batch = fn.batch_shape
    event = fn.event_shape
    plates = batch[pair.plated : -1]
    u = u.reshape(*u.shape[:2], *plates, -1).movedim(1, 1 + len(plates))
    choice = u[..., -1] if component_choice is None else component_choice
    try:
        value = quantile(fn, u[..., : event.numel()].reshape(batch + event), choice.reshape(batch))
    except NotImplementedError as error:
        raise ValueError(f"site {name!r} cannot be drawn from uniforms, so take draws='independent': {error}") from None
    return value.to(like.dtype).expand(like.shape)
