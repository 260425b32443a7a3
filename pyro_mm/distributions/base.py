"""What mixtures and choices are made of: broadcasting, selection, the normal inside."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, constraints

from ..utils.arguments import check_tensor, describe


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel variables of uniform ones: log-weights plus them are largest at an index drawn by the weights."""
    if not check_tensor("uniform", uniform).is_floating_point():
        raise TypeError(f"expected uniform numbers as floats, got {uniform.dtype}")
    # Clamped: a uniform of 0 would tie with weights of 0.
    return -uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log().neg().log()


class Composite(TorchDistribution):
    """A distribution made of others. Its expansion is only remembered: the parts broadcast when asked."""

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, batch_shape: Size, *parts: TorchDistribution) -> None:
        self._parts = parts
        super().__init__(batch_shape, parts[0].event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return all(part.has_rsample for part in self._parts)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint | None:
        return self._parts[0].support

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> Self:
        here, there = tuple(self.batch_shape), tuple(batch_shape)
        fits = all(a in (1, b) for a, b in zip(here[::-1], there[::-1], strict=False))
        if len(here) > len(there) or not fits:
            raise ValueError(f"cannot expand batch shape {here} to {there}")
        new = copy.copy(self)
        new._batch_shape = Size(batch_shape)
        return new


def diagonal(d: Distribution) -> tuple[Tensor, Tensor]:
    """``loc`` and ``scale`` of a Normal or Laplace, however often it was expanded or wrapped by ``to_event``.

    Returns:
        Two tensors of shape ``(*batch_shape, *event_shape)``.

    Raises:
        TypeError: any other distribution.
    """
    check_distribution("d", d)
    base = base_distribution(d)
    if not isinstance(base, (torch.distributions.Normal, torch.distributions.Laplace)):
        raise TypeError(f"expected a diagonal Normal or Laplace, got {type(base).__name__}")
    shape = d.batch_shape + d.event_shape
    return base.loc.expand(shape), base.scale.expand(shape)


def check_distribution(argument: str, d: Any) -> None:
    if not isinstance(d, Distribution):
        raise TypeError(f"expected {argument} to be a distribution, got {describe(d)}")


def base_distribution(d: Distribution) -> Distribution:
    """``d`` without what ``expand`` and ``to_event`` wrapped it in."""
    while isinstance(d, (Independent, ExpandedDistribution)):
        d = d.base_dist
    return d


def select_components(x: Tensor, index: Tensor, event_dim: int) -> Tensor:
    """``x[b, index[..., b]]`` for every b: x (*B, C, *E), index (..., *B), result (*index.shape, *E).

    Rows are selected, not gathered: the backward pass then needs no x expanded to the index's shape.
    """
    *batch, size = x.shape[: x.dim() - event_dim]
    event_shape = x.shape[x.dim() - event_dim :]
    rows = torch.arange(math.prod(batch), device=x.device).reshape(batch) * size + index
    return x.reshape(-1, *event_shape).index_select(0, rows.reshape(-1)).reshape(rows.shape + event_shape)


def append_dims(x: Tensor, dims: int) -> Tensor:
    return x.reshape(x.shape + (1,) * dims)


def expand_to(x: Tensor, shape: Size) -> Tensor:
    """``x`` at a shape that it broadcasts to."""
    return x if x.shape == shape else x.expand(broadcast_shape(x.shape, shape))


def expand_distribution(d: TorchDistribution, batch_shape: Size) -> TorchDistribution:
    """``d.expand(batch_shape)``, without Pyro's habit of changing an ``ExpandedDistribution`` in place."""
    if d.batch_shape == batch_shape:
        return d
    if isinstance(d, ExpandedDistribution):
        return ExpandedDistribution(d.base_dist, batch_shape)
    if isinstance(d, Independent):
        n = d.reinterpreted_batch_ndims
        return expand_distribution(d.base_dist, batch_shape + d.event_shape[:n]).to_event(n)
    return d.expand(batch_shape)
