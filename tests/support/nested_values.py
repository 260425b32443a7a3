"""Comparison of nested dictionaries and sequences of tensors, numbers and words, such as states of a training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor


def differing(one, other, path="", atol=0.0):
    """Return the paths of values that differ.

    Args:
        one, other: the values; those of one kind may be nested.
        path: that of the values themselves.
        atol: tolerance of numbers and of elements of tensors. NaN equals NaN.
    """
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if one.keys() != other.keys():
            return [f"{path}: {sorted(map(str, one.keys() ^ other.keys()))}"]
        return [found for key in one for found in differing(one[key], other[key], f"{path}/{key}", atol)]
    if isinstance(one, Sequence) and isinstance(other, Sequence) and not isinstance(one, str):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} values"]
        pairs = enumerate(zip(one, other, strict=True))
        return [found for place, each in pairs for found in differing(*each, f"{path}/{place}", atol)]
    return [] if _are_close(one, other, atol) else [f"{path}: {one} and {other}"]


def _are_close(one, other, atol):
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return one.isclose(other, rtol=0, atol=atol, equal_nan=True).all().item()
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) <= atol or one == other or (math.isnan(one) and math.isnan(other))
    return type(one) is type(other) and one == other
