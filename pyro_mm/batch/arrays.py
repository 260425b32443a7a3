"""Arrays, series, frames and sequences of rows as tensors, with masks of their missing entries."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..utils.arguments import describe

# torch computes with few unsigned types
WIDER_DTYPES = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
NUMERIC_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip


def read_array(what: str, value: Any) -> tuple[Tensor, Tensor | None] | tuple[None, None]:
    """Return the numbers of an array, or of a sequence of rows, and a mask of those that are missing.

    Args:
        what: the data in words, for an error: ``"modality 'a'"``.
        value: a tensor, an array, a series, a frame, or a sequence of rows.

    Returns:
        The values, and a boolean tensor that broadcasts with them, None if nothing is missing; (None, None) if there is
        no number at all.

    Raises:
        TypeError: no numbers, or rows of several shapes.
    """
    return _read_rows(what, value) if _is_row_sequence(value) else _read_numbers(what, value)


def absent_rows(value: Any, size: int) -> Tensor:
    """Return the rows of a sequence of rows that are given as None, or another mark of a missing entry: ``(N,)``."""
    if not _is_row_sequence(value):
        return torch.zeros(size, dtype=torch.bool)
    return torch.tensor([_is_missing(item) for item in value], dtype=torch.bool)


def _read_rows(what: str, value: Any) -> tuple[Tensor, Tensor | None] | tuple[None, None]:
    """Return a sequence of numbers, arrays and marks of missing rows as one tensor."""
    held = [not _is_missing(item) for item in value]
    rows = [_read_numbers(f"{what}, row {i}", item) for i, item in enumerate(value) if held[i]]
    if not rows:
        return None, None
    shapes = {tuple(row.shape) for row, _ in rows}
    if len(shapes) > 1:
        some = ", ".join(map(str, sorted(shapes)[:4]))
        raise TypeError(
            f"{what}: expected rows of one shape, got rows of {some}: the rows do not make one tensor. Sequences of "
            "unequal length are to be padded, by torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), and their "
            "lengths given as Batch(.., lengths={..})"
        )

    rest = iter(rows)
    filled = [next(rest) if there else rows[0] for there in held]
    try:
        values = torch.stack([row for row, _ in filled])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what}: the rows do not make one tensor: {error}") from error

    missing = ~torch.tensor(held, device=values.device).reshape(-1, *[1] * (values.dim() - 1))
    if all(mask is None for _, mask in filled):
        return values, missing if bool(missing.any()) else None
    inner = [torch.zeros_like(row, dtype=torch.bool) if mask is None else mask for row, mask in filled]
    return values, torch.stack(inner) | missing


def _read_numbers(what: str, value: Any) -> tuple[Tensor, Tensor | None]:
    """Return one array as a tensor, and a boolean mask of its shape where entries are missing; None for nowhere."""
    marked: Any = None
    if isinstance(value, list | tuple) and any(map(_is_missing, value)):  # a row with an entry that is missing
        marked = np.array([_is_missing(item) for item in value])
        known = [item for item in value if not _is_missing(item)]
        value = [known[0] if mark else item for mark, item in zip(marked, value, strict=True)] if known else marked
    if isinstance(value, np.ma.MaskedArray):
        marked = np.ma.getmaskarray(value)
        value = np.ma.getdata(value)
    elif hasattr(value, "isna") and hasattr(value, "to_numpy"):  # pandas, without importing it
        marked = np.asarray(value.isna(), dtype=bool)
        value = _pandas_to_numpy(value)
    if isinstance(value, np.ndarray) and value.dtype == object and value.ndim:
        marks = np.array([_is_missing(item) for item in value.ravel()], dtype=bool).reshape(value.shape)
        marked = marks if marked is None else marked | marks
        value = _fill_objects(what, value, marked)
    tensor = to_tensor(what, value)
    missing = torch.isnan(tensor) if tensor.is_floating_point() else None
    if missing is not None and not bool(missing.any()):
        missing = None
    if marked is not None and marked.any():
        mask = torch.from_numpy(np.ascontiguousarray(marked)).to(tensor.device).reshape(tensor.shape)
        missing = mask if missing is None else missing | mask
    return tensor, missing


def _is_row_sequence(value: Any) -> bool:
    """Return True for rows one by one, False for one array of numbers."""
    if isinstance(value, list | tuple):
        return True
    is_rows = isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1
    return is_rows and any(np.ndim(item) > 0 for item in value if not _is_missing(item))


def _is_missing(item: Any) -> bool:
    """Return True for a mark of a missing entry: None, NA and NaT of pandas, masked of NumPy."""
    return item is None or item is np.ma.masked or type(item).__name__ in ("NAType", "NaTType")


def _fill_objects(what: str, value: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Return an array of objects as numbers, with a copy of a known one where an entry is missing."""
    known = value[~marked]
    filler = known.flat[0] if known.size else np.nan
    if isinstance(filler, str | bytes):
        raise TypeError(f"{what}: expected numbers, got {type(filler).__name__}: encode categories as integers first")
    objects = np.where(marked, np.array(filler, dtype=object), value)
    try:
        return np.array(objects.tolist())
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what}: expected numbers, got objects of type {type(filler).__name__}: {error}") from error


def _pandas_to_numpy(value: Any) -> np.ndarray:
    """Return the numbers of a series or a frame. Nullable integers stay integers, and do not become floats with NaN."""
    numbers: np.ndarray
    kind = getattr(getattr(value, "dtype", None), "numpy_dtype", None)
    if isinstance(kind, np.dtype) and kind.kind in "iub":
        numbers = value.to_numpy(dtype=kind, na_value=0)
        return numbers
    numbers = value.to_numpy()
    return numbers


def to_tensor(what: str, value: Any) -> Tensor:
    """Return one array as a tensor of a dtype that torch computes with. Raises a TypeError for anything else."""
    if not isinstance(value, Tensor):
        value = _to_array(what, value)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
            tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{what}: expected numbers, got {_describe_dtype(value)}: {error}") from error
    if tensor.is_nested:
        raise TypeError(f"{what}: expected a dense tensor, got a nested one: rows of unequal length need padding")
    if tensor.layout != torch.strided:
        raise TypeError(f"{what}: expected a dense tensor, got one of layout {tensor.layout}: give its .to_dense()")
    if tensor.is_complex():
        raise TypeError(
            f"{what}: expected real numbers, got {tensor.dtype}: give the real and the imaginary part as two entries"
        )
    tensor = tensor.to(WIDER_DTYPES.get(tensor.dtype, tensor.dtype))
    if tensor.is_inference():
        tensor = tensor.clone()  # or nothing that is computed of it could have a gradient
    if tensor.dtype not in NUMERIC_DTYPES:
        raise TypeError(f"{what}: expected numbers, got {tensor.dtype}")
    return tensor


def _to_array(what: str, value: Any) -> Any:
    """Return anything but a tensor in a form that ``torch.as_tensor`` takes, or raise a TypeError."""
    if hasattr(value, "tocsr") or (hasattr(value, "todense") and not isinstance(value, np.ndarray)):
        shape = getattr(value, "shape", "?")
        raise TypeError(
            f"{what}: expected a dense array, got a sparse {type(value).__name__} of shape {shape}: give its .toarray()"
        )
    if isinstance(value, str | bytes | dict | set | frozenset):
        raise TypeError(f"{what}: expected numbers, got {describe(value)}")
    if not isinstance(value, np.ndarray):
        if hasattr(value, "to_numpy"):  # polars, xarray
            value = value.to_numpy()
        elif hasattr(value, "__array__") and not isinstance(value, np.generic):
            value = np.asarray(value)
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.kind in "OUSMmV":
        raise TypeError(f"{what}: expected numbers, got {_describe_dtype(value)}")
    if value.dtype.itemsize > 8 and value.dtype.kind == "f":
        value = value.astype(np.float64)
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    strided = any(stride < 0 for stride in value.strides) or any(s % value.itemsize for s in value.strides)
    return np.ascontiguousarray(value) if strided else value


def _describe_dtype(value: Any) -> str:
    """Return the dtype of an array in words, with a hint on categories; a description of any other value."""
    kind = getattr(value, "dtype", None)
    if kind is None:
        return describe(value)
    hint = ": encode categories as integers first" if getattr(kind, "kind", "") in "OUS" else ""
    return f"{kind}{hint}"
