"""Guides: posteriors sampled under the data plate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import nn

from .batch import Batch
from .registration import register


class Guide(nn.Module):
    r"""Samples every site from its posterior, ``q(z | x_S) \prod_m q(w_m | x_m)``, each independent of the others.

    Args:
        posteriors: site name -> posterior: a module (or any callable) ``batch -> distribution``, such as those of
            :mod:`pyro_mm.posteriors`.

    Example::

        guide = Guide(z=ProductOfExperts({"image": ..., "label": ...}), w_image=Private("image", ...))

    A site drawn given another one is a guide written as a function: ``pyro.sample`` under ``batch.plate()``.
    """

    def __init__(self, **posteriors: Callable[[Batch], Any]):
        super().__init__()
        if not posteriors:
            raise ValueError("expected at least one posterior, as in Guide(z=...)")
        self.posteriors = nn.ModuleDict({n: p for n, p in posteriors.items() if isinstance(p, nn.Module)})
        self._callables = {n: p for n, p in posteriors.items() if not isinstance(p, nn.Module)}
        self._sites = tuple(posteriors)

    def forward(self, batch: Batch) -> None:
        register(self)
        with batch.plate():
            for site in self._sites:
                posterior = self.posteriors[site] if site in self.posteriors else self._callables[site]
                pyro.sample(site, posterior(batch))


def encode(guide: Callable[[Batch], Any], batch: Batch) -> dict[str, dist.Distribution]:
    """The guide's distributions given what is present: site -> distribution with batch shape ``(N,)``.

    Of a guide that draws a site given another one, the distribution given one draw of that.
    """
    with poutine.block(), poutine.trace() as trace:
        guide(batch)
    sites = {n: s for n, s in trace.trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}
    return {n: s["fn"] for n, s in sites.items() if not site_is_subsample(s)}
