"""Public sets in the formats in which they are given out: SVHN, CelebA and PolyMNIST. None is downloaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from ..batch.batch import Batch
from ..utils.arguments import check_choice, check_integer, check_names
from ..utils.global_state import preserve_process_settings
from .files import BadFile, Directory, check_inside, check_rows, located, read_lines
from .image_files import Pictures, read_rgb
from .images import Split
from .pairing import generator

Rows = tuple[int | None, int | None]


PIXELS = (32, 32, 3)
MOST_ROWS = 1_000_000  # of one file, which are 3 GB


def svhn(directory: Directory = None) -> Split:
    """House numbers, cropped to one digit: 73,257 and 26,032 of them (Netzer et al. 2011). Non-commercial use only.

    Modalities: ``image``, float32 ``(3, 32, 32)`` in [0, 1], 12 kB a row, and ``label``, 0 to 9.

    Args:
        directory: holds ``svhn/train_32x32.mat`` and ``svhn/test_32x32.mat``, MATLAB files with ``X``
            ``(32, 32, 3, N)`` of bytes and ``y`` ``(N, 1)``, where 10 stands for the digit 0.

    Raises:
        FileNotFoundError, ValueError: a file is not there, or not of that format.
    """
    paths = located("svhn", ["train_32x32.mat", "test_32x32.mat"], "svhn", directory)
    train, test = (_cropped(path) for path in paths)
    return train, test


def _cropped(path: Path) -> Batch:
    with preserve_process_settings():
        from scipy.io import loadmat, whosmat  # here, because it takes a second

    try:
        found = {name: (kind, shape) for name, shape, kind in whosmat(path)}
        if "X" not in found or "y" not in found:
            raise BadFile(f"{path}: expected the arrays X and y, found {list(found)}")
        kind, shape = found["X"]
        rows = math.prod(found["y"][1])
        if kind != "uint8" or shape != (*PIXELS, rows):
            raise BadFile(f"{path}: expected X of bytes and shape {(*PIXELS, rows)}, got {kind} {shape}")
        if not 1 <= rows <= MOST_ROWS:
            raise BadFile(f"{path}: expected 1 to {MOST_ROWS:,} rows, got {rows:,}")
        held = loadmat(path, variable_names=["X", "y"])
    except (FileNotFoundError, PermissionError, BadFile):
        raise
    except Exception as error:  # scipy has a dozen types for it
        raise ValueError(f"{path} is damaged, or no MATLAB file up to version 7: {type(error).__name__}") from error
    images, labels = held["X"], held["y"].reshape(-1).astype(np.int64)
    if labels.min() < 1 or labels.max() > 10:
        raise ValueError(f"{path}: expected labels from 1 to 10, got {labels.min()} to {labels.max()}")
    pixels = np.ascontiguousarray(images.transpose(3, 2, 0, 1), np.float32)
    return Batch({"image": torch.from_numpy(pixels).div_(255), "label": torch.from_numpy(labels % 10)})


def celeba(
    directory: Directory = None,
    *,
    size: int = 64,
    crop: int | None = 148,
    attributes: Sequence[str] | None = None,
    held_out: Literal["test", "validation"] = "test",
    rows: Rows = (20_000, 2_000),
) -> Split:
    """The first rows of :func:`celeba_pictures`, in memory.

    Args:
        directory, size, crop, attributes, held_out: those of :func:`celeba_pictures`.
        rows: how many, of training and held-out; None for all. A row takes 12 * size**2 bytes, 49 kB at 64 pixels.
    """
    rows = check_rows(rows)
    both = celeba_pictures(directory, size=size, crop=crop, attributes=attributes, held_out=held_out)
    return both[0].batch(rows[0]), both[1].batch(rows[1])


def celeba_pictures(
    directory: Directory = None,
    *,
    size: int = 64,
    crop: int | None = 148,
    attributes: Sequence[str] | None = None,
    held_out: Literal["test", "validation"] = "test",
) -> tuple[Pictures, Pictures]:
    """Faces and 40 binary attributes: 162,770 for training, 19,867 for validation, 19,962 for test; read from disk.

    Modalities: ``image``, float32 ``(3, size, size)`` in [0, 1], and ``attributes``, float32 0 or 1, ``(A,)``, where
    the file has -1 or 1. Liu et al. 2015 (arXiv 1411.7766). For research that is not commercial.

    Args:
        directory: holds ``celeba/`` with ``img_align_celeba/*.jpg``, ``list_attr_celeba.txt`` (the number of rows, the
            names of the attributes, then a file and its attributes a line) and ``list_eval_partition.txt`` (a file and
            0, 1 or 2 a line: training, validation, test).
        size: the side of the picture in pixels.
        crop: the side of the square cut out of the middle of the 178 x 218 pixels first; None for all of it, squeezed.
        attributes: names of those to keep, in this order; None for all.
        held_out: which rows to return beside the training ones.

    Raises:
        FileNotFoundError, ValueError: a file is not there or not of that format, or an attribute is unknown.
    """
    check_choice("held_out", held_out, ("test", "validation"))
    check_integer("size", size, least=1)
    if crop is not None:
        check_integer("crop", crop, least=1)
    names = ["img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"]
    folder, listed, partition = located("celeba", names, "celeba", directory)
    known, table = _attributes(listed)
    chosen = known if attributes is None else list(check_names("attributes", attributes, least=1, what="attribute"))
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"unknown attributes {', '.join(unknown)}: {listed} has {', '.join(known)}")
    columns = [known.index(name) for name in chosen]
    parts = _partition(partition)
    check_inside(partition, parts)

    def split(part: str) -> Pictures:
        files = [file for file, which in parts.items() if which == part and file in table]
        if not files:
            raise ValueError(f"{partition} has no rows of part {part} that {listed} has too")
        if absent := [file for file in (files[0], files[-1]) if not (folder / file).is_file()]:
            raise FileNotFoundError(f"celeba: {partition} names {absent[0]}, which is not in {folder}")
        values = torch.from_numpy(np.stack([table[file][columns] for file in files]).astype(np.float32))
        return Pictures({"image": [folder / f for f in files]}, partial(read_rgb, size=size, crop=crop), {
            "attributes": values
        })  # fmt: skip

    return split("0"), split("2" if held_out == "test" else "1")


def _partition(path: Path) -> dict[str, str]:
    """File -> the number of its part."""
    rows = [line.split() for line in read_lines(path) if line.strip()]
    for row in rows:
        if len(row) != 2 or row[1] not in ("0", "1", "2"):
            raise ValueError(f"{path}: expected a file and 0, 1 or 2, got {' '.join(row)[:60]!r}")
    return {file: part for file, part in rows}


def _attributes(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the attributes, and file -> whether it has each of them."""
    lines = read_lines(path)
    if len(lines) < 3 or not lines[0].strip().isdigit():
        raise ValueError(f"{path}: expected the number of rows, the names of the attributes, and the rows")
    names, rows = lines[1].split(), [line.split() for line in lines[2:] if line.strip()]
    if len(rows) != int(lines[0]):
        raise ValueError(f"{path}: expected {int(lines[0])} rows, as its first line says, got {len(rows)}")
    for row in rows:
        if len(row) != 1 + len(names) or not set(row[1:]) <= {"-1", "1"}:
            raise ValueError(f"{path}: expected a file and {len(names)} times -1 or 1, got {' '.join(row)[:60]!r}")
    return names, {row[0]: np.array([value == "1" for value in row[1:]]) for row in rows}


def polymnist(directory: Directory = None, *, views: int | None = None, rows: Rows = (None, None)) -> Split:
    """The first rows of :func:`polymnist_pictures`, in memory.

    Args:
        directory, views: those of :func:`polymnist_pictures`.
        rows: how many, of training and test; None for all. A row of five views takes 47 kB: all of them 3.3 GB.
    """
    rows = check_rows(rows)
    both = polymnist_pictures(directory, views=views)
    return both[0].batch(rows[0]), both[1].batch(rows[1])


def polymnist_pictures(directory: Directory = None, *, views: int | None = None) -> tuple[Pictures, Pictures]:
    """Five digits of one class on five photographs: 60,000 and 10,000 rows (Sutter et al. 2021, arXiv 2105.02470).

    Modalities ``m0`` to ``m4``, float32 ``(3, 28, 28)`` in [0, 1], and the covariate ``label``. The rows come in an
    order drawn under seed 0. Under what terms, its authors have to say.

    Args:
        directory: holds ``MMNIST/train/m0/0.7.png`` and so on: split, view, number within its class, class. Files of
            one name go together.
        views: how many, from ``m0`` on; None for all that are there.

    Raises:
        FileNotFoundError, ValueError: a folder is not there, or its views do not have the same files.
    """
    parts = located("polymnist", ["train", "test"], "MMNIST", directory)
    if views is None:
        views = sum(1 for folder in parts[0].glob("m[0-9]*") if folder.is_dir())
    if check_integer("views", views, least=0) < 1:
        raise FileNotFoundError(f"polymnist: there is no folder m0 in {parts[0]}")
    train, test = (_views(folder, views, part) for part, folder in enumerate(parts))
    return train, test


def _views(folder: Path, views: int, part: int) -> Pictures:
    names: list[str] | None = None
    for m in range(views):
        found = sorted(path.name for path in (folder / f"m{m}").glob("*.png"))
        if not found:
            raise FileNotFoundError(f"polymnist: there is no {folder / f'm{m}'} with files like 0.7.png")
        if names is not None and found != names:
            odd = sorted(set(found) ^ set(names))
            raise ValueError(f"{folder}: m{m} and m0 do not have the same files; {odd[0]} is in one of them")
        names = found
    names = [(names or [])[i] for i in generator(0, part).permutation(len(names or []))]
    labels = []
    for name in names:
        fields = name.split(".")
        if len(fields) != 3 or not fields[1].isdigit():
            raise ValueError(f"{folder}: expected files named NUMBER.CLASS.png, found {name}")
        labels.append(int(fields[1]))
    paths = {f"m{m}": [folder / f"m{m}" / name for name in names] for m in range(views)}
    return Pictures(paths, read_rgb, covariates={"label": torch.tensor(labels)})
