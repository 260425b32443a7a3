"""Finding the files of a data set, and reading them safely: no code is run, and sizes are checked first."""

from __future__ import annotations

import gzip
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import numpy as np

from ..utils.arguments import check_integer, check_path, describe

Directory = str | os.PathLike[str] | None
Shape = tuple[int | str, ...]

MAX_ARRAY_BYTES = 2**31  # of all arrays read from one file
GZIP_OVERHEAD = 2**16  # bytes by which a compressed file may be longer than its content


def data_folder(directory: Directory) -> Path | None:
    """Return the folder of the data files: ``directory``, else ``PYRO_MM_DATA``; None if neither is given."""
    if directory is not None:
        return check_path("directory", directory).expanduser()
    named = os.environ.get("PYRO_MM_DATA")
    return Path(named).expanduser() if named else None


def check_rows(rows: Any) -> tuple[int | None, int | None]:
    """Return the numbers of training and held-out rows to load, checked; None stands for all.

    Args:
        rows: two integers of at least 1, or None.

    Raises:
        TypeError: ``rows`` is no pair of integers or None.
        ValueError: a number is below 1.
    """
    if not isinstance(rows, tuple | list) or len(rows) != 2:
        raise TypeError(f"expected rows to be two numbers or None, (training, others), got {describe(rows)}")
    train, others = (None if n is None else check_integer("every number in rows", n, least=1) for n in rows)
    return train, others


def locate_files(what: str, files: Sequence[str], folder: str, directory: Directory) -> list[Path]:
    """Return the paths of files (or folders) that are all in DIRECTORY/folder, or all in DIRECTORY itself.

    Args:
        what: the name of the data set, for the message.
        files: names of the files.
        folder: the folder of the data set within DIRECTORY.
        directory: DIRECTORY; by default the folder named by the environment variable ``PYRO_MM_DATA``.

    Returns:
        One path per file.

    Raises:
        FileNotFoundError: files are missing; the message says which, and where they belong.
        TypeError, ValueError: the directory is no path.
    """
    root = data_folder(directory)
    places = [] if root is None else [root / folder, root]
    for place in places:
        paths = [place / file for file in files]
        if all(path.exists() for path in paths):
            return paths
    looked = "no directory was given"
    if root is not None:
        absent = [file for file in files if not (root / folder / file).exists()]
        looked = f"not all of it is in {root / folder} (which lacks {', '.join(absent)}) or in {root}"
    raise FileNotFoundError(
        f"{what}: {looked}. It is not downloaded: put {', '.join(files)} into DIRECTORY/{folder}, and give "
        "directory=DIRECTORY or set the environment variable PYRO_MM_DATA to DIRECTORY. data/README.md says more."
    )


def read_arrays(
    path: Path, wanted: Mapping[str, Shape], texts: Sequence[str] = (), *, max_bytes: int = MAX_ARRAY_BYTES
) -> list[np.ndarray]:
    """Read arrays of an npz file without unpickling anything.

    Sizes and shapes are checked before anything is decompressed, so that a small file cannot fill the memory.

    Args:
        path: the file.
        wanted: array name -> its shape; a string in a shape stands for any size, the same wherever it occurs.
        texts: names of the arrays that hold text; all others hold finite numbers.
        max_bytes: the most that all arrays may take.

    Returns:
        One array per entry of ``wanted``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is damaged, or an array is missing or has another shape or type; names the path.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if absent := [name for name in wanted if name not in members]:
                raise BadFile(f"{path} lacks {', '.join(absent)}: it holds {', '.join(members)}")
            total = sum(members[name].file_size for name in wanted)
            if total > max_bytes:
                raise BadFile(f"{path} would take {total:,} bytes of memory, more than {max_bytes:,}")
            sizes: dict[str, int] = {}
            for name, shape in wanted.items():
                with archive.open(members[name]) as file:
                    _check_header(path, name, file, members[name].file_size, shape, name in texts, sizes)
        with np.load(path, allow_pickle=False) as held:
            found = [held[name] for name in wanted]
    except (FileNotFoundError, PermissionError, BadFile):
        raise
    except Exception as error:  # zipfile, zlib and numpy have a dozen types for it
        raise ValueError(f"{path} is damaged, or no npz file: {type(error).__name__}") from error
    for name, array in zip(wanted, found, strict=True):
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise BadFile(f"{path}: {name} has values that are not finite")
    return found


def array_names(path: Path) -> set[str]:
    """Return the names of the arrays of an npz file. Raises a ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {member.removesuffix(".npy") for member in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise BadFile(f"{path} is damaged, or no npz file: {type(error).__name__}") from error


class BadFile(ValueError):
    """A file with unexpected content; the message names its path."""


def _check_header(
    path: Path, name: str, file: IO[bytes], nbytes: int, wanted: Shape, text: bool, sizes: dict[str, int]
) -> None:
    """Raise a BadFile unless the header of an array in an npz file has the wanted shape and type.

    Args:
        path: the npz file, for the message.
        name: the array.
        file: the array's member of the archive, at its start.
        nbytes: the uncompressed size of that member.
        wanted: the shape; strings stand for any size.
        text: the array has to hold text, not numbers.
        sizes: string in a shape -> its size; sizes that are new are added.
    """
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.kind not in ("U" if text else "biuf"):
        kind = "Python objects, which are not read" if dtype.hasobject else str(dtype)
        raise BadFile(f"{path}: expected {name} to hold {'text' if text else 'numbers'}, found {kind}")
    fits = len(shape) == len(wanted) and all(
        size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
        for size, want in zip(shape, wanted, strict=True)
    )
    if not fits or 0 in shape:
        known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter in wanted)
        expected = f"({', '.join(map(str, wanted))}){f' with {known}' if known else ''}"
        raise BadFile(f"{path}: expected {name} of shape {expected} and not empty, got {shape}")
    if math.prod(shape) * dtype.itemsize != nbytes - file.tell():
        raise BadFile(f"{path} is damaged: {name} has {nbytes - file.tell()} bytes, too few or too many for {shape}")


def read_decompressed(path: Path, most: int) -> bytes:
    """Read a whole file, decompressing it if it was written by gzip.

    Args:
        path: the file.
        most: the largest allowed size after decompression, in bytes.

    Raises:
        ValueError: the content is larger, or damaged; names the path. No more than ``most`` bytes were held.
    """
    if path.stat().st_size > most + GZIP_OVERHEAD:
        raise ValueError(f"{path} is too large: {path.stat().st_size:,} bytes, expected {most:,} at most")
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if compressed else open(path, "rb") as file:
            payload = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it or put the right file there") from error
    if len(payload) > most:
        raise ValueError(f"{path} is too large: it decompresses to more than the {most:,} bytes of the right file")
    return payload


def check_file_names(path: Path, names: Iterable[str]) -> None:
    """Raise a ValueError unless all names listed in a file are plain file names, on any system.

    Args:
        path: the file that lists them, for the message.
        names: names that must neither be absolute nor contain ``..`` or a folder.
    """
    for name in names:
        plain = name == PurePosixPath(name).name == PureWindowsPath(name).name and name not in ("", ".", "..")
        if not plain:
            raise ValueError(f"{path} names {name!r}, which leads out of its folder: expected names of files alone")


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file. Raises a ValueError that names its path if it is no UTF-8 text."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, or no text: {error}") from error
