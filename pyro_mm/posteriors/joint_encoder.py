"""A posterior with one network for all modalities together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..batch.batch import Batch
from ..distributions.where import Where
from ..utils.arguments import check_function, check_head, check_modules
from ..utils.network_calls import head_in_blocks


class JointEncoder(nn.Module):
    r"""One network on the features of all modalities, with zeros for the features of a missing one.

    .. math:: q(z | x_S) = N(\mu, \sigma^2)(h_1, \dots, h_M), \qquad h_m = f_m(x_m) \text{ if } m \in S, \text{ else } 0

    With ``partial``, rows that lack a modality have that posterior instead.

    Args:
        features: modality -> module mapping ``(N, *event)`` to features ``(N, F_m)``.
        head: module mapping the concatenated features ``(.., N, F_1 + .. + F_M)`` to a distribution of event shape
            ``(D,)``. If its signature has a parameter ``covariates``, it gets these by keyword.
        partial: a module ``batch -> distribution`` for rows that lack a modality, for instance
            ``ProductOfExperts(unimodal_encoders, prior=None)``, which is q(z | x_m) if one is present; None for zeros.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no features; or a batch without values of a modality.

    Example:
        >>> import torch, pyro_mm as mm
        >>> head = mm.conditionals.Normal(mm.nn.MLP(8 + 8, 2 * 2))
        >>> posterior = mm.posteriors.JointEncoder({"a": mm.nn.MLP(3, 8), "b": torch.nn.Embedding(10, 8)}, head)
        >>> q = posterior(mm.Batch({"a": torch.zeros(5, 3), "b": torch.zeros(5).long()}))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))

    References:
        Suzuki et al. 2016 (arXiv:1611.01891): JMVAE-zero without ``partial``, JMVAE-kl with unimodal encoders.
    """

    def __init__(self, features: Mapping[str, nn.Module], head: nn.Module, partial: nn.Module | None = None):
        super().__init__()
        self.features = nn.ModuleDict(check_modules("features", features))
        self.head = check_head("head", head)
        self.partial: Any = None if partial is None else check_function("partial", partial, ("batch",))

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return q(z | x_S): batch shape ``(N,)``, event shape ``(D,)``."""
        complete = batch.complete(self.features)
        if self.partial is not None and complete is False:
            return self.partial(batch)
        features = []
        for name, net in self.features.items():
            if not batch.holds(name):
                raise ValueError(
                    f"a joint encoder needs filler for {name!r}, of which the batch holds no values: make the batch "
                    "with that modality, such as by Batch.empty(n, like=...)"
                )
            feature = batch.encode(name, net)
            mask = batch.presence(name)
            if mask is not True:
                zero = torch.zeros_like(feature)
                feature = zero if mask is False else torch.where(mask[..., None], feature, zero)
            features.append(feature)
        batch_shape = broadcast_shape(*(feature.shape[:-1] for feature in features))
        concatenated = torch.cat([feature.expand(*batch_shape, -1) for feature in features], -1)
        joint = head_in_blocks(self.head, concatenated, batch.head_keywords(self.head))
        if self.partial is None:
            return joint
        return Where(complete, joint, self.partial(batch)) if isinstance(complete, Tensor) else joint
