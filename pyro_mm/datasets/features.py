"""Modalities that come as numbers: features of digits, of mice, and of people who speak.

With ``standardise`` every feature is less its mean over the training rows, divided by its standard deviation over
them; one that does not vary in them is only centred. Test rows are treated by the training rows' numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.arguments import check_choice, check_flag
from .files import Directory, Shape, arrays, located
from .images import Split
from .pairing import generator

STEPS = 20
MFEAT = ("fac", "fou", "kar", "mor", "pix", "zer")


def mfeat(directory: Directory = None, *, standardise: bool = True, seed: int = 0) -> Split:
    """Handwritten digits in six views, 1,600 and 400: UCI Multiple Features (van Breukelen et al. 1998; CC BY 4.0).

    Modalities, all float32: ``fac`` ``(216,)`` profile correlations, ``fou`` ``(76,)`` Fourier coefficients of the
    shape, ``kar`` ``(64,)`` Karhunen-Loève coefficients, ``mor`` ``(6,)`` morphology, ``pix`` ``(240,)`` averages of
    2 x 3 pixels, counts from 0 to 6, ``zer`` ``(47,)`` Zernike moments. Covariate: ``label``. 40 rows of each class,
    drawn under ``seed``, are the test rows, and the order is drawn with them.

    Args:
        directory: holds ``multiview/mfeat.npz`` with these arrays and ``y``.
        standardise: see the top of this module.
        seed: of the split.

    Raises:
        FileNotFoundError, ValueError: the file is not there or lacks an array.
    """
    check_flag("standardise", standardise)
    (path,) = located("mfeat", ["mfeat.npz"], "multiview", directory)
    *views, label = arrays(path, {name: ("rows", name) for name in MFEAT} | {"y": ("rows",)})
    rows = _split(label, 0.2, seed)
    return _batches(dict(zip(MFEAT, views, strict=True)), rows, standardise, {"label": label})


def nutrimouse(directory: Directory = None, *, standardise: bool = True, seed: int = 0) -> Split:
    """Genes and lipids of 40 mice, 30 and 10 (Martin et al. 2007, Hepatology 45:767; from a GPL package).

    Modalities, float32: ``gene`` ``(120,)`` log expressions, ``lipid`` ``(21,)`` percentages. Covariates, int64:
    ``genotype`` and ``diet``, 0, 1, .. in alphabetical order. One mouse of four of each genotype and diet, drawn under
    ``seed``, is a test row.

    Args:
        directory: holds ``multiview/nutrimouse.npz`` with arrays of these names.
        standardise: see the top of this module.
        seed: of the split.

    Raises:
        FileNotFoundError, ValueError: the file is not there or lacks an array.
    """
    check_flag("standardise", standardise)
    (path,) = located("nutrimouse", ["nutrimouse.npz"], "multiview", directory)
    groups = ("genotype", "diet")
    shapes: dict[str, Shape] = {"gene": ("rows", "genes"), "lipid": ("rows", "lipids")}
    gene, lipid, *groups_of = arrays(path, shapes | {name: ("rows",) for name in groups}, texts=groups)
    genotype, diet = (np.unique(group, return_inverse=True)[1] for group in groups_of)
    rows = _split(genotype * (diet.max() + 1) + diet, 0.25, seed)
    return _batches({"gene": gene, "lipid": lipid}, rows, standardise, {"genotype": genotype, "diet": diet})


def mosi(directory: Directory = None, *, standardise: bool = True) -> Split:
    """Utterances of CMU-MOSI, 1,447 and 752 (Zadeh et al. 2016, arXiv 1606.06259). For research only; not shipped.

    Modalities: ``text`` ``(100,)``, ``audio`` ``(73,)``, ``video`` ``(100,)``, float32, and ``label``, 1 where the
    sentiment is positive, else 0. These features were fitted with the training labels: accuracies on training rows
    say nothing.

    Args:
        directory: holds ``mosi/mosi_utterance.npz``: ``text_train`` and so on, ``y_train`` and ``y_test``.
        standardise: see the top of this module.

    Raises:
        FileNotFoundError, ValueError: the file is not there or lacks an array.
    """
    check_flag("standardise", standardise)
    (path,) = located("mosi", ["mosi_utterance.npz"], "mosi", directory)
    shapes: dict[str, Shape] = {name: (name,) for name in ("text", "audio", "video")}
    return _published(path, shapes | {"y": ()}, "test", standardise, np.int64)


def sequences(
    which: Literal["mmmo", "youtube", "pom"],
    directory: Directory = None,
    *,
    standardise: bool = True,
    held_out: Literal["test", "validation"] = "test",
) -> Split:
    """Videos of speakers, aligned in 20 steps, and how others rated them. Terms unstated; not shipped.

    Modalities, float32: ``audio`` ``(20, A)``, ``video`` ``(20, V)`` and ``label``, a rating ``()`` or several
    ``(L,)``. ICT-MMMO (Wöllmer et al. 2013): 220 training, 40 validation and 80 test rows, A = 74, V = 36, one
    rating; YouTube (Morency et al. 2011): 173, 36 and 60, A = 74, V = 36, L = 3; POM (Park et al. 2014): 600, 100 and
    203, A = 43, V = 41, L = 17. No text: the files lack it for training.

    Args:
        which: ``"mmmo"``, ``"youtube"`` or ``"pom"``.
        directory: holds ``mosi/<which>_mfn.npz``: ``audio_train``, ``video_train``, ``y_train``, and the same with
            ``_valid`` and ``_test``.
        standardise: see the top of this module; a feature is the same one at every step. Not the ratings.
        held_out: which rows to return beside the training ones.

    Raises:
        FileNotFoundError, ValueError: the file is not there or lacks an array, or a name is unknown.
    """
    check_choice("which", which, ("mmmo", "youtube", "pom"))
    check_choice("held_out", held_out, ("test", "validation"))
    check_flag("standardise", standardise)
    (path,) = located(which, [f"{which}_mfn.npz"], "mosi", directory)
    other = "test" if held_out == "test" else "valid"
    shapes: dict[str, Shape] = {name: (STEPS, name) for name in ("audio", "video")}
    ratings: Shape = () if which == "mmmo" else ("ratings",)
    return _published(path, shapes | {"y": ratings}, other, standardise, np.float32)


def _published(path: Path, shapes: dict[str, Shape], other: str, standardise: bool, label: type) -> Split:
    """Training rows and others of a file that has the split in the names of its arrays, ``y`` among them."""
    names = [name for name in shapes if name != "y"]
    wanted: dict[str, Shape] = {
        f"{n}_{part}": (part, *shape) for part in ("train", other) for n, shape in shapes.items()
    }
    held = dict(zip(wanted, arrays(path, wanted), strict=True))
    parts = [
        {name: held[f"{name}_{part}"] for name in names} | {"label": held[f"y_{part}"].astype(label)}
        for part in ("train", other)
    ]
    scaled = {name: _scaled(parts[0][name], [part[name] for part in parts], standardise) for name in names}
    train, test = (
        Batch({name: scaled[name][i] for name in names} | {"label": torch.from_numpy(part["label"])})
        for i, part in enumerate(parts)
    )
    return train, test


def _split(groups: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows, with the same share of test rows in every group, in an order drawn under the seed."""
    rng = generator(seed, 0)
    members = [rng.permutation(np.flatnonzero(groups == g)) for g in np.unique(groups)]
    counts = [round(share * len(member)) for member in members]
    test = np.concatenate([member[:n] for member, n in zip(members, counts, strict=True)])
    train = np.concatenate([member[n:] for member, n in zip(members, counts, strict=True)])
    return rng.permutation(train), rng.permutation(test)


def _batches(
    values: dict[str, np.ndarray],
    rows: tuple[np.ndarray, np.ndarray],
    standardise: bool,
    covariates: dict[str, np.ndarray],
) -> Split:
    scaled = {n: _scaled(x[rows[0]], [x[part] for part in rows], standardise) for n, x in values.items()}
    known = {name: torch.from_numpy(x.astype(np.int64)) for name, x in covariates.items()}
    train, test = (
        Batch({n: x[i] for n, x in scaled.items()}, covariates={n: x[part] for n, x in known.items()})
        for i, part in enumerate(rows)
    )
    return train, test


def _scaled(train: np.ndarray, parts: list[np.ndarray], standardise: bool) -> list[Tensor]:
    """Features ``(.., F)`` by mean and standard deviation of the training rows, and steps, if asked for."""
    if standardise:
        axes = tuple(range(train.ndim - 1))
        mean, deviation = train.mean(axes, np.float64), train.std(axes, np.float64)
        # of equal float32 numbers the deviation is rounding, not 0
        deviation[np.ptp(train, axes) == 0] = 1
        parts = [(part - mean) / deviation for part in parts]
    return [torch.from_numpy(part.astype(np.float32)) for part in parts]
