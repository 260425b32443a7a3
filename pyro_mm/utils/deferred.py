"""Draws that are made when somebody first uses them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.utils._pytree import tree_map


class Deferred(torch.Tensor):
    """A tensor that is computed when somebody first uses it: most draws of missing modalities never are."""

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor]) -> Deferred:
        new = torch.Tensor._make_subclass(cls, torch.empty(0))
        new._compute, new._value = compute, None
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)


class Counter(Deferred):
    """The indices ``0..size-1`` of a plate: iterated, they are Python's integers, with no tensor to read them from."""

    _size: int

    @staticmethod
    def __new__(cls, size: int, device: torch.device | str) -> Counter:  # type: ignore[override]
        new: Any = Deferred.__new__(cls, lambda: torch.arange(size, device=device))
        new._size = size
        return new

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._size))

    def __len__(self) -> int:
        return self._size

    def size(self, dim: int | None = None) -> Any:  # type: ignore[override]
        return torch.Size([self._size]) if dim is None else self._size


class Counted(Messenger):
    """Hands plates that are not subsampled a :class:`Counter`, which spares a sequential one a read per step."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and site_is_subsample(msg):
            fn = msg["fn"]
            if fn.subsample_size in (None, fn.size):
                msg["value"], msg["done"] = Counter(fn.size, fn.device), True


def _computed(x: Any) -> Any:
    if not isinstance(x, Deferred):
        return x
    if x._value is None:
        x._value = x._compute()
    return x._value


def plate_shape() -> tuple[int, ...]:
    """The batch shape of the plates around."""
    sizes = {h.dim: getattr(h, "subsample_size", h.size) for h in _PYRO_STACK if isinstance(h, IndepMessenger)}
    dims = [dim for dim in sizes if dim is not None]
    return tuple(sizes.get(dim, 1) for dim in range(min(dims, default=0), 0))


def draw(d: Any, plates: tuple[int, ...]) -> Tensor:
    """A draw for every element of the plates, also of a distribution that is the same for all of them."""
    d = d.expand(broadcast_shape(d.batch_shape, plates))
    return d.rsample() if d.has_rsample else d.sample()
