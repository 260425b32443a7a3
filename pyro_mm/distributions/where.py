"""A distribution chosen row by row from two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor
from torch.distributions import Distribution, kl_divergence
from torch.distributions.kl import register_kl

from ..utils.arguments import check_tensor
from .base import Composite, append_dims, check_distribution, expand_distribution, expand_to


class Where(Composite):
    """A choice of distribution for every element of the batch: ``p`` where ``mask`` holds, else ``q``.

    ``KL(Where(m, p, q) || r) = where(m, KL(p || r), KL(q || r))``, and likewise on the right.

    Args:
        mask: a boolean tensor; kept as ``condition``, since ``mask`` is a method of Pyro's distributions.
        p, q: distributions of equal event shape; their batch shapes and the mask's broadcast.

    Raises:
        ValueError: the event shapes differ.
    """

    def __init__(self, mask: Tensor, p: TorchDistribution, q: TorchDistribution) -> None:
        check_distribution("p", p)
        check_distribution("q", q)
        if check_tensor("mask", mask).dtype != torch.bool:
            raise TypeError(f"expected mask to be boolean, got {mask.dtype}")
        if p.event_shape != q.event_shape:
            raise ValueError(f"event shapes differ: {tuple(p.event_shape)} and {tuple(q.event_shape)}")
        self.condition, self.p, self.q = mask, p, q
        batch_shape = Size(broadcast_shape(mask.shape, p.batch_shape, q.batch_shape))
        super().__init__(batch_shape, p, q)

    @property
    def mean(self) -> Tensor:
        return self.choose(self.p.mean, self.q.mean)

    @property
    def variance(self) -> Tensor:
        return self.choose(self.p.variance, self.q.variance)

    def choose(self, p: Tensor, q: Tensor) -> Tensor:
        """The elements of p where ``condition`` holds, else those of q, both shaped like draws."""
        chosen = torch.where(append_dims(self.condition, self.event_dim), p, q)
        return expand_to(chosen, self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = torch.where(self.condition, self.p.log_prob(value), self.q.log_prob(value))
        return expand_to(log_prob, self.batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        p, q = (expand_distribution(part, self.batch_shape).sample(Size(sample_shape)) for part in self._parts)
        return self.choose(p, q)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        p, q = (expand_distribution(part, self.batch_shape).rsample(Size(sample_shape)) for part in self._parts)
        return self.choose(p, q)


@register_kl(Where, Distribution)
def _kl_where_left(p: Where, q: Distribution) -> Tensor:
    kl = torch.where(p.condition, kl_divergence(p.p, q), kl_divergence(p.q, q))
    return expand_to(kl, p.batch_shape)


@register_kl(Delta, Where)  # Pyro registers (Delta, Distribution): without this line the two would tie
@register_kl(Distribution, Where)
def _kl_where_right(p: Distribution, q: Where) -> Tensor:
    kl = torch.where(q.condition, kl_divergence(p, q.p), kl_divergence(p, q.q))
    return expand_to(kl, q.batch_shape)


@register_kl(Where, Where)
def _kl_where_where(p: Where, q: Where) -> Tensor:
    if p.condition is not q.condition:
        return expand_to(_kl_where_left(p, q), q.batch_shape)
    kl = torch.where(p.condition, kl_divergence(p.p, q.p), kl_divergence(p.q, q.q))
    return expand_to(expand_to(kl, p.batch_shape), q.batch_shape)
