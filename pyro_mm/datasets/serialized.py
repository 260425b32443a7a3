"""Reading arrays from HDF5 files, and from pickled dictionaries without running code from them."""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from .files import BadFile

MAX_PICKLE_BYTES = 2**33
MAX_HDF5_BYTES = 2**31


def _frombuffer(buffer: Any, dtype: Any, shape: Any, order: str, *_: Any) -> np.ndarray:
    """Rebuild an array as NumPy's own function for protocol 5 does."""
    array: np.ndarray = np.frombuffer(buffer, dtype=dtype).reshape(shape, order=order)  # type: ignore[call-overload]
    return array


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes that Python 3 pickled as text for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"an encoding of {encoding}")
    return codecs.encode(text, encoding)


_reconstruct: Callable[..., Any] = np.zeros(0).__reduce__()[0]  # type: ignore[assignment]
_scalar: Callable[..., Any] = np.float64(0).__reduce__()[0]  # type: ignore[assignment]

# Functions by which NumPy's arrays are pickled; none of them runs anything that a file brings along.
ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
}
for _core in ("numpy.core", "numpy._core"):
    ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    ALLOWED[f"{_core}.numeric", "_frombuffer"] = _frombuffer


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler of dictionaries, lists, text and arrays, that refuses every other class and function."""

    def find_class(self, module: str, name: str) -> Any:
        found = ALLOWED.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"{module}.{name}, which is no array: files are not allowed to run code")
        return found


def read_pickle(path: Path, *, max_bytes: int = MAX_PICKLE_BYTES) -> Any:
    """Read a pickled dictionary of arrays, of Python 2 or 3, without running code from it.

    Args:
        path: the file.
        max_bytes: the largest allowed size of the file.

    Raises:
        ValueError: the file is larger or damaged, or holds anything but dictionaries, lists, text and arrays.
    """
    if path.stat().st_size > max_bytes:
        raise BadFile(f"{path} has {path.stat().st_size:,} bytes, more than {max_bytes:,}")
    try:
        with open(path, "rb") as file:
            return _ArrayUnpickler(file, encoding="latin1").load()
    except pickle.UnpicklingError as error:
        raise BadFile(f"{path} is damaged, or holds {error}") from error
    except Exception as error:  # a damaged pickle raises anything
        raise BadFile(f"{path} is damaged, or no pickled dictionary: {type(error).__name__}") from error


def read_hdf5(path: Path, *, max_bytes: int = MAX_HDF5_BYTES) -> np.ndarray:
    """Read the only array of an HDF5 file, under whatever name.

    Args:
        path: the file.
        max_bytes: the most that the array may take.

    Raises:
        ValueError: the file is damaged, holds several arrays or none, or no finite numbers; names the path.
    """
    import h5py  # here, because few data sets need it

    try:
        with h5py.File(path, "r") as file:
            arrays = [item for item in file.values() if isinstance(item, h5py.Dataset)]
            if len(arrays) != 1:
                raise BadFile(f"{path}: expected one array, found {len(arrays)}: {', '.join(file) or 'nothing'}")
            (array,) = arrays
            if array.dtype.kind not in "biuf":
                raise BadFile(f"{path}: expected numbers, found {array.dtype}")
            if array.size * array.dtype.itemsize > max_bytes:
                raise BadFile(f"{path} would take {array.size * array.dtype.itemsize:,} bytes, more than {max_bytes:,}")
            values = np.asarray(array[()])
    except (FileNotFoundError, PermissionError, BadFile):
        raise
    except Exception as error:  # h5py has several types for it
        raise BadFile(f"{path} is damaged, or no HDF5 file: {type(error).__name__}") from error
    if values.size == 0 or (values.dtype.kind == "f" and not np.isfinite(values).all()):
        raise BadFile(f"{path}: expected finite numbers, got {'none' if values.size == 0 else 'NaN or infinity'}")
    return values
