"""Checks of the arguments that networks are made of."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..utils.arguments import check_integer, describe


def check_sizes(argument: str, value: Any) -> tuple[int, ...]:
    """Return the sizes of layers as a tuple. Raises a TypeError or a ValueError for anything else."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"expected {argument} to be sizes of layers, such as (256, 256), got {describe(value)}")
    return tuple(check_integer(f"every size in {argument}", size, least=1) for size in value)


def check_activation(value: Any) -> None:
    """Raise a TypeError unless a value is a function that makes a module."""
    if isinstance(value, nn.Module) or not callable(value):
        hint = f": pass {type(value).__name__} itself" if isinstance(value, nn.Module) else ""
        raise TypeError(f"expected activation to make a module, as torch.nn.ReLU does, got {describe(value)}{hint}")
