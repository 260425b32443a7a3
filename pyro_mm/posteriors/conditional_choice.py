"""Posteriors that choose by what is present, or read covariates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.masks import any_of
from ..conditionals.unconditional import as_module
from ..distributions.where import Where
from ..utils.arguments import check_function, check_mapping, check_modules, check_names


class Either(nn.Module):
    r"""q(z | x_m) of the one modality of two that is present, each of whatever family: flows, for instance.

    Two are as many as it takes: given several out of three or more, a posterior has to combine experts, and flows have
    no product or Hölder pool in closed form. Meant for the ``partial`` of a :class:`JointEncoder`, which has an
    encoder of both: a row with both has the first one's here. q(z | nothing) is a standard normal.

    Args:
        experts: modality -> encoder, for one modality or two; event shape ``(D,)``.

    Raises:
        ValueError: more than two, or none.
    """

    def __init__(self, experts: Mapping[str, nn.Module]):
        super().__init__()
        if not 1 <= len(check_mapping("experts", experts, "modules")) <= 2:
            raise ValueError(
                f"expected encoders of one modality or two, got {list(experts)}: with more of them a row may have "
                "several, whose experts have to be pooled. Give each subset a posterior, or use Normal experts"
            )
        self.experts = nn.ModuleDict(check_modules("experts", experts))

    def forward(self, batch: Batch) -> dist.Distribution:
        names = [name for name in self.experts if batch.holds(name)]
        if not names:
            raise ValueError(f"the batch holds no values of {list(self.experts)}; Batch.empty(n, like=...) would")
        encoded = {name: batch.encode(name, self.experts[name]) for name in names}
        like = encoded[names[0]]
        wide, first = like.batch_shape + like.event_shape, next(self.parameters())
        found = dist.Normal(first.new_zeros(wide), first.new_ones(wide), validate_args=False).to_event(like.event_dim)
        for name in reversed(names):
            mask = batch.presence(name)
            if mask is not False:
                found = Where(mask, encoded[name], found) if isinstance(mask, Tensor) else encoded[name]
        return found


class Given(nn.Module):
    r"""A posterior that learns from certain modalities only, and is a fixed distribution without them.

    .. math:: q(z | x_S) \text{ where a modality among } names \text{ is in } S, \quad \text{else } p(z)

    Where the others inform on z only together with those, as a class does on what an image holds besides it, p(z) is
    the exact posterior given the others.

    Args:
        names: the modalities without which nothing is learnt.
        posterior: module ``batch -> distribution``.
        otherwise: p(z), a distribution or a module ``batch -> distribution``.
    """

    def __init__(self, names: Sequence[str] | str, posterior: nn.Module, otherwise: dist.Distribution | nn.Module):
        super().__init__()
        self.names = check_names("names", names, least=1)
        self.posterior = check_function("posterior", posterior, ("batch",))
        self.otherwise = as_module("otherwise", otherwise)

    def forward(self, batch: Batch) -> dist.Distribution:
        if not any(name in batch for name in self.names):
            raise ValueError(f"the batch has none of {list(self.names)} among its modalities {list(batch)}")
        there, otherwise = any_of(batch.presence(name) for name in self.names), self.otherwise(batch)
        if there is False:
            return otherwise.expand(torch.Size([batch.size]))
        return Where(there, self.posterior(batch), otherwise) if isinstance(there, Tensor) else self.posterior(batch)
