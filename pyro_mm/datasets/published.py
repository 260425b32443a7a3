"""Loaders of public image sets in their published formats: SVHN, CelebA and PolyMNIST. Nothing is downloaded."""

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
from .files import BadFile, Directory, check_file_names, check_rows, locate_files, read_lines
from .image_files import Pictures, read_rgb
from .images import Split
from .pairing import numpy_generator

Rows = tuple[int | None, int | None]

SVHN_SHAPE = (32, 32, 3)
MAX_SVHN_ROWS = 1_000_000  # of one file: 3 GB


def svhn(directory: Directory = None) -> Split:
    """Load SVHN: photographs of house numbers, cropped to one digit.

    Modalities: ``image``, float32 ``(3, 32, 32)`` in [0, 1], 12 kB per row; ``label``, int64 ``()``, 0 to 9.
    For non-commercial use only.

    Args:
        directory: a folder with ``svhn/train_32x32.mat`` and ``svhn/test_32x32.mat``, MATLAB files with ``X``, bytes
            ``(32, 32, 3, N)``, and ``y`` ``(N, 1)``, where 10 stands for the digit 0; by default ``PYRO_MM_DATA``.

    Returns:
        (train, test), 73,257 and 26,032 rows; 900 MB and 320 MB in memory.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or of another format.

    References:
        Netzer et al. 2011, Reading Digits in Natural Images.
    """
    paths = locate_files("svhn", ["train_32x32.mat", "test_32x32.mat"], "svhn", directory)
    train, test = (read_svhn(path) for path in paths)
    return train, test


def read_svhn(path: Path, max_rows: int = MAX_SVHN_ROWS) -> Batch:
    """Read a MATLAB file of SVHN.

    Args:
        path: the file.
        max_rows: the most rows that it may have.

    Raises:
        ValueError: the file is damaged or of another format; names the path.
    """
    with preserve_process_settings():
        from scipy.io import loadmat, whosmat  # here, because it takes a second

    try:
        found = {name: (kind, shape) for name, shape, kind in whosmat(path)}
        if "X" not in found or "y" not in found:
            raise BadFile(f"{path}: expected the arrays X and y, found {list(found)}")
        kind, shape = found["X"]
        rows = math.prod(found["y"][1])
        if kind != "uint8" or shape != (*SVHN_SHAPE, rows):
            raise BadFile(f"{path}: expected X of bytes and shape {(*SVHN_SHAPE, rows)}, got {kind} {shape}")
        if not 1 <= rows <= max_rows:
            raise BadFile(f"{path}: expected 1 to {max_rows:,} rows, got {rows:,}")
        held = loadmat(path, variable_names=["X", "y"])
    except (FileNotFoundError, PermissionError, BadFile):
        raise
    except Exception as error:  # scipy has a dozen types for it
        raise ValueError(f"{path} is damaged, or no MATLAB file up to version 7: {type(error).__name__}") from error
    images = held["X"]
    labels = held["y"].reshape(-1).astype(np.int64)
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
    """Load the first rows of CelebA into memory.

    Modalities and terms are those of :func:`celeba_pictures`, which leaves the images on disk.

    Args:
        directory, size, crop, attributes, held_out: as in :func:`celeba_pictures`.
        rows: numbers of training and held-out rows; None for all. A row takes 12 * size**2 bytes, 49 kB at 64 pixels.

    Returns:
        (train, held out).

    Raises:
        FileNotFoundError, TypeError, ValueError: as in :func:`celeba_pictures`; or ``rows`` is no pair of counts.
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
    """Open CelebA, faces and 40 binary attributes, with the images left on disk until a minibatch needs them.

    Modalities: ``image``, float32 ``(3, size, size)`` in [0, 1]; ``attributes``, float32 ``(A,)``, 0 or 1, where the
    file has -1 or 1. For non-commercial research only.

    Args:
        directory: a folder with ``celeba/``, which holds ``img_align_celeba/*.jpg``, ``list_attr_celeba.txt`` (the
            number of rows, the names of the attributes, then per line a file and its attributes) and
            ``list_eval_partition.txt`` (per line a file and 0, 1 or 2: training, validation, test); by default
            ``PYRO_MM_DATA``.
        size: the side of the image in pixels.
        crop: the side of the centred square that is cut out of the 178 x 218 pixels first; None squeezes the whole
            image into a square.
        attributes: names of the attributes to keep, in this order; None for all 40.
        held_out: return the rows for ``"test"`` or for ``"validation"`` beside the training rows.

    Returns:
        (train, held out): 162,770 rows, and 19,962 for test or 19,867 for validation.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is of another format, or an attribute is unknown.

    References:
        Liu et al. 2015 (arXiv:1411.7766).
    """
    check_choice("held_out", held_out, ("test", "validation"))
    check_integer("size", size, least=1)
    if crop is not None:
        check_integer("crop", crop, least=1)
    names = ["img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"]
    folder, listed, partition = locate_files("celeba", names, "celeba", directory)
    known, table = _read_attributes(listed)
    chosen = known if attributes is None else list(check_names("attributes", attributes, least=1, what="attribute"))
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"unknown attributes {', '.join(unknown)}: {listed} has {', '.join(known)}")
    columns = [known.index(name) for name in chosen]
    parts = _read_partition(partition)
    check_file_names(partition, parts)

    def split(part: str) -> Pictures:
        files = [file for file, which in parts.items() if which == part and file in table]
        if not files:
            raise ValueError(f"{partition} has no rows of part {part} that {listed} has too")
        if absent := [file for file in (files[0], files[-1]) if not (folder / file).is_file()]:
            raise FileNotFoundError(f"celeba: {partition} names {absent[0]}, which is not in {folder}")
        values = torch.from_numpy(np.stack([table[file][columns] for file in files]).astype(np.float32))
        paths = {"image": [folder / file for file in files]}
        return Pictures(paths, partial(read_rgb, size=size, crop=crop), {"attributes": values})

    return split("0"), split("2" if held_out == "test" else "1")


def _read_partition(path: Path) -> dict[str, str]:
    """Read list_eval_partition.txt: file -> "0", "1" or "2". Raises a ValueError for another format."""
    rows = [line.split() for line in read_lines(path) if line.strip()]
    for row in rows:
        if len(row) != 2 or row[1] not in ("0", "1", "2"):
            raise ValueError(f"{path}: expected a file and 0, 1 or 2, got {' '.join(row)[:60]!r}")
    return {file: part for file, part in rows}


def _read_attributes(path: Path) -> tuple[list[str], dict[str, np.ndarray]]:
    """Read list_attr_celeba.txt: the names of the A attributes, and file -> booleans ``(A,)``.

    Raises:
        ValueError: the file has another format.
    """
    lines = read_lines(path)
    if len(lines) < 3 or not lines[0].strip().isdigit():
        raise ValueError(f"{path}: expected the number of rows, the names of the attributes, and the rows")
    names = lines[1].split()
    rows = [line.split() for line in lines[2:] if line.strip()]
    if len(rows) != int(lines[0]):
        raise ValueError(f"{path}: expected {int(lines[0])} rows, as its first line says, got {len(rows)}")
    for row in rows:
        if len(row) != 1 + len(names) or not set(row[1:]) <= {"-1", "1"}:
            raise ValueError(f"{path}: expected a file and {len(names)} times -1 or 1, got {' '.join(row)[:60]!r}")
    return names, {row[0]: np.array([value == "1" for value in row[1:]]) for row in rows}


def polymnist(directory: Directory = None, *, views: int | None = None, rows: Rows = (None, None)) -> Split:
    """Load the first rows of PolyMNIST into memory.

    Modalities and terms are those of :func:`polymnist_pictures`, which leaves the images on disk.

    Args:
        directory, views: as in :func:`polymnist_pictures`.
        rows: numbers of training and test rows; None for all. A row of five views takes 47 kB, all rows 3.3 GB.

    Returns:
        (train, test).

    Raises:
        FileNotFoundError, TypeError, ValueError: as in :func:`polymnist_pictures`; or ``rows`` is no pair of counts.
    """
    rows = check_rows(rows)
    both = polymnist_pictures(directory, views=views)
    return both[0].batch(rows[0]), both[1].batch(rows[1])


def polymnist_pictures(directory: Directory = None, *, views: int | None = None) -> tuple[Pictures, Pictures]:
    """Open PolyMNIST, digits of one class on five photographs, with the images left on disk.

    Modalities: ``m0`` to ``m4``, float32 ``(3, 28, 28)`` in [0, 1]. Covariate: ``label``, int64, 0 to 9. The order of
    the rows is random, under a fixed seed. Its licence is not known here: ask the authors.

    Args:
        directory: a folder with ``MMNIST/train/m0/0.7.png`` and so on (split, view, number within the class, class),
            where files of one name are one row; by default ``PYRO_MM_DATA``.
        views: the number of modalities, from ``m0`` on; None for all that are there.

    Returns:
        (train, test), 60,000 and 10,000 rows.

    Raises:
        FileNotFoundError: a folder is missing or empty.
        ValueError: the views do not hold the same files, or a file is not named NUMBER.CLASS.png.

    References:
        Sutter, Daunhawer & Vogt 2021 (arXiv:2105.02470).
    """
    parts = locate_files("polymnist", ["train", "test"], "MMNIST", directory)
    if views is None:
        views = sum(1 for folder in parts[0].glob("m[0-9]*") if folder.is_dir())
    if check_integer("views", views, least=0) < 1:
        raise FileNotFoundError(f"polymnist: there is no folder m0 in {parts[0]}")
    train, test = (_polymnist_split(folder, views, part) for part, folder in enumerate(parts))
    return train, test


def _polymnist_split(folder: Path, views: int, part: int) -> Pictures:
    """Open one split of PolyMNIST, in a random order under a seed of its own for each part."""
    by_view = [sorted(path.name for path in (folder / f"m{m}").glob("*.png")) for m in range(views)]
    for m, found in enumerate(by_view):
        if not found:
            raise FileNotFoundError(f"polymnist: there is no {folder / f'm{m}'} with files like 0.7.png")
        if found != by_view[0]:
            odd = sorted(set(found) ^ set(by_view[0]))
            raise ValueError(f"{folder}: m{m} and m0 do not have the same files; {odd[0]} is in one of them")

    names = [by_view[0][i] for i in numpy_generator(0, part).permutation(len(by_view[0]))]
    labels = []
    for name in names:
        fields = name.split(".")
        if len(fields) != 3 or not fields[1].isdigit():
            raise ValueError(f"{folder}: expected files named NUMBER.CLASS.png, found {name}")
        labels.append(int(fields[1]))

    paths = {f"m{m}": [folder / f"m{m}" / name for name in names] for m in range(views)}
    return Pictures(paths, read_rgb, covariates={"label": torch.tensor(labels)})
