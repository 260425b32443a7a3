"""A distribution of some entries of a batch dimension, scattered over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor

from .base import Composite, expand_to


class Scatter(Composite):
    """A distribution that is known for some entries of a batch dimension, with log-density 0 for the others.

    Along that dimension, ``log_prob(x)[index[i]] = base.log_prob(x[index[i]])[i]``, and 0 elsewhere. It has no draws.
    If every entry is known, use ``base`` itself.

    Args:
        base: a distribution whose batch dimension ``dim`` has size ``len(index)``.
        index: the distinct entries that ``base`` is the distribution of.
        size: the size of that dimension in this distribution.
        dim: the batch dimension, negative, counted from the right of the batch shape.

    Raises:
        ValueError: the sizes do not fit.

    Example:
        >>> from pyro.distributions import Normal
        >>> Scatter(Normal(torch.zeros(2), 1.0), index=(0, 2), size=3, dim=-1).log_prob(torch.zeros(3))
        tensor([-0.9189,  0.0000, -0.9189])
    """

    has_rsample = False

    def __init__(self, base: TorchDistribution, index: tuple[int, ...], size: int, dim: int) -> None:
        shape = list(base.batch_shape)
        if not -len(shape) <= dim < 0 or shape[dim] != len(index):
            raise ValueError(f"expected size {len(index)} at batch dim {dim}, got batch shape {shape}")
        if not index or len(set(index)) < len(index) or not 0 <= min(index) <= max(index) < size:
            raise ValueError(f"expected distinct entries of range({size}), one at least; got {index}")
        shape[dim] = size
        self.base = base
        self.index = tuple(index)
        self.size = size
        self.dim = dim
        super().__init__(Size(shape), base)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        raise NotImplementedError("Scatter only scores: outside of its index there is nothing to draw from")

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of a value that lacks the dimension, or has 1 or ``size`` entries there."""
        dim = self.dim - self.event_dim
        if value.dim() >= -dim and value.shape[dim] != 1:
            if value.shape[dim] != self.size:
                raise ValueError(f"expected 1 or {self.size} entries at dim {dim}, got shape {tuple(value.shape)}")
            # unbound and stacked, since an index tensor would be copied from the host at every call
            entries = value.unbind(dim)
            value = torch.stack([entries[i] for i in self.index], dim)
        log_prob = self.base.log_prob(value)
        known = dict(zip(self.index, log_prob.unbind(self.dim), strict=True))
        zero = torch.zeros_like(known[self.index[0]])
        full = torch.stack([known.get(i, zero) for i in range(self.size)], self.dim)
        return expand_to(full, self.batch_shape)
