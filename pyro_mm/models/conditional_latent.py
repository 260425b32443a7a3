"""A modality that is known before the latent, and the others given both."""

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
    r"""The story of a conditional VAE, made a joint one by a distribution of what it is conditioned on.

    .. math:: y_n \sim p(y), \qquad z_n \sim p(z), \qquad x_{nm} \sim p(x_m | z_n, y_n)

    So log p(x | y) is ``log_conditional(target=x, given=y)``, whatever p(y). z and y are independent until an x is
    seen: p(z | y) = p(z), which :class:`pyro_mm.posteriors.Given` says.

    Args:
        prior: p(z), a distribution, or a module ``batch -> distribution``.
        condition: the modality y and p(y), likewise; ``("label", Categorical)``, fixed or learned. Where y is missing
            it is drawn from p(y), by which p(x) is estimated without bias and with much variance; and so is a y that
            is generated, whatever x: for p(y | x) make the class a latent (:class:`pyro_mm.models.Labelled`).
        features: module giving from y what the decoders see of it, ``(.., F)``: an embedding of classes.
        decoders: modality -> module giving p(x_m | z, y), called with z and the features of y.

    Raises:
        ValueError: y is among what is decoded.

    Sohn et al. 2015 (NIPS, Learning Structured Output Representation using Deep Conditional Generative Models), with
    p(z) in the place of p(z | y), which they name as a relaxation.
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
        self.name, root = check_name("condition", condition[0]), condition[1]
        if self.name in check_mapping("decoders", decoders, "modules"):
            raise ValueError(f"{self.name!r} is what the others are given, and cannot be among the decoders")
        self.prior = as_module("prior", prior)
        self.root = as_module("condition", root)
        self.features = check_function("features", features, ("values",))
        self.decoders = nn.ModuleDict(check_decoders(decoders, "z"))

    def forward(self, batch: Batch) -> None:
        register(self)
        names = list(self.decoders)
        with batch.plate():
            with covariates_read_by(f"the distribution of {self.name!r}", self.root):
                root = self.root(batch)
            y = batch.observe(self.name, root)
            seen = batch.features(self.name, self.features, y)
            z = sample_latent("z", self.prior, batch)
            for m in pyro.plate("modalities", len(names)):
                batch.observe(names[m], self.decoders[names[m]], z, seen)
