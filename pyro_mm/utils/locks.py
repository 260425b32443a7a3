"""Locks on paths, so that one process at a time writes to a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .atomic_files import hidden_sibling, remove_temporary_files

try:
    import fcntl
except ImportError:  # Windows: the last writer wins
    fcntl = None  # type: ignore[assignment]


@contextmanager
def lock_path(path: str | Path | None) -> Iterator[None]:
    """Reserve a path for this process while the context lasts.

    The lock is on the file ``.<name>.lock`` beside the path; the system frees it if the process is killed. The folder
    is created first, so that a folder that cannot be written to fails before any work is done; it is removed again if
    it is still empty at the end. Temporary files left by killed processes are removed. On systems without such locks
    nothing is reserved, and the last writer wins.

    Args:
        path: the file to be written; None reserves nothing.

    Raises:
        ValueError: the path is a folder, or another process, or another call in this one, holds it.
        OSError: the folder cannot be written to, and the file does not exist yet.
    """
    if path is None:
        yield
        return

    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise ValueError(f"{path} is a folder: expected the name of a file")
    is_new_folder = not target.parent.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = hidden_sibling(target, "lock")
    try:
        descriptor = _acquire(lock, path)
    except OSError:
        if not target.exists():
            raise
        descriptor = None  # a finished training can be read where nothing can be written

    try:
        if descriptor is not None:
            remove_temporary_files(target)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                lock.unlink()
            os.close(descriptor)
        if is_new_folder:
            with suppress(OSError):  # it is not empty
                target.parent.rmdir()


def _acquire(lock: Path, path: str | Path) -> int | None:
    """Return a file descriptor that holds the lock; None if the system or the file system has no locks."""
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
        if _is_still_at(lock, descriptor):
            return descriptor
        os.close(descriptor)  # its holder removed it between our two calls: take the new one


def _is_still_at(path: Path, descriptor: int) -> bool:
    """Return True if the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
