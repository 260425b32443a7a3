"""A distribution as a module."""

from __future__ import annotations

import copy
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .distributions import STANDARD_NORMAL


class Fixed(nn.Module):
    """A distribution with fixed parameters as a module that ignores its inputs, so that it moves with a model.

    Args:
        distribution: its tensors follow ``.to(...)`` like buffers; they are not part of the ``state_dict``.
    """

    def __init__(self, distribution: dist.Distribution):
        super().__init__()
        self.distribution = distribution

    def forward(self, *_: Any) -> dist.Distribution:
        return self.distribution

    def _apply(self, fn: Any, recurse: bool = True) -> Fixed:
        if self.distribution is not STANDARD_NORMAL:  # plain numbers, at home on every device
            self.distribution = _map_tensors(self.distribution, fn)
        return super()._apply(fn, recurse)


def _map_tensors(d: Any, fn: Any) -> Any:
    """A copy of a distribution with a function applied to every tensor it holds."""
    new = copy.copy(d)
    for name, value in vars(d).items():
        if isinstance(value, Tensor):
            setattr(new, name, fn(value))
        elif isinstance(value, torch.distributions.Distribution):
            setattr(new, name, _map_tensors(value, fn))
    return new
