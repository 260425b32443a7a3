"""Tensors in files, read without running any code from them, and compared with the modules that they are for."""

from __future__ import annotations

import errno
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .atomic_files import replace_file

READABLE = (Tensor, nn.Parameter, bool, int, float, complex, str, bytes, type(None))
MAX_DIFFERENCES = 5  # differences that a message names


@runtime_checkable
class OpenFile(Protocol):
    """An open binary file, such as ``io.BytesIO`` or one of ``tempfile``."""

    def read(self, size: int = -1, /) -> Any: ...
    def write(self, data: Any, /) -> Any: ...
    def seek(self, offset: int, whence: int = 0, /) -> Any: ...
    def tell(self) -> int: ...


# -- writing ------------------------------------------------------------------------------------------------------


def save_tensors(path: str | Path | OpenFile, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, text and containers of them to one file.

    Args:
        path: the file, which is replaced atomically; or an open binary file, which is written to.
        state: name -> value.

    Raises:
        TypeError: an entry has a type that :func:`load_tensors` could not read again. Nothing has been written.
        OSError: the file cannot be written; the message names its path.
    """
    _check_readable("", state)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own writer, in place of the error of the system that made it fail
            cause = error.__context__
            if isinstance(cause, OSError) and cause.errno is not None:
                raise OSError(cause.errno, os.strerror(cause.errno)) from error
            raise OSError(errno.EIO, str(error)) from error

    if isinstance(path, str | Path):
        replace_file(path, write)
    else:
        write(path)  # type: ignore[arg-type]


def _check_readable(name: str, value: Any) -> None:
    """Raise a TypeError if torch could not read the value again without running code from the file."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_readable(f"{name}[{key!r}]", entry)
    elif type(value) in (list, tuple):
        for place, entry in enumerate(value):
            _check_readable(f"{name}[{place}]", entry)
    elif type(value) not in READABLE:
        buffer = io.BytesIO()
        try:
            torch.save(value, buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except Exception as error:
            raise TypeError(
                f"{name} is of type {type(value).__name__}, which could not be read again without running code from "
                "the file: keep tensors, numbers and text in the state of a module"
            ) from error


# -- reading ------------------------------------------------------------------------------------------------------


def load_tensors(path: str | Path | OpenFile, what: str) -> dict[str, Any]:
    """Read a file of :func:`save_tensors` onto the CPU, without running any code from it.

    Args:
        path: the file, or an open binary file that can be read from any position.
        what: the kind of file that is expected, for the error message.

    Returns:
        name -> value.

    Raises:
        OSError: the file does not exist, or cannot be opened.
        ValueError: the file is cut off, damaged or of another kind.
    """
    if isinstance(path, str | Path):
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no {path}: expected {what}")
        with open(path, "rb"):  # a file that cannot be opened is an OSError, and not damaged
            pass

    try:
        reason = _reason_unreadable(path)
        file: Any = path
        state = None if reason else torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch has a dozen types for it, with advice that is wrong here
        raise ValueError(f"{path} is damaged, or not {what}: it cannot be read ({type(error).__name__})") from error

    if not isinstance(state, dict):
        reason = reason or f"it holds a {type(state).__name__}"
        raise ValueError(f"{path} is damaged, or not {what}: {reason}")
    return state


def _reason_unreadable(path: str | Path | OpenFile) -> str:
    """Return the reason that a file cannot be one of :func:`save_tensors`; empty if it may be one."""
    start = 0 if isinstance(path, str | Path) else path.tell()
    try:
        return _reason_bad_archive(path)
    finally:
        if not isinstance(path, str | Path):
            path.seek(start)


def _reason_bad_archive(path: str | Path | OpenFile) -> str:
    """Return the fault of a file as an archive of ``torch.save``; empty if there is none. Moves an open file."""
    if not zipfile.is_zipfile(path):
        return "it is cut off, or was written by something else"
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            return "its parts are compressed, which torch.save never does"
        bad = archive.testzip()  # torch itself does not compare the checksums
    return "" if bad is None else f"the check sum of its part {bad} is wrong"


# -- into modules -------------------------------------------------------------------------------------------------


def describe_mismatch(found: Any, module: nn.Module, *, cast: bool = False) -> str:
    """Compare a saved ``state_dict`` with the module that it is for, by name, shape and dtype.

    Names are not compared if a module of the user's own translates them while it loads.

    Args:
        found: name -> tensor, as read from a file.
        module: the module to be loaded.
        cast: accept another dtype if the module's can hold its numbers (float64 holds float32, but not complex64).

    Returns:
        The first few differences in words; empty if there is none.
    """
    if not isinstance(found, Mapping):
        return f"expected names and tensors, found a {type(found).__name__}"

    expected = module.state_dict()
    differences: list[str] = []
    if not any(map(_translates_names, module.modules())):
        differences += [f"{name} is missing" for name in expected if name not in found]
        differences += [f"{name} is unknown here" for name in found if name not in expected]
    for name, here in expected.items():
        if name in found and isinstance(here, Tensor) and not is_lazy(here):
            text = describe_tensor_mismatch(found[name], here, cast=cast)
            differences += [f"{name} is {text}"] if text else []

    num_unnamed = len(differences) - MAX_DIFFERENCES
    more = f", and {num_unnamed} more" if num_unnamed > 0 else ""
    return "; ".join(differences[:MAX_DIFFERENCES]) + more


def _translates_names(module: nn.Module) -> bool:
    """Return True if a module reads its ``state_dict`` in a way of its own."""
    overrides = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    is_of_torch = type(module).__module__.startswith("torch.")
    return bool(module._load_state_dict_pre_hooks) or (overrides and not is_of_torch)


def describe_tensor_mismatch(found: Any, here: Tensor, *, cast: bool = False) -> str:
    """Compare a saved tensor with the one that it is to replace.

    Args:
        found: the saved value.
        here: the tensor of the module.
        cast: accept another dtype if ``here`` can hold its numbers.

    Returns:
        The difference in words; empty if there is none.
    """
    if not isinstance(found, Tensor):
        return f"a {type(found).__name__}, and not a tensor"
    if here.is_meta:
        return "to go to the meta device, which holds no numbers: move the module first, to_empty(device=..)"
    if found.layout != torch.strided or found.is_quantized:
        return f"a tensor of layout {found.layout}, and not a dense one"
    fits = torch.can_cast(found.dtype, here.dtype) if cast else found.dtype == here.dtype
    if found.shape == here.shape and fits:
        return ""
    return f"{_dtype_and_shape(found)}, and not {_dtype_and_shape(here)}"


def load_modules(modules: Sequence[nn.Module], states: Sequence[Mapping[str, Any]]) -> None:
    """Load all modules or none: if one of them refuses its state, those before it are restored.

    Args:
        modules: the modules to load.
        states: one ``state_dict`` per module.

    Raises:
        Exception: the error of the module that refused its state.
    """
    before = [{name: _copy(x) for name, x in module.state_dict().items()} for module in modules]
    try:
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
    except BaseException:
        for module, state in zip(modules, before, strict=True):
            module.load_state_dict(state)
        raise


def _dtype_and_shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) and not is_lazy(x) else x
