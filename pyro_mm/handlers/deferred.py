"""Tensors that are computed at their first use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class LazyTensor(torch.Tensor):
    """A tensor whose value is computed once, the first time that an operation of torch takes it.

    Draws of missing modalities are of this kind: a story passes them on, and seldom uses them. Its ``shape`` is the
    shape of the computed value, since reading an attribute is an operation of torch, too.

    Args:
        compute: returns the value.

    Example::

        >>> x = LazyTensor(lambda: print("computed") or torch.ones(2))
        >>> x + 1
        computed
        tensor([2., 2.])
        >>> x.shape
        torch.Size([2])
    """

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor]) -> LazyTensor:
        new = torch.Tensor._make_subclass(cls, torch.empty(0))
        new._compute = compute
        new._value = None
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_compute_lazy, (args, kwargs or {}))
        return func(*args, **kwargs)


def _compute_lazy(x: Any) -> Any:
    """Return the value of a :class:`LazyTensor`; anything else as it is."""
    if not isinstance(x, LazyTensor):
        return x
    if x._value is None:
        x._value = x._compute()
    return x._value
