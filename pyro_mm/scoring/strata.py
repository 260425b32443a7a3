"""Draws from each component of a guide's mixture in turn."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..distributions.mixture import draw_from_stratum
from .reduction import SiteReducer
from .structure import PairStructure
from .term_pair import TermPair
from .views import TermViews


class Strata:
    """Draws from each component of a guide's mixture in turn, and their log-weights."""

    def __init__(self, structure: PairStructure, views: TermViews, num_particles: int):
        if structure.strata is None:
            raise ValueError("stratified draws need a mixture posterior, and the guide has none")
        self.site = structure.strata.site
        self.components = structure.strata.components
        self.each = num_particles
        self.particles = num_particles * self.components
        self.device = views.encode.device
        self.log_weight: Tensor | None = None

    def draw(self, pair: TermPair, msg: dict[str, Any]) -> None:
        """Set the value of the mixture's site in its message; leave the messages of other sites alone."""
        if msg["name"] != self.site:
            return
        fn = msg["fn"]
        index = torch.arange(self.particles, device=self.device) // self.each
        index = index.reshape(-1, *[1] * (-pair.particle_dim - 1)) if pair.plated else index
        msg["value"], self.log_weight = draw_from_stratum(fn, index.expand(fn.batch_shape), self.components)
        msg["done"] = True

    def log_weights(self, pair: TermPair) -> Tensor:
        """The log-weight of each particle's stratum, ``(K, T, N)``."""
        shape = SiteReducer(pair)
        alike = -math.log(self.components)
        if self.log_weight is None:
            raise ValueError(
                f"stratified draws need the guide's mixture {self.site!r}, and it did not sample that site"
            )
        if self.log_weight.dim() >= -pair.enum_dim:
            raise ValueError(
                f"the mixture {self.site!r} is given an enumerated site, with which its weights would be summed out: "
                "use stratified=None, or sample the mixture first"
            )
        of_prior = pair.views.encode_prior
        if of_prior is False:
            return shape.full(self.log_weight)
        if of_prior is True:
            return shape.full(torch.full_like(self.log_weight, alike))
        return shape.full(torch.where(of_prior, alike, self.log_weight))
