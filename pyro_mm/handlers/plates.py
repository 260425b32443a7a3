"""A plate whose entries are known."""

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
    """``pyro.plate`` of terms or particles, all of which are there, without its sample site that says so.

    That site is no part of any density, and passing it through the handlers shows in the time of a small step. The
    plate of rows keeps its own: who replays a trace replays its rows.
    """

    @staticmethod
    def _subsample(  # type: ignore[override]
        name: str, size: int, *_: Any
    ) -> tuple[int, int, None]:
        return size, size, None


class PlateIndices(LazyTensor):
    """The indices ``0..size-1`` of a plate: iterated, they are Python's integers, with no tensor to read them from."""

    _size: int

    @staticmethod
    def __new__(cls, size: int, device: torch.device | str) -> PlateIndices:  # type: ignore[override]
        new: Any = LazyTensor.__new__(cls, lambda: torch.arange(size, device=device))
        new._size = size
        return new

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._size))

    def __len__(self) -> int:
        return self._size

    def size(self, dim: int | None = None) -> Any:  # type: ignore[override]
        return torch.Size([self._size]) if dim is None else self._size


class KnownPlates(Messenger):
    """Hands plates that are not subsampled a :class:`PlateIndices`, which spares a sequential one a read per step."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and site_is_subsample(msg):
            fn = msg["fn"]
            if fn.subsample_size in (None, fn.size):
                msg["value"], msg["done"] = PlateIndices(fn.size, fn.device), True


def plate_shape() -> tuple[int, ...]:
    """The batch shape of the plates around."""
    sizes = {h.dim: getattr(h, "subsample_size", h.size) for h in _PYRO_STACK if isinstance(h, IndepMessenger)}
    dims = [dim for dim in sizes if dim is not None]
    return tuple(sizes.get(dim, 1) for dim in range(min(dims, default=0), 0))


def sample_in_plates(d: Any, plates: tuple[int, ...]) -> Tensor:
    """A draw for every element of the plates, also of a distribution that is the same for all of them."""
    d = d.expand(broadcast_shape(d.batch_shape, plates))
    return d.rsample() if d.has_rsample else d.sample()
