"""Priors that are learned, or that depend on a covariate: modules whose ``forward(batch)`` is a distribution."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn

from .batch import Batch
from .distributions import Mixture

__all__ = ["GivenCovariate", "MixturePrior"]


class MixturePrior(nn.Module):
    r"""A learned mixture of diagonal Gaussians.

    .. math:: p(z) = \sum_{c=1}^K \pi_c N(z; \mu_c, \mathrm{diag}(\sigma_c^2))

    with :math:`\log\pi`, :math:`\mu` and :math:`\log\sigma` as parameters. At first the weights are equal, the scales 1
    and the centres drawn from N(0, 1), so that the components are told apart.

    Args:
        components: K.
        latent: the dimensions of z.

    Dilokthanakul et al. 2016 (arXiv:1611.02648); Hirt et al. 2024 (arXiv:2309.00380).
    """

    def __init__(self, components: int, latent: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent))
        self.log_scale = nn.Parameter(torch.zeros(components, latent))

    def forward(self, batch: Batch) -> dist.Distribution:
        components = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)
        return Mixture(components, self.logits.log_softmax(-1))


class GivenCovariate(nn.Module):
    r"""The prior of an identifiable story, p(z | u): what makes z known up to permutation and scaling.

    Args:
        name: the covariate u of the batch, ``(N, *event)``.
        conditional: module mapping it to a distribution of batch shape ``(N,)``, such as
            ``conditionals.Normal(nn.Embedding(classes, 2 * D))`` for an auxiliary label.

    Khemakhem et al. 2020 (iVAE, arXiv:1907.04809); Hirt et al. 2024 (arXiv:2309.00380).

    Raises:
        ValueError: the batch has no such covariate.
    """

    def __init__(self, name: str, conditional: nn.Module):
        super().__init__()
        self.name, self.conditional = name, conditional

    def forward(self, batch: Batch) -> dist.Distribution:
        if self.name not in batch.covariates:
            raise ValueError(f"the prior is given the covariate {self.name!r}; this batch has {list(batch.covariates)}")
        return self.conditional(batch.covariates[self.name])
