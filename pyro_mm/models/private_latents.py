"""A shared latent, and one that each modality has to itself."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
from torch import nn

from ..batch.batch import Batch
from ..conditionals.unconditional import as_module
from ..handlers.params import register
from ..utils.arguments import check_mapping
from .decoders import check_decoders
from .latents import sample_latent


class PrivateLatents(nn.Module):
    r"""The story of DMVAE and MMVAE+: what modalities share apart from what is their own.

    .. math:: z_n \sim p(z), \qquad w_{nm} \sim p(w_m), \qquad x_{nm} \sim p(x_m | z_n, w_{nm})

    Args:
        prior: p(z), a distribution, or a module ``batch -> distribution``.
        private_priors: modality -> p(w_m), likewise; a modality not named has no private latent.
        decoders: modality -> module giving p(x_m | z, w_m), called with z and, if there is one, w_m.

    The sites are ``"z"`` and ``"w_<modality>"``. Lee & Pavlovic 2021 (DMVAE); Palumbo et al. 2023 (MMVAE+, ICLR).
    """

    def __init__(
        self,
        prior: dist.Distribution | nn.Module,
        private_priors: Mapping[str, dist.Distribution | nn.Module],
        decoders: Mapping[str, nn.Module],
    ):
        super().__init__()
        own = check_mapping("private_priors", private_priors, "distributions or modules")
        taken = ("z", *(f"w_{name}" for name in own))
        self.decoders = nn.ModuleDict(check_decoders(decoders, *taken))
        for name in own:
            if name not in decoders:
                raise ValueError(f"private latent of {name!r}, which is not among the decoders {list(decoders)}")
        self.prior = as_module("prior", prior)
        priors = {name: as_module(f"private_priors[{name!r}]", prior) for name, prior in own.items()}
        self.private_priors = nn.ModuleDict(priors)

    def forward(self, batch: Batch) -> None:
        register(self)
        names = list(self.decoders)
        with batch.plate():
            z = sample_latent("z", self.prior, batch)
            for m in pyro.plate("modalities", len(names)):
                name, own = names[m], []
                if name in self.private_priors:
                    own = [sample_latent(f"w_{name}", self.private_priors[name], batch)]
                batch.observe(name, self.decoders[name], z, *own)
