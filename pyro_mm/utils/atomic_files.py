"""Files written as a whole: a reader sees the old content or the new one, never a mixture."""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

NAME_LENGTH = (
    100  # characters of a file's name that its temporary and lock files repeat: names have a limit of their own
)


def replace_file(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: after a kill, a full disk or an error the old file is still there.

    The bytes go to a temporary file of a unique name in the same folder, which then takes the file's place. The file
    and its folder are synchronised with the disk. If two processes write to one path, the last one wins. Symbolic
    links are followed, and the permissions of the old file are kept. A device or a pipe is written to directly.

    Args:
        path: the file; its folder must exist.
        write: writes the content to an open binary file.

    Raises:
        OSError: the file cannot be written. The temporary file has been removed.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file() and not target.is_dir():  # a device or a pipe: nothing to replace
        with open(target, "wb") as file:
            write(file)
        return

    temporary = hidden_sibling(target, f"{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            _synchronise(file.fileno())
        with suppress(OSError):  # there is no old file, or the file system has no permissions
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror or error}") from error
        raise

    _synchronise_folder(target.parent)


def replace_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 and without translating line ends.

    Args:
        path: the file; its folder must exist.
        text: its content.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file(path, lambda file: file.write(text.encode()))


def remove_temporary_files(target: Path) -> None:
    """Remove the temporary files of processes that were killed while they wrote to ``target``.

    Call it only while no other process writes to that path (see :func:`pyro_mm.utils.locks.lock_path`).
    """
    temporary = re.compile(re.escape(hidden_sibling(target, "").name) + r"\d+-[0-9a-f]{8}\.tmp")
    for path in target.parent.iterdir():
        if temporary.fullmatch(path.name):
            path.unlink(missing_ok=True)


def hidden_sibling(target: Path, suffix: str) -> Path:
    """Return the path ``.<name>.<suffix>`` beside a file, with its name cut to :data:`NAME_LENGTH` characters."""
    return target.with_name(f".{target.name[:NAME_LENGTH]}.{suffix}")


def _synchronise(descriptor: int) -> None:
    """Flush an open file to the disk, if the file system can."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise


def _synchronise_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, if the system can."""
    with suppress(OSError):  # Windows cannot open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
