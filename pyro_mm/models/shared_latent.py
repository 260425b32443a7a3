"""The story with one latent behind all modalities."""

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
    r"""One latent behind all modalities, which are independent given it: the story of VAE, JMVAE, MVAE and MMVAE.

    .. math:: p(z, x_1, \dots, x_M) = p(z) \prod_{m=1}^M p(x_m | z)

    The sites are ``"z"`` and the modalities. A missing modality leaves the product.

    Args:
        prior: p(z), a distribution of event shape ``(D,)``, or a module ``batch -> distribution``.
        decoders: modality -> module mapping z ``(.., N, D)`` to the distribution p(x_m | z), of batch shape ``(.., N)``
            and the event shape of the modality.

    Raises:
        TypeError: a prior or a decoder of another kind.
        ValueError: no decoders, or a modality named like a latent or a plate: ``"z"``, ``"data"``, ``"modalities"``.

    Example:
        >>> import torch, pyro_mm as mm, pyro.distributions as dist
        >>> image = mm.conditionals.Bernoulli(mm.nn.MLP(4, 64), event_shape=(8, 8))
        >>> label = mm.conditionals.Categorical(mm.nn.MLP(4, 10))
        >>> prior = dist.Normal(torch.zeros(4), 1.0).to_event(1)
        >>> model = mm.models.SharedLatent(prior, {"image": image, "label": label})
        >>> batch = mm.Batch({"image": torch.zeros(3, 8, 8), "label": torch.tensor([0, 7, 2])})
        >>> rows, latents = mm.simulate(model, batch)
        >>> rows["image"].shape, rows["label"].shape, latents["z"].shape
        (torch.Size([3, 8, 8]), torch.Size([3]), torch.Size([3, 4]))

    References:
        Suzuki et al. 2016 (JMVAE, arXiv:1611.01891); Wu & Goodman 2018 (MVAE, arXiv:1802.05335).
    """

    def __init__(self, prior: dist.Distribution | nn.Module, decoders: Mapping[str, nn.Module]):
        super().__init__()
        self.prior = as_module("prior", prior)
        self.decoders = nn.ModuleDict(check_decoders(decoders, "z"))

    def forward(self, batch: Batch) -> None:
        """Run the story on a batch: sample the latent sites, observe the modalities."""
        register(self)
        names = list(self.decoders)
        with batch.plate():
            z = sample_latent("z", self.prior, batch)
            for m in pyro.plate("modalities", len(names), device="cpu"):
                batch.observe(names[m], self.decoders[names[m]], z)
