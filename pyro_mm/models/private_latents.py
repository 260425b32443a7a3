"""The story with a shared latent, and a private one for each modality."""

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
    r"""A shared latent, and a private one for each modality: the story of DMVAE and MMVAE+.

    .. math:: p(z, w, x) = p(z) \prod_{m=1}^M p(w_m) \, p(x_m | z, w_m)

    The sites are ``"z"``, ``"w_<modality>"`` and the modalities. A missing modality leaves the product with its w_m.

    Args:
        prior: p(z), a distribution of event shape ``(D,)``, or a module ``batch -> distribution``.
        private_priors: modality -> p(w_m), likewise, of event shape ``(D_m,)``. A modality that is not named has no
            private latent.
        decoders: modality -> module mapping z ``(.., N, D)`` and, if there is one, w_m ``(.., N, D_m)`` to the
            distribution p(x_m | z, w_m). Conditionals concatenate the two.

    Raises:
        TypeError: a prior or a decoder of another kind.
        ValueError: a private prior without a decoder, no decoders, or a modality named like a latent or a plate.

    Example:
        >>> import torch, pyro_mm as mm, pyro.distributions as dist
        >>> shared, private = (dist.Normal(torch.zeros(size), 1.0).to_event(1) for size in (4, 2))
        >>> decoders = {
        ...     "image": mm.conditionals.Normal(mm.nn.MLP(4 + 2, 10), scale=1.0),
        ...     "label": mm.conditionals.Categorical(mm.nn.MLP(4, 10)),
        ... }
        >>> model = mm.models.PrivateLatents(shared, {"image": private}, decoders)
        >>> rows, latents = mm.simulate(model, mm.Batch({"image": torch.zeros(3, 10), "label": torch.zeros(3).long()}))
        >>> latents["z"].shape, latents["w_image"].shape
        (torch.Size([3, 4]), torch.Size([3, 2]))

    References:
        Lee & Pavlovic 2021 (DMVAE, arXiv:2012.13024); Palumbo et al. 2023 (MMVAE+, ICLR).
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
        """Run the story on a batch: sample the latent sites, observe the modalities."""
        register(self)
        names = list(self.decoders)
        with batch.plate():
            z = sample_latent("z", self.prior, batch)
            for m in pyro.plate("modalities", len(names), device="cpu"):
                name = names[m]
                parents = [z]
                if name in self.private_priors:
                    parents.append(sample_latent(f"w_{name}", self.private_priors[name], batch))
                batch.observe(name, self.decoders[name], *parents)
