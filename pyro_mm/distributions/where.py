"""A choice between two distributions for every row."""

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
    r"""A choice between two distributions for every element of the batch.

    .. math:: p(z_n) \text{ where } mask_n, \quad \text{else } q(z_n)

    KL divergences are registered for it on either side: of p where the mask is True, and of q elsewhere.

    Args:
        mask: booleans, which broadcast with the batch shapes of p and q. The attribute is ``condition``, since ``mask``
            is a method of Pyro's distributions.
        p: the distribution where the mask is True.
        q: the distribution elsewhere, of the same event shape.

    Raises:
        TypeError: a mask that is not boolean, or no distributions.
        ValueError: the event shapes differ.

    Example:
        >>> import torch, pyro_mm as mm
        >>> from pyro.distributions import Normal
        >>> mm.distributions.Where(torch.tensor([True, False]), Normal(0.0, 1.0), Normal(5.0, 1.0)).mean
        tensor([0., 5.])
    """

    def __init__(self, mask: Tensor, p: TorchDistribution, q: TorchDistribution) -> None:
        check_distribution("p", p)
        check_distribution("q", q)
        if check_tensor("mask", mask).dtype != torch.bool:
            raise TypeError(f"expected mask to be boolean, got {mask.dtype}")
        if p.event_shape != q.event_shape:
            raise ValueError(f"event shapes differ: {tuple(p.event_shape)} and {tuple(q.event_shape)}")
        self.condition = mask
        self.p = p
        self.q = q
        batch_shape = Size(broadcast_shape(mask.shape, p.batch_shape, q.batch_shape))
        super().__init__(batch_shape, p, q)

    @property
    def mean(self) -> Tensor:
        return self.choose(self.p.mean, self.q.mean)

    @property
    def variance(self) -> Tensor:
        return self.choose(self.p.variance, self.q.variance)

    def choose(self, p: Tensor, q: Tensor) -> Tensor:
        """Return the elements of ``p`` where the mask is True and those of ``q`` elsewhere.

        Args:
            p: values that broadcast with ``(*batch_shape, *event_shape)``, such as draws.
            q: likewise.
        """
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


@register_kl(Where, Distribution)  # type: ignore[untyped-decorator]
def _kl_where_left(p: Where, q: Distribution) -> Tensor:
    kl = torch.where(p.condition, kl_divergence(p.p, q), kl_divergence(p.q, q))
    return expand_to(kl, p.batch_shape)


# Without the first one, this would tie with (Delta, Distribution), which Pyro registers.
@register_kl(Delta, Where)  # type: ignore[untyped-decorator]
@register_kl(Distribution, Where)  # type: ignore[untyped-decorator]
def _kl_where_right(p: Distribution, q: Where) -> Tensor:
    kl = torch.where(q.condition, kl_divergence(p, q.p), kl_divergence(p, q.q))
    return expand_to(kl, q.batch_shape)


@register_kl(Where, Where)  # type: ignore[untyped-decorator]
def _kl_where_where(p: Where, q: Where) -> Tensor:
    if p.condition is not q.condition:
        return expand_to(_kl_where_left(p, q), q.batch_shape)
    kl = torch.where(p.condition, kl_divergence(p.p, q.p), kl_divergence(p.q, q.q))
    return expand_to(expand_to(kl, p.batch_shape), q.batch_shape)
