"""Posteriors with networks of their own for certain sets of modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..arguments import check_function, check_mapping, check_modules, check_name, check_names
from ..batch import Batch
from ..distributions import Where
from ..fixed import as_module
from ..presence import any_of
from ..products import STANDARD_NORMAL
from ..values import OfOutput, Output, output_of


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
        joint = self.head(Output(output_of(self.head, whole)) if isinstance(self.head, OfOutput) else whole)
        if self.partial is None:
            return joint
        return Where(complete, joint, self.partial(batch)) if isinstance(complete, Tensor) else joint


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


class Private(nn.Module):
    r"""The posterior of a modality's private latent: q(w_m | x_m) where m is present, else ``missing``.

    Args:
        name: the modality m; the latent's site is ``"w_<name>"``.
        encoder: module mapping the values of m to a distribution of event shape (D,).
        missing: what stands in for it where m is absent and w_m is needed to decode it: a distribution, or a module
            ``batch -> distribution`` (MMVAE+'s learned auxiliary prior). By default a standard normal. It serves
            training: ``generate`` draws w_m from the model's own p(w_m).

    Palumbo et al. 2023 (MMVAE+, ICLR).
    """

    def __init__(self, name: str, encoder: nn.Module, missing: dist.Distribution | nn.Module = STANDARD_NORMAL):
        super().__init__()
        self.name = check_name("name", name)
        self.encoder = check_function("encoder", encoder, ("values",))
        self.missing = as_module("missing", missing)

    def forward(self, batch: Batch) -> dist.Distribution:
        if not batch.holds(self.name):
            missing = self.missing(batch)
            if missing is STANDARD_NORMAL:
                raise ValueError(f"no values of {self.name!r} to tell the size of its latent: give ``missing`` one")
            return missing.expand(torch.Size([batch.size]))
        mask, own = batch.presence(self.name), batch.encode(self.name, self.encoder)
        if mask is True:
            return own
        missing = self.missing(batch)
        if missing is STANDARD_NORMAL:
            loc = torch.zeros_like(own.mean)
            missing = dist.Normal(loc, torch.ones_like(loc)).to_event(own.event_dim)
        return Where(mask, own, missing) if isinstance(mask, Tensor) else missing.expand(own.batch_shape)
