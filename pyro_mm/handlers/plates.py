"""Plates that cost less: without a sample site for their indices, or with indices known in advance."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.distributions.util import broadcast_shape
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .deferred import LazyTensor


class FixedPlate(pyro.plate):
    """A ``pyro.plate`` of all terms or particles, without the sample site that ``pyro.plate`` has for its indices.

    That site is part of no density, and passing it through the handlers shows in the time of a small step. The plate
    of rows keeps its site, since replaying a trace replays its rows.
    """

    @staticmethod
    def _subsample(name: str, size: int, *_: Any) -> tuple[int, int, None]:
        return size, size, None


class PlateIndices(LazyTensor):
    """The indices ``0..size-1`` of a plate as a :class:`LazyTensor`, which iterates over Python integers.

    Args:
        size: the number of entries.
        device: of the tensor, if it is needed.
    """

    _size: int

    @staticmethod
    def __new__(cls, size: int, device: torch.device | str) -> PlateIndices:
        new = LazyTensor.__new__(cls, lambda: torch.arange(size, device=device))
        assert isinstance(new, PlateIndices)
        new._size = size
        return new

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._size))

    def __len__(self) -> int:
        return self._size

    def size(self, dim: int | None = None) -> Any:
        return torch.Size([self._size]) if dim is None else self._size


class KnownPlates(Messenger):
    """A handler that gives plates without subsampling :class:`PlateIndices` as their indices.

    A sequential plate then reads no index from a tensor, which would be a wait for the device per iteration.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and site_is_subsample(msg):
            fn = msg["fn"]
            if fn.subsample_size in (None, fn.size):
                msg["value"] = PlateIndices(fn.size, fn.device)
                msg["done"] = True


def plate_shape() -> tuple[int, ...]:
    """Return the batch shape of the plates that the caller is in, broadcastable: 1 in dimensions without a plate."""
    sizes = {h.dim: getattr(h, "subsample_size", h.size) for h in _PYRO_STACK if isinstance(h, IndepMessenger)}
    dims = [dim for dim in sizes if dim is not None]
    return tuple(sizes.get(dim, 1) for dim in range(min(dims, default=0), 0))


def sample_in_plates(d: Any, plates: tuple[int, ...]) -> Tensor:
    """Return one draw of a distribution per element of the plates, reparametrised if it can be.

    Args:
        d: a distribution whose ``batch_shape`` may lack plates, or have 1 in their place.
        plates: as :func:`plate_shape` returns them.

    Returns:
        A tensor ``(*broadcast_shape, *event)``.
    """
    d = d.expand(broadcast_shape(d.batch_shape, plates))
    value: Tensor = d.rsample() if d.has_rsample else d.sample()
    return value
