"""Files that are replaced as a whole, and tensors read from them without running any code."""

from __future__ import annotations

import errno
import io
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

try:
    import fcntl
except ImportError:  # Windows: the last writer wins
    fcntl = None  # type: ignore[assignment]

READABLE = (Tensor, nn.Parameter, bool, int, float, complex, str, bytes, type(None))
SHORT = 100  # characters of a file's name in the names of those beside it, which have a limit too


@runtime_checkable
class OpenFile(Protocol):
    """A binary file that is open, such as ``io.BytesIO`` or one of ``tempfile``."""

    def read(self, size: int = -1, /) -> Any: ...
    def write(self, data: Any, /) -> Any: ...
    def seek(self, offset: int, whence: int = 0, /) -> Any: ...
    def tell(self) -> int: ...


def replace_file(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file as a whole: after a kill, a full disk or an error the old one is still there.

    The bytes go to a file of a unique name beside it, which then takes its place; both the file and its folder are
    synchronised with the disk. Of two processes that write to one path, the last one wins, and neither file is mixed.
    A link is followed, and the permissions of the old file are kept.

    Args:
        path: the file; its folder must exist.
        write: writes the content to an open binary file.

    Raises:
        OSError: the file cannot be written; the temporary file is gone.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():  # a device or a pipe: nothing to replace
        with open(target, "wb") as file:
            write(file)
        return
    beside = target.with_name(f".{target.name[:SHORT]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(beside, "xb") as file:
            write(file)
            file.flush()
            _synchronise(file.fileno())
        with suppress(OSError):  # there is no old file, or the file system has no permissions
            os.chmod(beside, stat.S_IMODE(target.stat().st_mode))
        os.replace(beside, target)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
        raise
    _synchronise_folder(target.parent)


def replace_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole, in UTF-8 and with the line ends that the text has."""
    replace_file(path, lambda file: file.write(text.encode()))


def save_tensors(path: str | Path | OpenFile, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, text and containers of them to one file, as a whole; or to an open binary file.

    Raises:
        TypeError: an entry is of another type, which :func:`load_tensors` would not read again.
        OSError: the file cannot be written, with its path.
    """
    _check_readable("", state)

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's own writer on a full disk
            raise OSError(errno.EIO, str(error)) from error

    if isinstance(path, str | Path):
        replace_file(path, write)
    else:
        write(path)  # type: ignore[arg-type]


def _check_readable(name: str, value: Any) -> None:
    """Raise a TypeError if torch would not read a value again without running code from the file."""
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


def load_tensors(path: str | Path | OpenFile, what: str) -> dict[str, Any]:
    """Read what :func:`save_tensors` wrote, to the CPU, without running any code from it.

    Args:
        path: the file, or an open binary one that can be read from any place of it.
        what: the kind of file that is expected, for the message.

    Raises:
        OSError: there is no file, or none that can be opened.
        ValueError: the file is cut off, damaged or of another kind.
    """
    if isinstance(path, str | Path):
        if not Path(path).exists():
            raise FileNotFoundError(f"there is no {path}: expected {what}")
        with open(path, "rb"):  # that it cannot be opened is no damage
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
    """Return the reason that a file cannot be one of :func:`save_tensors`, or an empty text."""
    start = 0 if isinstance(path, str | Path) else path.tell()
    try:
        return _reason_bad_archive(path)
    finally:
        if not isinstance(path, str | Path):
            path.seek(start)


def _reason_bad_archive(path: str | Path | OpenFile) -> str:
    if not zipfile.is_zipfile(path):
        return "it is cut off, or was written by something else"
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            return "its parts are compressed, which torch.save never does"
        bad = archive.testzip()  # torch itself does not compare the check sums
    return "" if bad is None else f"the check sum of its part {bad} is wrong"


def describe_mismatch(found: Any, module: nn.Module, *, cast: bool = False) -> str:
    """Compare a saved ``state_dict`` with the module that it is for, by name, shape and dtype.

    Names are not compared where a module of the user's own translates them while it loads.

    Args:
        found: name -> tensor, as read from a file.
        module: the one to be loaded.
        cast: whether another dtype will do, if it can hold the numbers (float64 those of float32, not of complex64).

    Returns:
        The first few differences in words, or an empty text.
    """
    if not isinstance(found, Mapping):
        return f"expected names and tensors, found a {type(found).__name__}"
    expected = module.state_dict()
    differences: list[str] = []
    if not any(map(_translates, module.modules())):
        differences += [f"{name} is missing" for name in expected if name not in found]
        differences += [f"{name} is unknown here" for name in found if name not in expected]
    for name, here in expected.items():
        if name in found and isinstance(here, Tensor) and not is_lazy(here):
            text = describe_tensor_mismatch(found[name], here, cast=cast)
            differences += [f"{name} is {text}"] if text else []
    more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
    return "; ".join(differences[:5]) + more


def _translates(module: nn.Module) -> bool:
    own = type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
    return bool(module._load_state_dict_pre_hooks) or (own and not type(module).__module__.startswith("torch."))


def describe_tensor_mismatch(found: Any, here: Tensor, *, cast: bool = False) -> str:
    """Compare a saved tensor with the one that it is to replace: a difference in words, or an empty text."""
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
    """Load all modules or none: if one of them refuses its state, those before it are put back."""
    before = [{name: _copy(x) for name, x in module.state_dict().items()} for module in modules]
    try:
        for module, state in zip(modules, states, strict=True):
            module.load_state_dict(state)
    except BaseException:
        for module, state in zip(modules, before, strict=True):
            module.load_state_dict(state)
        raise


@contextmanager
def lock_path(path: str | Path | None) -> Iterator[None]:
    """Hold a path for this process, by a lock on ``.<name>.lock`` beside it, which the system frees after a kill.

    The folder is made, so that one that cannot be written shows before any work is done, and removed again if nothing
    has come into it. Temporary files of processes
    that were killed while they wrote to this path are removed. Where the system has no such locks, the last writer
    wins. Nothing is done for None.

    Raises:
        ValueError: another process, or another call in this one, holds it. OSError: the folder cannot be written.
    """
    if path is None:
        yield
        return
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{path} is a folder: expected the name of a file")
    made = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = target.with_name(f".{target.name[:SHORT]}.lock")
    try:
        held = _acquire(lock, path)
    except OSError:
        if not target.exists():
            raise
        held = None  # a finished training can be read where nothing can be written
    try:
        if held is not None:
            _remove_temporary(target)
        yield
    finally:
        if held is not None:
            with suppress(OSError):
                lock.unlink()
            os.close(held)
        if made:
            with suppress(OSError):  # it is not empty
                target.parent.rmdir()


def _acquire(lock: Path, path: str | Path) -> int | None:
    """A descriptor that holds the lock; None where the system or the file system has none."""
    while True:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR, 0o666)
        if fcntl is None:
            os.close(descriptor)
            lock.unlink(missing_ok=True)
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise ValueError(
                f"{path} is in use: another training writes to it now. Wait for its end, or give another path"
            ) from None
        except OSError:
            os.close(descriptor)
            return None
        if _leads_to(lock, descriptor):
            return descriptor
        os.close(descriptor)  # its holder removed it between our two calls: take the new one


def _leads_to(path: Path, descriptor: int) -> bool:
    """Return if a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _remove_temporary(target: Path) -> None:
    """Remove what processes that were killed left of their writing to a path."""
    ours = re.compile(re.escape(f".{target.name[:SHORT]}.") + r"\d+-[0-9a-f]{8}\.tmp")
    for path in target.parent.iterdir():
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _synchronise(descriptor: int) -> None:
    """Put an open file on the disk, where the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _synchronise_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, where the system can."""
    with suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _dtype_and_shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


def _copy(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) and not is_lazy(x) else x
