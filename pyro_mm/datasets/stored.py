"""Arrays in files, which are larger than memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch.arrays import to_tensor
from ..batch.stored import StoredColumn, is_stored
from ..utils.arguments import check_integer, describe


def complete_rows(array: Any, rows_at_once: int | None = None) -> Tensor:
    """Find the rows of an array without a NaN, in one pass that holds a part of them in memory.

    Of arrays in files a batch does not search for missing rows, since that reads them once: pass the result as
    ``present=`` where rows may be missing.

    Args:
        array: a ``numpy.memmap``, a dataset of h5py, an array of zarr, or anything with ``shape``, ``dtype`` and rows
            by slices, ``(N, ...)``.
        rows_at_once (int): rows that are read at a time; by default about four million numbers.

    Returns:
        Boolean ``(N,)``.

    Raises:
        TypeError: no such array, or one of something else than numbers.

    Example:
        >>> import numpy as np, tempfile, torch, pyro_mm as mm
        >>> file = tempfile.NamedTemporaryFile()
        >>> array = np.memmap(file.name, "float32", "w+", shape=(3, 2))
        >>> array[1, 0] = np.nan
        >>> present = mm.datasets.complete_rows(array)
        >>> present
        tensor([ True, False,  True])
        >>> mm.Batch({"x": array}, {"x": present})
        Batch(size=3, x(2,) present: 67%)
    """
    if not is_stored(array) and not hasattr(array, "__array__"):
        raise TypeError(f"expected an array with shape, dtype and rows by slices, got {describe(array)}")
    column = StoredColumn("the array", array)
    if not column.is_floating_point():
        return torch.ones(len(column), dtype=torch.bool)
    most = column.rows_at_once if rows_at_once is None else check_integer("rows_at_once", rows_at_once, least=1)
    found = []
    for first in range(0, len(column), most):
        rows = to_tensor("the array", array[first : first + most])
        found.append(~rows.isnan().reshape(len(rows), -1).any(1))
    return torch.cat(found)
