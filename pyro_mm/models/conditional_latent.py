"""The story of a conditional VAE."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
from torch import nn

from ..batch.batch import Batch
from ..batch.keywords import covariates_read_by
from ..conditionals.unconditional import as_module
from ..handlers.params import register
from ..utils.arguments import check_function, check_mapping, check_name, describe
from .decoders import check_decoders
from .latents import sample_latent


class ConditionalLatent(nn.Module):
    r"""A latent and one modality y, independent a priori, behind the other modalities: the story of a conditional VAE.

    .. math:: p(y, z, x) = p(y) \, p(z) \prod_{m=1}^M p(x_m | z, y)

    The sites are ``"z"`` and the modalities. log p(x | y) is ``log_conditional(target=x, given=y)``, whatever p(y) is.
    Without an x, p(z | y) = p(z), which the guide states by :class:`pyro_mm.posteriors.Given`.

    A missing y is drawn from p(y): the estimate of p(x) is unbiased, but has a large variance. ``generate`` also draws
    y from p(y), and not from p(y | x): for that make the class a latent (:class:`pyro_mm.models.Labelled`).

    Args:
        prior: p(z), a distribution of event shape ``(D,)``, or a module ``batch -> distribution``.
        condition: the name of the modality y, and p(y), likewise; ``("label", Categorical)``, for instance.
        features: module mapping the values of y to features ``(.., N, F)`` for the decoders: an embedding of classes.
        decoders: modality -> module mapping z ``(.., N, D)`` and the features of y to the distribution p(x_m | z, y).

    Raises:
        TypeError: a condition that is not a pair, or a prior or module of another kind.
        ValueError: y is among the decoders, there are none, or a modality is named like a latent or a plate.

    Example:
        >>> import torch, pyro_mm as mm, pyro.distributions as dist
        >>> prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> label = dist.Categorical(logits=torch.zeros(10))
        >>> image = mm.conditionals.Normal(mm.nn.MLP(2 + 3, 10), scale=1.0)
        >>> model = mm.models.ConditionalLatent(prior, ("label", label), torch.nn.Embedding(10, 3), {"image": image})
        >>> rows, latents = mm.simulate(model, mm.Batch({"image": torch.zeros(4, 10), "label": torch.zeros(4).long()}))
        >>> rows["image"].shape, rows["label"].shape
        (torch.Size([4, 10]), torch.Size([4]))

    References:
        Sohn et al. 2015 (NIPS, Learning Structured Output Representation using Deep Conditional Generative Models),
        with p(z) in place of p(z | y), a relaxation that they name.
    """

    def __init__(
        self,
        prior: dist.Distribution | nn.Module,
        condition: tuple[str, dist.Distribution | nn.Module],
        features: nn.Module,
        decoders: Mapping[str, nn.Module],
    ):
        super().__init__()
        if not isinstance(condition, tuple) or len(condition) != 2:
            raise TypeError(
                f"expected condition to be a modality's name and its distribution, got {describe(condition)}"
            )
        self.name = check_name("condition", condition[0])
        root = condition[1]
        if self.name in check_mapping("decoders", decoders, "modules"):
            raise ValueError(f"{self.name!r} is what the others are given, and cannot be among the decoders")
        self.prior = as_module("prior", prior)
        self.root = as_module("condition", root)
        self.features = check_function("features", features, ("values",))
        self.decoders = nn.ModuleDict(check_decoders(decoders, "z"))

    def forward(self, batch: Batch) -> None:
        """Run the story on a batch: sample the latent sites, observe the modalities."""
        register(self)
        names = list(self.decoders)
        with batch.plate():
            with covariates_read_by(f"the distribution of {self.name!r}", self.root):
                root = self.root(batch)
            y = batch.observe(self.name, root)
            features = batch.features(self.name, self.features, y)
            z = sample_latent("z", self.prior, batch)
            for m in pyro.plate("modalities", len(names), device="cpu"):
                batch.observe(names[m], self.decoders[names[m]], z, features)
