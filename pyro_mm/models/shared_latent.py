"""One latent behind all modalities."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
from torch import nn

from ..batch.batch import Batch
from ..conditionals.unconditional import as_module
from ..handlers.params import register
from .decoders import check_decoders
from .latents import sample_latent


class SharedLatent(nn.Module):
    r"""The story of VAE, JMVAE, MVAE, MMVAE and their kin.

    .. math:: z_n \sim p(z), \qquad x_{nm} \sim p(x_m | z_n) \quad (m = 1..M)

    Args:
        prior: p(z), a distribution, or a module ``batch -> distribution``.
        decoders: modality -> module giving the distribution p(x_m | z).

    Suzuki et al. 2016 (arXiv:1611.01891); Wu & Goodman 2018 (arXiv:1802.05335).
    """

    def __init__(self, prior: dist.Distribution | nn.Module, decoders: Mapping[str, nn.Module]):
        super().__init__()
        self.prior = as_module("prior", prior)
        self.decoders = nn.ModuleDict(check_decoders(decoders, "z"))

    def forward(self, batch: Batch) -> None:
        register(self)
        names = list(self.decoders)
        with batch.plate():
            z = sample_latent("z", self.prior, batch)
            for m in pyro.plate("modalities", len(names)):
                batch.observe(names[m], self.decoders[names[m]], z)
