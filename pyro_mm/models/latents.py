"""Latent sites of the stories."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.keywords import covariates_read_by


def sample_latent(site: str, prior: nn.Module, batch: Batch) -> Tensor:
    """Sample a latent site from its prior.

    Args:
        site: the name of the site.
        prior: module ``batch -> distribution`` of event shape ``(D,)``.
        batch: the rows.

    Returns:
        ``(.., N, D)``.

    Raises:
        MissingCovariate: the prior reads a covariate that the batch does not have. The message names site and module.
    """
    with covariates_read_by(f"the prior of {site!r}", prior):
        distribution = prior(batch)
    value: Tensor = pyro.sample(site, distribution)
    return value
