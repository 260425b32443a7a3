"""Where the files of a data set are, and what to say when they are not there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

Directory = str | os.PathLike[str] | None


def located(what: str, files: Sequence[str], folder: str, directory: Directory) -> list[Path]:
    """The paths of files (or folders), all in DIRECTORY/folder or all in DIRECTORY itself.

    Args:
        what: the data set, for the message.
        files: their names, relative to the folder.
        folder: that of the data set.
        directory: DIRECTORY; by default what the environment variable ``PYRO_MM_DATA`` names.

    Raises:
        FileNotFoundError: they are not there; says which, and where they should be.
    """
    given = directory if directory is not None else os.environ.get("PYRO_MM_DATA") or None
    root = None if given is None else Path(given).expanduser()
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


def arrays(path: Path, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of those names in an npz file, of which nothing is unpickled.

    Raises:
        ValueError: the file lacks one of them.
    """
    with np.load(path, allow_pickle=False) as held:
        if absent := [name for name in names if name not in held.files]:
            raise ValueError(f"{path} lacks {', '.join(absent)}: it holds {', '.join(held.files)}")
        return [held[name] for name in names]
