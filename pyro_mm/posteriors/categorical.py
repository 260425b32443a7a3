"""Posteriors q(y | x_S) of a discrete latent."""

from __future__ import annotations

from collections.abc import Mapping

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..conditionals.unconditional import Unconditional
from ..utils.arguments import check_function, check_name
from .experts import PosteriorOfExperts, check_equal_events, family_name


class ProductOfCategoricals(PosteriorOfExperts):
    r"""The normalised product of experts on a class: their log-probabilities add.

    .. math:: q(y | x_S) \propto p_0(y) \prod_{m \in S} q_m(y | x_m)

    A missing modality leaves the product. In a row without any, q is the prior expert, or uniform if there is none.

    Args:
        experts: modality -> encoder, a module mapping ``(N, *event)`` to a Categorical of C classes.
        prior: the prior expert :math:`p_0`, a Categorical of C classes; None for equal weights.

    Raises:
        TypeError: an expert or a prior expert that is not a Categorical.
        ValueError: unlike numbers of classes.

    Example:
        >>> import torch, pyro_mm as mm
        >>> expert = mm.conditionals.Categorical(torch.nn.Identity())  # the values are the logits
        >>> posterior = mm.posteriors.ProductOfCategoricals({"a": expert, "b": expert})
        >>> logits = torch.tensor([[0.8, 0.2]]).log()
        >>> posterior(mm.Batch({"a": logits, "b": logits})).probs  # 16 : 1
        tensor([[0.9412, 0.0588]])
    """

    def __init__(self, experts: Mapping[str, nn.Module], prior: dist.Categorical | None = None):
        super().__init__(experts)
        if prior is not None and not isinstance(prior, torch.distributions.Categorical):
            raise TypeError(f"expected prior to be a Categorical or None, got {family_name(prior)}")
        self.prior = None if prior is None else Unconditional(prior)

    def forward(self, batch: Batch) -> dist.Categorical:
        """Return q(y | x_S): a Categorical of batch shape ``(N,)``."""
        experts, masks = self.encoded(batch)
        for expert in experts:
            if not isinstance(expert, torch.distributions.Categorical):
                raise TypeError(f"expected every expert on a class to be a Categorical, got {family_name(expert)}")
        check_equal_events(type(self).__name__, self.names_held(batch), experts)

        logits: list[Tensor] = [torch.zeros_like(experts[0].logits)]
        if self.prior is not None:
            logits.append(self._prior_logits(experts[0].logits.shape[-1]))
        for expert, mask in zip(experts, masks, strict=True):
            if mask is not False:
                logits.append(expert.logits if mask is True else torch.where(mask[..., None], expert.logits, 0.0))
        return dist.Categorical(logits=sum(logits[1:], logits[0]), validate_args=False)

    def _prior_logits(self, classes: int) -> Tensor:
        """Return the logits of the prior expert, ``(C,)``. Raises a ValueError unless C is ``classes``."""
        assert self.prior is not None
        logits: Tensor = self.prior().logits
        if logits.shape[-1] != classes:
            raise ValueError(f"expected a prior expert on the experts' {classes} classes, got {logits.shape[-1]}")
        return logits


class Label(nn.Module):
    r"""The posterior of a class that a modality states: a point mass on the label where it is present.

    .. math:: q(y | x_S) = 1[y = \ell] \text{ if } \ell \in S, \text{ else } q'(y | x_S)

    For labels that may be wrong take q' alone, with an expert for the label.

    Args:
        name: the modality of the labels, integers ``(N,)`` below C.
        posterior: module ``batch -> Categorical`` of C classes, :math:`q'`. Rows with a label give it no gradient.

    Example:
        >>> import torch, pyro_mm as mm
        >>> classifier = mm.conditionals.Categorical(torch.nn.Identity())  # the values are the logits
        >>> posterior = mm.posteriors.Label("label", mm.posteriors.ProductOfCategoricals({"a": classifier}))
        >>> values = {"a": torch.zeros(2, 3), "label": torch.tensor([2, 0])}
        >>> posterior(mm.Batch(values, present={"label": [True, False]})).probs
        tensor([[0.0000, 0.0000, 1.0000],
                [0.3333, 0.3333, 0.3333]])
    """

    def __init__(self, name: str, posterior: nn.Module):
        super().__init__()
        self.name = check_name("name", name)
        self.posterior = check_function("posterior", posterior, ("batch",))

    def forward(self, batch: Batch) -> dist.Categorical:
        """Return q(y | x_S): a Categorical of batch shape ``(N,)``."""
        other = self.posterior(batch)
        mask = batch.presence(self.name)
        if mask is False:
            return other
        is_label = batch[self.name][..., None] == torch.arange(other.logits.shape[-1], device=batch.device)
        point_mass = torch.where(is_label, 0.0, -torch.inf).to(other.logits.dtype)
        present = mask[..., None] if isinstance(mask, Tensor) else torch.ones_like(is_label)
        # selected, not added: minus infinity must not meet the gradient of the other logits
        return dist.Categorical(logits=torch.where(present, point_mass, other.logits), validate_args=False)
