"""Distributions as modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..distributions.gaussian_experts import STANDARD_NORMAL
from ..utils.arguments import describe


class Unconditional(nn.Module):
    """A module that ignores its inputs and returns a fixed distribution, which moves between devices with a model.

    Args:
        distribution: its tensors follow ``.to(...)`` like buffers. They are not in the ``state_dict``.

    Raises:
        ValueError: a tensor of the distribution requires a gradient; no optimiser would find it here.
    """

    def __init__(self, distribution: dist.Distribution):
        super().__init__()
        if any(tensor.requires_grad for tensor in tensors_of(distribution)):
            raise ValueError(
                "the distribution has trainable parameters: pass a module whose forward builds the distribution from "
                "them"
            )
        self.distribution = distribution

    def forward(self, *_: Any) -> dist.Distribution:
        """Return the distribution."""
        return self.distribution

    def _apply(self, fn: Any, recurse: bool = True) -> Unconditional:
        if self.distribution is not STANDARD_NORMAL:  # plain numbers, at home on every device
            self.distribution = map_tensors(self.distribution, fn)
        moved: Unconditional = super()._apply(fn, recurse)
        return moved


def as_module(argument: str, value: Any) -> nn.Module:
    """Return a distribution as a module, and a module as it is. Raises a TypeError for anything else."""
    if isinstance(value, nn.Module):
        return value
    if not isinstance(value, torch.distributions.Distribution):
        raise TypeError(
            f"expected {argument} to be a distribution, or a module that gives one of a batch, got {describe(value)}"
        )
    return Unconditional(value)


def tensors_of(d: Any) -> Iterator[Tensor]:
    """Yield every tensor that a distribution, or one inside of it, holds."""
    for value in vars(d).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, torch.distributions.Distribution):
            yield from tensors_of(value)


def map_tensors(d: Any, fn: Any) -> Any:
    """Copy a distribution with a function applied to every tensor it holds."""
    new = copy.copy(d)
    for name, value in vars(d).items():
        if isinstance(value, Tensor):
            setattr(new, name, fn(value))
        elif isinstance(value, torch.distributions.Distribution):
            setattr(new, name, map_tensors(value, fn))
    return new
