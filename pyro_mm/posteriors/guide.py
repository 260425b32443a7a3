"""Guides: posteriors sampled under the data plate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import nn

from ..batch.batch import Batch
from ..batch.keywords import covariates_read_by
from ..handlers.params import register
from ..utils.arguments import check_attribute, check_function, describe


class Guide(nn.Module):
    r"""Samples every site from its posterior, in the order given: ``q(z | x_S) \prod_m q(w_m | x_m)``, for instance.

    Args:
        posteriors: site name -> posterior: a module (or any callable) ``batch -> distribution``, such as those of
            :mod:`pyro_mm.posteriors`.

    Example::

        guide = Guide(z=ProductOfExperts({"image": ..., "label": ...}), w_image=Private("image", ...))

    To the posteriors after it a site is one more modality, which every row has, so one that has an encoder for it
    depends on it: ``Guide(y=Label("label", ...), z=ProductOfExperts({"image": ..., "y": ...}))`` is
    ``q(y | x_S) q(z | x_S, y)``. What that cannot say is a guide written as a function: ``pyro.sample`` under
    ``batch.plate()``.
    """

    def __init__(self, **posteriors: Callable[[Batch], Any]):
        super().__init__()
        if not posteriors:
            raise ValueError("expected at least one posterior, as in Guide(z=...)")
        for site, posterior in posteriors.items():
            if isinstance(posterior, torch.distributions.Distribution):
                raise TypeError(
                    f"expected {site} to be a function of a batch, got a distribution: lambda batch: .. of it"
                )
            check_function(site, posterior)
            if isinstance(posterior, nn.Module):
                check_attribute("Guide", site)
        self.posteriors = nn.ModuleDict({n: p for n, p in posteriors.items() if isinstance(p, nn.Module)})
        self._callables = {n: p for n, p in posteriors.items() if not isinstance(p, nn.Module)}
        self._sites = tuple(posteriors)

    def forward(self, batch: Batch) -> None:
        register(self)
        with batch.plate():
            for site in self._sites:
                posterior = self.posteriors[site] if site in self.posteriors else self._callables[site]
                with covariates_read_by(f"the posterior of {site!r}", posterior):
                    distribution = posterior(batch)
                value = pyro.sample(site, _check_distribution(site, distribution))
                if site != self._sites[-1]:
                    batch = batch.with_latent(site, value)


def _check_distribution(site: str, d: Any) -> Any:
    if isinstance(d, torch.distributions.Distribution):
        return d
    raise TypeError(f"site {site!r}: expected a posterior that gives a distribution of a batch, got {describe(d)}")
