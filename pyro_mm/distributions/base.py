"""Parts of mixtures and choices: a base class, and helpers to broadcast, select and unwrap."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, constraints

from ..utils.arguments import check_tensor, describe


def gumbel(uniform: Tensor) -> Tensor:
    """Transform uniform noise on [0, 1) to standard Gumbel noise.

    ``(log_weights + gumbel(uniform)).argmax(-1)`` is a draw of an index with probabilities proportional to the weights.

    Args:
        uniform: floats of any shape.

    Returns:
        A tensor of the same shape.

    Raises:
        TypeError: a tensor of another type than floats.

    Example:
        >>> import torch, pyro_mm as mm
        >>> mm.distributions.gumbel(torch.tensor([0.5, 0.9]))
        tensor([0.3665, 2.2504])
    """
    if not check_tensor("uniform", uniform).is_floating_point():
        raise TypeError(f"expected uniform numbers as floats, got {uniform.dtype}")
    # clamped, since a uniform of 0 would tie with weights of 0
    return -uniform.clamp(min=torch.finfo(uniform.dtype).tiny).log().neg().log()


class Composite(TorchDistribution):
    """A distribution made of other ones.

    ``expand`` stores the new batch shape only; the parts are broadcast when they are used.

    Args:
        batch_shape: of this distribution.
        parts: distributions of one event shape, whose batch shapes broadcast with it.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}

    def __init__(self, batch_shape: Size, *parts: TorchDistribution) -> None:
        self._parts = parts
        super().__init__(batch_shape, parts[0].event_shape, validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return all(part.has_rsample for part in self._parts)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint | None:
        support: constraints.Constraint | None = self._parts[0].support
        return support

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> Self:
        old = tuple(self.batch_shape)
        new_shape = tuple(batch_shape)
        fits = all(a in (1, b) for a, b in zip(old[::-1], new_shape[::-1], strict=False))
        if len(old) > len(new_shape) or not fits:
            raise ValueError(f"cannot expand batch shape {old} to {new_shape}")
        new = copy.copy(self)
        new._batch_shape = Size(batch_shape)
        return new


def diagonal(d: Distribution) -> tuple[Tensor, Tensor]:
    """Return location and scale of a Normal or Laplace, also inside of ``expand`` and ``to_event``.

    Args:
        d: the distribution.

    Returns:
        ``loc`` and ``scale``, both of shape ``(*batch_shape, *event_shape)``.

    Raises:
        TypeError: any other distribution.

    Example:
        >>> import torch, pyro_mm as mm, pyro.distributions as dist
        >>> loc, scale = mm.distributions.diagonal(dist.Normal(torch.zeros(2), 3.0).to_event(1).expand([4]))
        >>> loc.shape, scale[0]
        (torch.Size([4, 2]), tensor([3., 3.]))
    """
    check_distribution("d", d)
    base = base_distribution(d)
    if not isinstance(base, (torch.distributions.Normal, torch.distributions.Laplace)):
        raise TypeError(f"expected a diagonal Normal or Laplace, got {type(base).__name__}")
    shape = d.batch_shape + d.event_shape
    return base.loc.expand(shape), base.scale.expand(shape)


def check_distribution(argument: str, d: Any) -> None:
    """Raise a TypeError unless an argument is a distribution."""
    if not isinstance(d, Distribution):
        raise TypeError(f"expected {argument} to be a distribution, got {describe(d)}")


def base_distribution(d: Distribution) -> Distribution:
    """Return the distribution inside of any ``expand`` and ``to_event``."""
    while isinstance(d, (Independent, ExpandedDistribution)):
        d = d.base_dist
    return d


def has_atoms(d: Distribution) -> bool:
    """Return True if a distribution is a Delta, or has one among its parts, and so no density."""
    if isinstance(d, Delta):
        return True
    if isinstance(d, (Independent, ExpandedDistribution)):
        return has_atoms(d.base_dist)
    return any(has_atoms(part) for part in _parts(d))


def _parts(d: Distribution) -> list[Distribution]:
    """Return the distributions that a distribution holds."""
    held: list[Any] = []
    for value in vars(d).values():
        held += value if isinstance(value, (tuple, list)) else [value]
    return [value for value in held if isinstance(value, Distribution)]


def detach_distribution(d: Any) -> Any:
    """Return a copy of a distribution in which no tensor has a gradient, those of its parts included.

    Networks inside of it, such as those of a flow, are left as they are.
    """
    return _detach(d, {})


def _detach(value: Any, known: dict[int, Any]) -> Any:
    """Return a tensor, a distribution or a sequence of such without gradient; anything else as it is.

    Args:
        value: the value.
        known: identity of a distribution -> its copy, for those that are held in several places.
    """
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if type(value) in (tuple, list):
        return type(value)(_detach(x, known) for x in value)
    if not isinstance(value, Distribution):
        return value
    if id(value) not in known:
        new = copy.copy(value)
        known[id(value)] = new
        for name, held in vars(value).items():
            new.__dict__[name] = _detach(held, known)
    return known[id(value)]


def select_components(x: Tensor, index: Tensor, event_dim: int) -> Tensor:
    """Select one component for every element: ``x[b, index[..., b]]`` for each b.

    Rows are selected, not gathered, so that the backward pass needs no copy of x in the index's shape.

    Args:
        x: ``(*B, C, *E)`` with ``event_dim`` dimensions E.
        index: integers below C, ``(..., *B)``.
        event_dim: the number of event dimensions.

    Returns:
        ``(..., *B, *E)``.
    """
    *batch, components = x.shape[: x.dim() - event_dim]
    event_shape = x.shape[x.dim() - event_dim :]
    flat_index = torch.arange(math.prod(batch), device=x.device).reshape(batch) * components + index
    selected = x.reshape(-1, *event_shape).index_select(0, flat_index.reshape(-1))
    return selected.reshape(flat_index.shape + event_shape)


def append_dims(x: Tensor, dims: int) -> Tensor:
    """Return ``x`` with ``dims`` dimensions of size 1 appended to its shape."""
    return x.reshape(x.shape + (1,) * dims)


def expand_to(x: Tensor, shape: Size) -> Tensor:
    """Return ``x`` broadcast with a shape; as it is if it has that shape."""
    return x if x.shape == shape else x.expand(broadcast_shape(x.shape, shape))


def expand_distribution(d: TorchDistribution, batch_shape: Size) -> TorchDistribution:
    """Return ``d.expand(batch_shape)``. Pyro's own changes an ``ExpandedDistribution`` in place, and this does not."""
    if d.batch_shape == batch_shape:
        return d
    if isinstance(d, ExpandedDistribution):
        return ExpandedDistribution(d.base_dist, batch_shape)
    if isinstance(d, Independent):
        n = d.reinterpreted_batch_ndims
        return expand_distribution(d.base_dist, batch_shape + d.event_shape[:n]).to_event(n)
    return d.expand(batch_shape)
