"""What users hand over as data, as tensors: of NumPy, pandas and their like, with their marks for missing values."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.arguments import describe

WIDER = {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}  # torch computes with few
NUMBERS = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
}  # fmt: skip


class Column(NamedTuple):
    """A modality as tensors.

    Attributes:
        values: ``(N, *event)``.
        there: boolean ``(N,)``, the rows in which nothing is missing.
        beside: how many numbers stand beside a missing one, in each row, ``(N,)``; None where no row has any.
        numbers: how many numbers there are in each row, ``(N,)``; None as ``beside``.
    """

    values: Tensor
    there: Tensor
    beside: Tensor | None = None
    numbers: Tensor | None = None


def read_modality(name: str, value: Any) -> Column | None:
    """Read a modality's values and the rows in which none of them is missing; None where all are.

    Missing are ``None``, pandas' ``NA``, NaN, and what a mask of ``numpy.ma`` hides.
    """
    what = f"modality {name!r}"
    if value is None:
        return None
    values, missing = read_rows(what, value) if _holds_rows(value) else read_numbers(what, value)
    if values is None:
        return None
    if values.dim() == 0:
        raise ValueError(f"{what}: expected shape (N, ...), got a single number")
    if values.numel() == 0:
        raise ValueError(f"{what}: expected at least one row, of at least one number, got shape {tuple(values.shape)}")
    if missing is None:
        return Column(values, torch.ones(len(values), dtype=torch.bool, device=values.device))
    each = missing.expand(values.shape).flatten(1) if values.dim() > 1 else missing[:, None]
    count = each.sum(1)
    there = count == 0
    numbers = each.shape[1] - count
    beside = torch.where(there, 0, numbers)
    return Column(values, there, beside, numbers) if bool(beside.any()) else Column(values, there)


def read_rows(what: str, value: Any) -> tuple[Tensor, Tensor | None] | tuple[None, None]:
    """Read a sequence of rows, each a number, an array or a mark of a missing one."""
    held = [not _is_mark(item) for item in value]
    rows = [read_numbers(f"{what}, row {i}", item) for i, item in enumerate(value) if held[i]]
    if not rows:
        return None, None
    shapes = {tuple(row.shape) for row, _ in rows}
    if len(shapes) > 1:
        some = ", ".join(map(str, sorted(shapes)[:4]))
        raise TypeError(f"{what}: expected rows of one shape, got rows of {some}: the rows do not make one tensor")
    fill = iter(rows)
    first = rows[0]
    filled = [next(fill) if there else first for there in held]
    try:
        values = torch.stack([row for row, _ in filled])
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what}: the rows do not make one tensor: {error}") from error
    missing = ~torch.tensor(held, device=values.device)
    if all(mask is None for _, mask in filled):
        return values, missing.reshape(-1, *[1] * (values.dim() - 1)) if bool(missing.any()) else None
    inner = [torch.zeros_like(row, dtype=torch.bool) if mask is None else mask for row, mask in filled]
    return values, torch.stack(inner) | missing.reshape(-1, *[1] * (values.dim() - 1))


def read_numbers(what: str, value: Any) -> tuple[Tensor, Tensor | None]:
    """Read numbers as a tensor, and where they are missing, boolean of the same shape; None for nowhere."""
    marked: Any = None
    if isinstance(value, list | tuple) and any(map(_is_mark, value)):  # a row with an entry that is missing
        marked = np.array([_is_mark(item) for item in value])
        known = [item for item in value if not _is_mark(item)]
        value = [known[0] if mark else item for mark, item in zip(marked, value, strict=True)] if known else marked
    if isinstance(value, np.ma.MaskedArray):
        marked, value = np.ma.getmaskarray(value), np.ma.getdata(value)
    elif hasattr(value, "isna") and hasattr(value, "to_numpy"):  # pandas, without importing it
        marked, value = np.asarray(value.isna(), dtype=bool), _of_pandas(value)
    if isinstance(value, np.ndarray) and value.dtype == object and value.ndim:
        marks = np.array([_is_mark(item) for item in value.ravel()], dtype=bool).reshape(value.shape)
        marked = marks if marked is None else marked | marks
        value = _filled(what, value, marked)
    tensor = _tensor(what, value)
    missing = torch.isnan(tensor) if tensor.is_floating_point() else None
    if missing is not None and not bool(missing.any()):
        missing = None
    if marked is not None and marked.any():
        mask = torch.from_numpy(np.ascontiguousarray(marked)).to(tensor.device).reshape(tensor.shape)
        missing = mask if missing is None else missing | mask
    return tensor, missing


def read_covariate(name: str, value: Any) -> Tensor:
    """Read numbers that are known for every row, ``(N, ...)``. Raises a ValueError where one is missing."""
    return _known(f"covariate {name!r}", value, "impute it, leave those rows out, or make it a modality of the story")


def _known(what: str, value: Any, mend: str) -> Tensor:
    """Read numbers ``(N, ...)`` of which none may be missing."""
    if value is None:
        raise TypeError(f"{what}: expected numbers, got None")
    values, missing = read_rows(what, value) if _holds_rows(value) else read_numbers(what, value)
    if values is None or values.dim() == 0:
        raise ValueError(f"{what}: expected shape (N, ...), got {'no number' if values is None else 'a single one'}")
    if missing is not None:
        rows = int(missing.flatten(1).any(1).sum()) if missing.dim() > 1 else int(missing.sum())
        raise ValueError(
            f"{what}: missing or NaN in {rows} of {len(values)} rows, and it is known for every row: {mend}"
        )
    return values


def read_lengths(name: str, value: Any, size: int, steps: int | None) -> Tensor:
    """Read numbers of valid steps ``(N,)``, integers from 0 to ``steps``, as long."""
    lengths = _known(f"lengths of {name!r}", value, "0 says that there is no valid step")
    if lengths.dim() != 1 or len(lengths) != size:
        got = len(lengths) if lengths.dim() == 1 else f"shape {tuple(lengths.shape)}"
        raise ValueError(f"lengths of {name!r}: expected {size} numbers, got {got}")
    whole = lengths.long()
    low, high = (int(whole.min()), int(whole.max())) if size else (0, 0)
    if not torch.equal(whole.to(lengths.dtype), lengths) or low < 0 or high > (math.inf if steps is None else steps):
        most = "" if steps is None else f" to {steps}, the steps of its values"
        raise ValueError(f"lengths of {name!r}: expected integers from 0{most}, got {low} to {high}")
    return whole


def read_mask(name: str, mask: Any, size: int) -> Tensor:
    """Read which of ``size`` rows have a modality, as a boolean tensor; a masked or NA entry is no row that has it."""
    if mask is None:
        return torch.ones(size, dtype=torch.bool)
    what = f"present[{name!r}]"
    values, missing = read_rows(what, mask) if _holds_rows(mask) else read_numbers(what, mask)
    if values is None or values.dtype != torch.bool or values.shape != (size,):
        got = "nothing" if values is None else f"{values.dtype} of shape {tuple(values.shape)}"
        raise ValueError(f"{what}: expected torch.bool of shape ({size},), got {got}")
    return values if missing is None else values & ~missing


def dropped(name: str, column: Column, mask: Tensor) -> str:
    """Say what share of a modality's numbers is lost where a row counts as missing for some of its numbers; or ""."""
    if column.beside is None or column.numbers is None:
        return ""
    lost, numbers = int(column.beside[mask].sum()), int(column.numbers[mask].sum())
    if not lost:
        return ""
    rows = int(((column.beside > 0) & mask).sum())
    return (
        f"modality {name!r}: {rows} of {len(mask)} rows have missing entries (NaN) beside numbers, and are "
        f"missing altogether, which drops {lost / numbers:.1%} of the numbers. Impute them, or split the columns into "
        "modalities that are missing by themselves"
    )


def _holds_rows(value: Any) -> bool:
    """Return whether rows come one by one, and not as one array of numbers."""
    if isinstance(value, list | tuple):
        return True
    is_rows = isinstance(value, np.ndarray) and value.dtype == object and value.ndim == 1
    return is_rows and any(np.ndim(item) > 0 for item in value if not _is_mark(item))


def _is_mark(item: Any) -> bool:
    """Return whether an entry stands for a missing one: None, NA and NaT of pandas, masked of NumPy."""
    return item is None or item is np.ma.masked or type(item).__name__ in ("NAType", "NaTType")


def _filled(what: str, value: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """Return an array of objects as one of numbers, with a copy of one of them where they are missing."""
    known = value[~marked]
    filler = known.flat[0] if known.size else np.nan
    if isinstance(filler, str | bytes):
        raise TypeError(f"{what}: expected numbers, got {type(filler).__name__}: encode categories as integers first")
    objects = np.where(marked, np.array(filler, dtype=object), value)
    try:
        return np.array(objects.tolist())
    except (TypeError, ValueError) as error:
        raise TypeError(f"{what}: expected numbers, got objects of type {type(filler).__name__}: {error}") from error


def _of_pandas(value: Any) -> np.ndarray:
    """Return the numbers of a series or a frame; of nullable integers as integers, and not as floats with NaN."""
    kind = getattr(getattr(value, "dtype", None), "numpy_dtype", None)
    if isinstance(kind, np.dtype) and kind.kind in "iub":
        return value.to_numpy(dtype=kind, na_value=0)
    return value.to_numpy()


def _tensor(what: str, value: Any) -> Tensor:
    """Return numbers of one array as a tensor of a type that torch computes with."""
    if not isinstance(value, Tensor):
        value = _array(what, value)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nothing here writes to it
            tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"{what}: expected numbers, got {_kind(value)}: {error}") from error
    if tensor.is_nested:
        raise TypeError(f"{what}: expected a dense tensor, got a nested one: rows of unequal length need padding")
    if tensor.layout != torch.strided:
        raise TypeError(f"{what}: expected a dense tensor, got one of layout {tensor.layout}: give its .to_dense()")
    if tensor.is_complex():
        raise TypeError(
            f"{what}: expected real numbers, got {tensor.dtype}: give the real and the imaginary part as two entries"
        )
    tensor = tensor.to(WIDER.get(tensor.dtype, tensor.dtype))
    if tensor.dtype not in NUMBERS:
        raise TypeError(f"{what}: expected numbers, got {tensor.dtype}")
    return tensor


def _array(what: str, value: Any) -> Any:
    """Return anything but a tensor in a form that ``torch.as_tensor`` takes."""
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
        raise TypeError(f"{what}: expected numbers, got {_kind(value)}")
    if value.dtype.itemsize > 8 and value.dtype.kind == "f":
        value = value.astype(np.float64)
    if not value.dtype.isnative:
        value = value.astype(value.dtype.newbyteorder("="))
    strided = any(stride < 0 for stride in value.strides) or any(s % value.itemsize for s in value.strides)
    return np.ascontiguousarray(value) if strided else value


def _kind(value: Any) -> str:
    kind = getattr(value, "dtype", None)
    if kind is None:
        return describe(value)
    hint = ": encode categories as integers first" if getattr(kind, "kind", "") in "OUS" else ""
    return f"{kind}{hint}"
