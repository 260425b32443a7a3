"""Posteriors with networks of their own for certain sets of modalities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..batch.batch import Batch
from ..distributions.where import Where
from ..utils.arguments import check_function, check_modules
from ..utils.network_calls import head_in_blocks


class JointEncoder(nn.Module):
    r"""One network over the features of all modalities, zeros standing for a missing one.

    .. math:: q(z | x_S) = N(\mu, \sigma^2)(h_1, \dots, h_M), \qquad h_m = f_m(x_m) \text{ if } m \in S, \text{ else } 0

    Args:
        features: modality -> module giving a feature vector ``(N, F_m)``.
        head: module giving the distribution from their concatenation ``(.., N, sum_m F_m)``.
        partial: a posterior that takes over where any modality is missing, for instance
            ``ProductOfExperts(unimodal_encoders, prior=None)``, which is q(z | x_m) where one is present.

    Suzuki et al. 2016 (arXiv:1611.01891): zeros are its JMVAE-zero, separate unimodal encoders its JMVAE-kl.
    """

    def __init__(self, features: Mapping[str, nn.Module], head: nn.Module, partial: nn.Module | None = None):
        super().__init__()
        self.features = nn.ModuleDict(check_modules("features", features))
        self.head = check_function("head", head, ("features",))
        self.partial: Any = None if partial is None else check_function("partial", partial, ("batch",))

    def forward(self, batch: Batch) -> dist.Distribution:
        complete = batch.complete(self.features)
        if self.partial is not None and complete is False:
            return self.partial(batch)
        encoded = []
        for name, net in self.features.items():
            if not batch.holds(name):
                raise ValueError(f"a joint encoder needs filler for {name!r}, which the batch holds no values of")
            feature, mask = batch.encode(name, net), batch.presence(name)
            if mask is not True:
                zero = torch.zeros_like(feature)
                feature = zero if mask is False else torch.where(mask[..., None], feature, zero)
            encoded.append(feature)
        lead = broadcast_shape(*(h.shape[:-1] for h in encoded))
        whole = torch.cat([h.expand(*lead, -1) for h in encoded], -1)
        joint = head_in_blocks(self.head, whole)
        if self.partial is None:
            return joint
        return Where(complete, joint, self.partial(batch)) if isinstance(complete, Tensor) else joint
