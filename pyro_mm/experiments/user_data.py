"""Data of the user for the command line: arrays by modality, in a file of NumPy."""

from __future__ import annotations

import difflib
import hashlib
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch
from ..recipes.kinds import Kind

SUFFIX = ".npz"
HELD_OUT = 0.2
"""Share of the rows that are test rows, where no file of test rows is given."""

MASK = "present"
LENGTHS = "lengths"

HOW_TO_WRITE = "Write one by np.savez(path, NAME=array, ..), with the rows of a modality in each array"


def is_file(dataset: str) -> bool:
    """Return True if the name of a data set is that of a file of arrays."""
    return dataset.endswith(SUFFIX)


def parse_kinds(text: str | None) -> dict[str, Kind]:
    """Read kinds of modalities from ``"rna=counts,notes=tokens"``.

    Raises:
        ValueError: a part of another form, or an unknown kind.
    """
    kinds: dict[str, Kind] = {}
    for part in () if text is None else text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        kind = next((kind for kind in get_args(Kind) if kind == value), None)
        if not name or kind is None or name in kinds:
            raise ValueError(
                f"--kinds: expected MODALITY=KIND, each modality once, separated by commas, got {part.strip()!r}; "
                f"kinds are {', '.join(get_args(Kind))}"
            )
        kinds[name] = kind
    return kinds


def digest_files(paths: Iterable[str | None]) -> str:
    """Return a digest of the bytes of files, by which a changed file is noticed."""
    whole = hashlib.sha256()
    for path in paths:
        if path is not None:
            with open(path, "rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()[:16]


def load_arrays(path: str, test: str | None, seed: int, kinds: Mapping[str, Kind]) -> tuple[Batch, Batch]:
    """Return training and test rows.

    Args:
        path: the file of the training rows.
        test: the file of the test rows; None holds out a fifth of the rows of ``path``.
        seed: decides which rows are held out.
        kinds: modality -> kind, of those whose kind was given.

    Raises:
        ValueError: a file that is damaged or of other modalities, a single modality or one without values, too few
            rows, or a class of the test rows that no training row has.
    """
    train = read_batch(Path(path))
    if len(train.names) < 2:
        raise ValueError(
            f"{path}: expected two modalities at least, as each is evaluated given the others, got {train.names[0]!r} "
            "alone. One modality trains in Python, by mm.fit"
        )
    if test is None:
        count = round(HELD_OUT * train.size)
        if not 0 < count < train.size:
            raise ValueError(f"{path}: expected five rows at least, of which one is held out, got {train.size}")
        order = torch.randperm(train.size, generator=torch.Generator().manual_seed(seed))
        train, held_out = train[order[count:].sort().values], train[order[:count].sort().values]
    else:
        held_out = read_batch(Path(test))
        if set(held_out.names) != set(train.names):
            raise ValueError(
                f"{test}: expected the modalities of {path}, {', '.join(train.names)}, got {', '.join(held_out.names)}"
            )
        for name in train.names:
            _check_same_form(test, name, train, held_out)
    if unknown := [name for name in kinds if name not in train.names]:
        raise ValueError(f"--kinds: {path} has no modality {unknown[0]!r}, its modalities are {', '.join(train.names)}")
    for name in train.names:
        if not train.holds(name) or not bool(train.present[name].any()):
            raise ValueError(f"{path}: modality {name!r} has no values in any training row: leave it out of the file")
    _check_classes(train, held_out, kinds)
    return train, held_out


def read_batch(path: Path) -> Batch:
    """Read a batch from an npz file, without unpickling anything.

    An array ``NAME`` has the values of a modality, ``(N, ..)``; ``NAME.present`` its mask ``(N,)``, and
    ``NAME.lengths`` the lengths of its sequences. Floats become float32.

    Raises:
        ValueError: the file is damaged, holds an array of objects, a mask or lengths without values, or arrays that do
            not fit together; the message names the file.
    """
    arrays = _read_arrays(path)
    columns: Mapping[str, dict[str, np.ndarray]] = {"": {}, MASK: {}, LENGTHS: {}}
    for key, array in arrays.items():
        name, dot, what = key.rpartition(".")
        if dot and what in columns:
            columns[what][name] = array
        else:
            columns[""][key] = array.astype(np.float32) if array.dtype.kind == "f" else array
    alone = [f"{name}.{what}" for what in (MASK, LENGTHS) for name in columns[what] if name not in columns[""]]
    if alone or not columns[""]:
        found = f"{alone[0]} without values of it" if alone else "none"
        raise ValueError(f"{path}: expected an array for each modality, named by it, got {found}. {HOW_TO_WRITE}")
    for name, array in columns[""].items():
        _check_array(path, name, array)
    try:
        return Batch(columns[""], present=columns[MASK], lengths=columns[LENGTHS])
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file. Raises a ValueError that names the file and what is wrong with it."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty. {HOW_TO_WRITE}")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path}: not a file of arrays as np.savez writes it, or a part of one. {HOW_TO_WRITE}")
    arrays: dict[str, np.ndarray] = {}
    name = ""
    try:
        with np.load(path, allow_pickle=False) as held:
            for name in held.files:
                arrays[name] = held[name]
    except OSError as error:
        raise ValueError(f"{path}: it cannot be read: {error}") from error
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        if "allow_pickle" in str(error):
            raise ValueError(
                f"{path}: the array {name!r} holds Python objects and not numbers: give it a type of numbers, as by "
                "array.astype(float), and write the file again"
            ) from error
        raise ValueError(f"{path}: the file is damaged, {error}: write it again") from error
    return arrays


def _check_array(path: Path, name: str, array: np.ndarray) -> None:
    """Raise a ValueError for an array whose name or values cannot be those of a modality."""
    stem, dot, ending = name.rpartition(".")
    if not name or dot or "/" in name:
        guess = difflib.get_close_matches(ending, (MASK, LENGTHS), n=1, cutoff=0.5)
        hint = f", do you mean {stem}.{guess[0]}?" if dot and guess else ": give it another name"
        raise ValueError(
            f"{path}: the array {name!r} has no name of a modality, which has no dot and no slash in it; NAME.{MASK} "
            f"is the mask of NAME and NAME.{LENGTHS} are its lengths{hint}"
        )
    if array.dtype.kind == "u" and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise ValueError(f"{path}: modality {name!r}: expected integers below 2**63, got {array.max()}")
    if array.dtype.kind == "f" and array.ndim:
        infinite = np.isinf(array).any(tuple(range(1, array.ndim))).nonzero()[0]
        if infinite.size:
            raise ValueError(
                f"{path}: modality {name!r}: {len(infinite)} of {len(array)} rows have infinite values (the first is "
                f"row {infinite[0]}): write finite ones, or NaN in the whole row if it is missing"
            )


def with_option(error: ValueError, path: str) -> ValueError:
    """Return an error about the kind of a modality with the option that says it, and any other error as it is."""
    if "present=" in str(error):
        return ValueError(f"{path}: {error}. In a file this mask is the array NAME.{MASK}")
    if "networks=" not in str(error):
        return error
    return ValueError(
        f"{path}: {error}. On the command line a kind is given by --kinds MODALITY=KIND; with networks of your own "
        "train in Python, by mm.fit"
    )


def label_names(batch: Batch) -> list[str]:
    """Return the modalities that are one class per row, which others can predict; none if there are no others."""
    return [name for name in batch if len(batch.names) > 1 and batch.holds(name) and _is_class(batch[name])]


def image_name(batch: Batch) -> str | None:
    """Return the first modality of grey or colour images; None if there is none."""
    for name in batch:
        if not batch.holds(name) or name in batch.lengths or not batch[name].is_floating_point():
            continue
        shape = batch[name].shape[1:]
        if len(shape) == 2 or (len(shape) == 3 and shape[0] == 3):
            return name
    return None


def _is_class(values: Tensor) -> bool:
    return values.dim() == 1 and not values.is_floating_point() and values.dtype != torch.bool


def _check_same_form(path: str, name: str, train: Batch, test: Batch) -> None:
    """Raise a ValueError that names the file if a modality has another form among the test rows."""
    if not (train.holds(name) and test.holds(name)):
        return
    forms = []
    for batch in (train, test):
        values, is_sequence = batch[name], name in batch.lengths
        shape = tuple(values.shape[2 if is_sequence else 1 :])
        kind = "floats" if values.is_floating_point() else "integers"
        forms.append(f"{kind} of shape {shape} per {'step' if is_sequence else 'row'}")
    if forms[0] != forms[1]:
        raise ValueError(f"{path}: modality {name!r}: expected {forms[0]}, as in the training rows, got {forms[1]}")


def _check_classes(train: Batch, test: Batch, kinds: Mapping[str, Kind]) -> None:
    """Raise a ValueError for a class or token of the test rows that is above all of the training rows."""
    for name in train.names:
        if not (train.holds(name) and test.holds(name)):
            continue
        known, asked = train[name], test[name][test.present[name]]
        is_numbered = _is_class(known) or kinds.get(name, "tokens" if name in train.lengths else "") == "tokens"
        if is_numbered and asked.numel() and int(asked.max()) > int(known.max()):
            raise ValueError(
                f"modality {name!r}: {int(asked.max())} is among the test rows, and the largest number of the training "
                f"rows is {int(known.max())}: no training row has it. Give other test rows by --test, or leave rows of "
                "such classes out"
            )
