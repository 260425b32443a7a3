"""Columns of a batch that stay in a file, of which rows are read as they are taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..utils.arguments import describe
from .arrays import to_tensor
from .masks import Presence, add_event_dims
from .steps import fill_padding, valid_steps

NUMBERS_AT_ONCE = 2**22  # that are read into memory at once, by what goes through all rows


def is_stored(value: Any) -> bool:
    """Return True for an array in a file: of ``numpy.memmap``, h5py, zarr, or alike.

    Alike is anything with ``shape``, ``dtype`` and rows by slices that is no array in memory: it has ``chunks``, or no
    conversion to an array of NumPy.
    """
    if isinstance(value, np.ndarray):
        return isinstance(value, np.memmap) and value.filename is not None and value.ndim > 0
    if isinstance(value, Tensor | list | tuple) or any(hasattr(value, x) for x in ("to_numpy", "isna", "todense")):
        return False
    if not all(hasattr(value, x) for x in ("shape", "dtype", "__getitem__")) or len(value.shape) == 0:
        return False
    return hasattr(value, "chunks") or not hasattr(value, "__array__")


class StoredColumn:
    """The values of a modality or a covariate in a file, ``(N, *event)``, of which indexing reads some rows.

    Rows without the modality are filled by a copy of the first row that has it, and padding by the last valid step.

    Args:
        what: the column in words, for errors.
        array: the array; anything with ``shape``, ``dtype`` and rows by slices.
        mask: the rows that have values, boolean ``(N,)``, or True or False for all.
        lengths: numbers of valid steps of sequences, ``(N,)``; None for other values.
        device: the device that rows are read to.

    Attributes:
        shape, dtype, device: those of all rows as a tensor.
        facts: results of passes through all rows, by their names.

    Raises:
        TypeError: an array of something else than numbers.
        ValueError: an array without rows, or without numbers in a row.
    """

    def __init__(
        self,
        what: str,
        array: Any,
        mask: Presence = True,
        lengths: Tensor | None = None,
        device: torch.device | None = None,
    ):
        self.what = what
        self.array = array
        self.shape = torch.Size(array.shape)
        if self.shape.numel() == 0:
            raise ValueError(
                f"{what}: expected at least one row, of at least one number, got shape {tuple(self.shape)}"
            )
        self.dtype = to_tensor(what, np.zeros(1, _numpy_dtype(what, array.dtype))).dtype
        self.device = torch.get_default_device() if device is None else device
        self.facts: dict[Any, Any] = {}
        self._mask = mask.cpu() if isinstance(mask, Tensor) else mask
        self._lengths = None if lengths is None else lengths.cpu()
        self._filler: Tensor | None = None
        self._first_step: Tensor | None = None  # of a sequence that has one

    def with_rows(self, mask: Presence, lengths: Tensor | None) -> StoredColumn:
        """Return the column with other rows that have values, and other lengths."""
        return StoredColumn(self.what, self.array, mask, lengths, self.device)

    def to(self, device: torch.device) -> StoredColumn:
        """Return the column with rows that are read to another device."""
        new = StoredColumn(self.what, self.array, self._mask, self._lengths, device)
        new.facts = self.facts
        return new

    def __len__(self) -> int:
        return self.shape[0]

    def dim(self) -> int:
        """Return the number of dimensions, that of rows included."""
        return len(self.shape)

    def is_floating_point(self) -> bool:
        """Return True for real numbers."""
        return self.dtype.is_floating_point

    @property
    def nbytes(self) -> int:
        """Bytes of all rows in memory."""
        return self.shape.numel() * self.dtype.itemsize

    @property
    def rows_at_once(self) -> int:
        """The number of rows that a pass through all of them reads at once."""
        return max(1, NUMBERS_AT_ONCE * len(self) // self.shape.numel())

    def fact(self, key: Any, find: Callable[[], Any]) -> Any:
        """Return what a pass through all rows found, which is made but once."""
        if key not in self.facts:
            self.facts[key] = find()
        return self.facts[key]

    def __getitem__(self, rows: Any) -> Tensor:
        """Read rows ``(n, *event)``, by a slice, a boolean mask ``(N,)``, or row numbers.

        Raises:
            ValueError: a row that has values has a NaN among them.
            IndexError: a row beyond the end.
        """
        places = self._places(rows)
        values = self._read(places)
        present = self._mask[places] if isinstance(self._mask, Tensor) else torch.full((len(places),), self._mask)
        values = self._with_padding_filled(values, places)
        if not bool(present.all()):
            filler = self._first_row() if self._mask is not False else torch.zeros_like(values[:1])
            values = torch.where(add_event_dims(present, values.dim() - 1), values, filler)
        if values.is_floating_point():
            self._check_complete(values, places)
        return values.to(self.device)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the places of some rows and their values, through all rows."""
        for first in range(0, len(self), self.rows_at_once):
            rows = slice(first, first + self.rows_at_once)
            yield rows, self[rows]

    def _places(self, rows: Any) -> Tensor:
        """Return the row numbers that a key selects, ``(n,)``."""
        if isinstance(rows, slice):
            return torch.arange(*rows.indices(len(self)))
        index = torch.as_tensor(rows).cpu().reshape(-1)
        if index.dtype == torch.bool:
            return index.nonzero()[:, 0]
        if len(index) and not -len(self) <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"row {int(index.max())} of {self.what}, which has {len(self)} rows")
        return index.long() % len(self)

    def _read(self, places: Tensor) -> Tensor:
        """Return rows as they are in the file."""
        if len(places) == 0:
            return torch.zeros(0, *self.shape[1:], dtype=self.dtype)
        unique, inverse = np.unique(places.numpy(), return_inverse=True)
        if isinstance(self.array, np.memmap) and len(unique) < unique[-1] + 1 - unique[0]:
            found = np.array(self.array[unique])
        else:  # by slices alone, which all of them have
            breaks = np.flatnonzero(np.diff(unique) != 1) + 1
            runs = [(int(run[0]), int(run[-1]) + 1) for run in np.split(unique, breaks)]
            found = np.concatenate([np.array(self.array[first:end]) for first, end in runs])
        values = to_tensor(self.what, found)
        if values.shape[1:] != self.shape[1:] or len(values) != len(unique):
            raise ValueError(
                f"{self.what}: expected rows of shape {tuple(self.shape[1:])}, as its shape {tuple(self.shape)} says, "
                f"and got {len(unique)} rows as {tuple(values.shape)} from it"
            )
        order = torch.from_numpy(inverse.reshape(-1))
        return values if torch.equal(order, torch.arange(len(unique))) else values[order]

    def _first_row(self) -> Tensor:
        """Return the first row that has values, ``(1, *event)``."""
        if self._filler is None:
            assert isinstance(self._mask, Tensor)
            place = self._mask.int().argmax().reshape(1)
            self._filler = self._with_padding_filled(self._read(place), place)
        return self._filler

    def _with_padding_filled(self, values: Tensor, places: Tensor) -> Tensor:
        """Return sequences with steps behind the end as :func:`fill_padding` has them in all rows together."""
        if self._lengths is None:
            return values
        lengths = self._lengths[places]
        values = fill_padding(values, lengths, torch.zeros_like(lengths, dtype=torch.bool))
        empty = lengths == 0
        known = (self._lengths > 0) & self._mask
        if not bool(empty.any()) or not bool(known.any()):
            return values
        if self._first_step is None:
            self._first_step = self._read(known.int().argmax().reshape(1))[:, :1]
        return torch.where(add_event_dims(empty, values.dim() - 1), self._first_step, values)

    def _check_complete(self, values: Tensor, places: Tensor) -> None:
        missing = values.isnan()
        if self._lengths is not None:
            valid = valid_steps(self._lengths[places], values.shape[1])
            missing = missing & add_event_dims(valid, values.dim() - 2)
        rows = missing.flatten(1).any(1) if missing.dim() > 1 else missing
        if bool(rows.any()):
            raise ValueError(
                f"{self.what} has a NaN in row {int(places[rows][0])} of its file, in which missing rows are not "
                "searched for: pass present= with the rows that have it, pyro_mm.datasets.complete_rows(array) say"
            )

    # -- where it is taken for a tensor -------------------------------------------------------------------------------

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse to be computed with."""
        column = next((x for x in args if isinstance(x, cls)), None)
        name = "a column" if column is None else column.what
        raise TypeError(
            f"{name} is in a file, and only its rows can be computed with: take some, batch[:100], or read all of "
            "them, batch.read()"
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.__torch_function__(None, (), (self,))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return self.__torch_function__(None, (), (self,))

    def __repr__(self) -> str:
        return f"StoredColumn({self.what}, {describe(self.array)}, {self.dtype}, {tuple(self.shape)})"

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which opens the file again."""
        return {**self.__dict__, "array": _reference(self.array), "facts": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        open_array, arguments = state["array"]
        self.__dict__.update({**state, "array": open_array(*arguments)})

    def __deepcopy__(self, memo: Any) -> Self:
        return self


def _numpy_dtype(what: str, dtype: Any) -> np.dtype:
    try:
        found: np.dtype = np.dtype(dtype)
        return found
    except TypeError as error:
        raise TypeError(f"{what}: expected an array whose dtype NumPy knows, got {dtype}") from error


def _reference(array: Any) -> tuple[Callable[..., Any], Sequence[Any]]:
    """Return a function and its arguments that open an array's file again."""
    if type(array).__module__.startswith("h5py") and hasattr(array, "file"):
        return _open_hdf5, (array.file.filename, array.name)
    if isinstance(array, np.memmap) and array.flags.c_contiguous:
        root = array
        while isinstance(root.base, np.memmap):
            root = root.base
        shift = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        return _open_memmap, (array.filename, array.dtype, root.offset + shift, array.shape)
    return _as_it_is, (array,)


def _open_hdf5(path: str, name: str) -> Any:
    import h5py

    return h5py.File(path, "r")[name]


def _open_memmap(path: str, dtype: np.dtype, offset: int, shape: tuple[int, ...]) -> np.memmap:
    return np.memmap(path, dtype, "r", offset, shape)


def _as_it_is(array: Any) -> Any:
    return array
