"""Keys that select rows of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..utils.arguments import check_integer, describe

RowsKey: TypeAlias = int | slice | Tensor | np.ndarray | np.integer | Sequence[int] | Sequence[bool]
"""Keys that select rows: a row, a slice, a boolean mask ``(N,)``, or row numbers ``(n,)``."""

WANTED = "expected the name of a modality, a row, a slice, a mask or an index of rows"


def read_rows_key(key: Any, size: int, device: torch.device) -> Any:
    """Return the rows that a key selects, in a form that tensors are indexed by.

    Args:
        key: a row, a slice, a boolean mask ``(N,)``, or row numbers ``(n,)``.
        size: the number of rows N.
        device: the device of the batch.

    Returns:
        A slice, or a tensor of booleans or integers.

    Raises:
        TypeError: a key of another kind.
        ValueError: a mask of another number of rows.
        IndexError: a row beyond the end.
    """
    if isinstance(key, Tensor) and key.dtype == torch.long and key.dim() == 1 and key.device == device:
        return key  # as in every step of a training
    if isinstance(key, slice):
        return key
    if isinstance(key, bool | np.bool_ | float | complex) or not isinstance(
        key, int | np.integer | Tensor | np.ndarray | Sequence
    ):
        raise TypeError(f"{WANTED}, got {describe(key)}")
    if isinstance(key, int | np.integer) or (isinstance(key, Tensor | np.ndarray) and key.ndim == 0):
        row = check_integer("row", key)
        if not -size <= row < size:
            raise IndexError(f"row {row} of a batch of {size} rows")
        key = [row % size]

    try:
        rows = torch.as_tensor(key, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{WANTED}, got {describe(key)}") from None
    if rows.numel() == 0 and rows.dtype != torch.bool:
        rows = rows.long()
    if rows.is_floating_point() or rows.is_complex() or rows.dim() != 1:
        raise TypeError(f"{WANTED}, got {describe(key)}")
    if rows.dtype == torch.bool and len(rows) != size:
        raise ValueError(f"expected a mask of {size} rows, got one of {len(rows)}")
    return rows if rows.dtype == torch.bool else rows.long()


def read_device(value: Any) -> torch.device:
    """Return a device from its name. Raises a TypeError or a ValueError for anything else."""
    if not isinstance(value, str | int | torch.device) or isinstance(value, bool):
        raise TypeError(f"expected device to be the name of a device, got {describe(value)}")
    try:
        return torch.device(value)
    except RuntimeError as error:
        raise ValueError(f"expected device to be the name of a device, got {value!r}: {error}") from None
