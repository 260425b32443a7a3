"""Files of data sets: where they are, and reading them within bounds."""

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

MOST = 2**31  # bytes of the arrays of one file
SLACK = 2**16  # bytes by which a compressed file may be longer than what is in it


def data_folder(directory: Directory) -> Path | None:
    """Return the folder of the data files, by default that of ``PYRO_MM_DATA``; None where neither is given."""
    if directory is not None:
        return check_path("directory", directory).expanduser()
    named = os.environ.get("PYRO_MM_DATA")
    return Path(named).expanduser() if named else None


def check_rows(rows: Any) -> tuple[int | None, int | None]:
    """Return how many rows of training and of the others are wanted, each None for all or a number from 1 on.

    Raises:
        TypeError, ValueError: anything else than two such numbers.
    """
    if not isinstance(rows, tuple | list) or len(rows) != 2:
        raise TypeError(f"expected rows to be two numbers or None, (training, others), got {describe(rows)}")
    train, others = (None if n is None else check_integer("every number in rows", n, least=1) for n in rows)
    return train, others


def located(what: str, files: Sequence[str], folder: str, directory: Directory) -> list[Path]:
    """The paths of files (or folders), all in DIRECTORY/folder or all in DIRECTORY itself.

    Args:
        what: the data set, for the message.
        files: their names, relative to the folder.
        folder: that of the data set.
        directory: DIRECTORY; by default what the environment variable ``PYRO_MM_DATA`` names.

    Raises:
        FileNotFoundError: they are not there; says which, and where they should be.
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


def arrays(path: Path, wanted: Mapping[str, Shape], texts: Sequence[str] = ()) -> list[np.ndarray]:
    """Read arrays of an npz file, of which nothing is unpickled.

    Sizes and shapes are compared before anything is decompressed: a small file cannot fill the memory.

    Args:
        path: the file.
        wanted: name of an array -> its shape, where a letter stands for any size, the same wherever it stands.
        texts: names of those that hold text; all others hold finite numbers.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is damaged, lacks one of them, or has one of another shape or kind, with its path.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if absent := [name for name in wanted if name not in members]:
                raise BadFile(f"{path} lacks {', '.join(absent)}: it holds {', '.join(members)}")
            total = sum(members[name].file_size for name in wanted)
            if total > MOST:
                raise BadFile(f"{path} would take {total:,} bytes of memory, more than {MOST:,}")
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


class BadFile(ValueError):
    """A file that is not what it should be; the message has its path."""


def _check_header(
    path: Path, name: str, file: IO[bytes], nbytes: int, wanted: Shape, text: bool, sizes: dict[str, int]
) -> None:
    """Compare the header of an array in an npz file with what is wanted; ``sizes`` collects those of letters."""
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


def unzipped(path: Path, most: int) -> bytes:
    """Read a file whole, and decompress it if gzip wrote it, up to a number of bytes.

    Raises:
        ValueError: it is longer, or damaged, with its path; no more than ``most`` bytes were held.
    """
    if path.stat().st_size > most + SLACK:
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


def check_inside(path: Path, names: Iterable[str]) -> None:
    """Raise a ValueError unless names that a file lists are those of files in one folder.

    Args:
        path: the file that lists them, for the message.
        names: neither absolute, nor with ``..`` or another folder in them, on any system.
    """
    for name in names:
        plain = name == PurePosixPath(name).name == PureWindowsPath(name).name and name not in ("", ".", "..")
        if not plain:
            raise ValueError(f"{path} names {name!r}, which leads out of its folder: expected names of files alone")


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file. Raises a ValueError with its path if it is no text."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged, or no text: {error}") from error
