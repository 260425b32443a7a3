"""Guides: latent sites sampled from posteriors under the data plate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import nn

from ..batch.batch import Batch
from ..batch.keywords import covariates_read_by
from ..batch.masks import SURROGATE
from ..handlers.params import register
from ..utils.arguments import check_attribute, check_function, describe


class Guide(nn.Module):
    r"""Samples every latent site from its posterior, in the order given.

    .. math:: q(z, w | x_S) = q(z | x_S) \prod_m q(w_m | x_S), \text{ for instance}

    A posterior that has an encoder for an earlier site depends on it: to the posteriors after it a site is one more
    modality, which every row has. So ``Guide(y=Label("label", ..), z=ProductOfExperts({"image": .., "y": ..}))`` is
    q(y | x_S) q(z | x_S, y). A guide that cannot be written so is a function: ``pyro.sample`` under ``batch.plate()``.

    Args:
        posteriors: site -> posterior, a module or another callable ``batch -> distribution`` of batch shape ``(N,)``,
            such as those of :mod:`pyro_mm.posteriors`.

    Raises:
        TypeError: a posterior that is not a function of a batch; or, when called, that returns no distribution.
        ValueError: no posterior; or, when called, a site named like a modality.

    Example:
        >>> import torch, pyro_mm as mm
        >>> encoders = {"a": mm.conditionals.Normal(mm.nn.MLP(3, 4)), "b": mm.conditionals.Normal(mm.nn.MLP(2, 4))}
        >>> private = mm.posteriors.Private("a", mm.conditionals.Normal(mm.nn.MLP(3, 2)))
        >>> guide = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders), w_a=private)
        >>> batch = mm.Batch({"a": torch.zeros(5, 3), "b": torch.zeros(5, 2)})
        >>> {site: q.mean.shape for site, q in mm.encode(guide, batch).items()}
        {'z': torch.Size([5, 2]), 'w_a': torch.Size([5, 1])}
    """

    def __init__(self, **posteriors: Callable[[Batch], Any]):
        super().__init__()
        if not posteriors:
            raise ValueError("expected at least one posterior, as in Guide(z=...)")
        for site, posterior in posteriors.items():
            if isinstance(posterior, torch.distributions.Distribution):
                raise TypeError(
                    f"expected {site} to be a function of a batch, got a distribution: pass lambda batch: distribution"
                )
            check_function(site, posterior)
            if isinstance(posterior, nn.Module):
                check_attribute("Guide", site)
        self.posteriors = nn.ModuleDict({n: p for n, p in posteriors.items() if isinstance(p, nn.Module)})
        self._callables = {n: p for n, p in posteriors.items() if not isinstance(p, nn.Module)}
        self._sites = tuple(posteriors)

    def forward(self, batch: Batch) -> None:
        """Run the guide on a batch: sample every site under the data plate."""
        register(self)
        with batch.plate():
            for site in self._sites:
                posterior = self.posteriors[site] if site in self.posteriors else self._callables[site]
                with covariates_read_by(f"the posterior of {site!r}", posterior):
                    distribution = posterior(batch)
                infer = {SURROGATE: True} if getattr(posterior, "surrogate", False) else {}
                value = pyro.sample(site, _check_distribution(site, distribution), infer=infer)
                if site != self._sites[-1]:
                    batch = batch.with_latent(site, value)


def _check_distribution(site: str, d: Any) -> Any:
    """Return the distribution of a posterior. Raises a TypeError for anything else."""
    if isinstance(d, torch.distributions.Distribution):
        return d
    raise TypeError(f"site {site!r}: expected a posterior that gives a distribution of a batch, got {describe(d)}")
