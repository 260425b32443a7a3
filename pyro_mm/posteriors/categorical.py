"""Posteriors q(y | x_S) of a class."""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..conditionals.unconditional import Unconditional
from ..utils.arguments import check_function, check_name
from .experts import PosteriorOfExperts, family_name


class ProductOfCategoricals(PosteriorOfExperts):
    r"""The normalised product of experts on a class: their logarithms add.

    .. math:: q(y | x_S) \propto p_0(y) \prod_{m \in S} q_m(y | x_m)

    Args:
        experts: modality -> encoder giving a Categorical.
        prior: the prior expert, a Categorical; None for equal weights.
    """

    def __init__(self, experts: Mapping[str, nn.Module], prior: dist.Categorical | None = None):
        super().__init__(experts)
        if prior is not None and not isinstance(prior, torch.distributions.Categorical):
            raise TypeError(f"expected prior to be a Categorical or None, got {family_name(prior)}")
        self.prior = None if prior is None else Unconditional(prior)

    def forward(self, batch: Batch) -> dist.Categorical:
        experts, masks = self.encoded(batch)
        for expert in experts:
            if not isinstance(expert, torch.distributions.Categorical):
                raise TypeError(f"expected every expert on a class to be a Categorical, got {family_name(expert)}")
        logits: list[Tensor] = [torch.zeros_like(experts[0].logits)]
        logits += [] if self.prior is None else [self.prior().logits]
        for expert, mask in zip(experts, masks, strict=True):
            if mask is not False:
                logits.append(expert.logits if mask is True else torch.where(mask[..., None], expert.logits, 0.0))
        return dist.Categorical(logits=sum(logits[1:], logits[0]), validate_args=False)


class Label(nn.Module):
    r"""q(y | x_S) of a class y that a modality tells: that class and no other where it is present.

    .. math:: q(y | x_S) = 1[y = \ell] \text{ if } \ell \in S, \text{ else } q'(y | x_S)

    Args:
        name: the modality, integers ``(N,)``.
        posterior: module ``batch -> Categorical``, q'. Rows with a label teach it nothing.

    For labels that may be wrong take q' alone, with an expert for the label.
    """

    def __init__(self, name: str, posterior: nn.Module):
        super().__init__()
        self.name = check_name("name", name)
        self.posterior = check_function("posterior", posterior, ("batch",))

    def forward(self, batch: Batch) -> dist.Categorical:
        other, mask = self.posterior(batch), batch.presence(self.name)
        if mask is False:
            return other
        told = batch[self.name][..., None] == torch.arange(other.logits.shape[-1], device=batch.device)
        known = torch.where(told, 0.0, -torch.inf).to(other.logits.dtype)
        there = mask[..., None] if isinstance(mask, Tensor) else torch.ones_like(told)
        # a choice, not a product with a point mass: minus infinity must not meet the other's gradient
        return dist.Categorical(logits=torch.where(there, known, other.logits), validate_args=False)
