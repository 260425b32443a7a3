"""Draws that are made when somebody first uses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


class LazyTensor(torch.Tensor):
    """A tensor that is computed when somebody first uses it: most draws of missing modalities never are."""

    _compute: Callable[[], Tensor]
    _value: Tensor | None

    @staticmethod
    def __new__(cls, compute: Callable[[], Tensor]) -> LazyTensor:
        new = torch.Tensor._make_subclass(cls, torch.empty(0))
        new._compute, new._value = compute, None
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _computed(x: Any) -> Any:
    if not isinstance(x, LazyTensor):
        return x
    if x._value is None:
        x._value = x._compute()
    return x._value
