"""Data sets of feature vectors: of handwritten digits, of mice, and of people speaking.

With ``standardise`` the mean of the training rows is subtracted from every feature, which is then divided by their
standard deviation; a feature that is constant in them is only centred. Test rows use the training rows' statistics.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.arguments import check_choice, check_flag
from .files import Directory, Shape, locate_files, read_arrays
from .images import Split
from .pairing import numpy_generator

STEPS = 20
MFEAT = ("fac", "fou", "kar", "mor", "pix", "zer")


def mfeat(directory: Directory = None, *, standardise: bool = True, seed: int = 0) -> Split:
    """Load UCI Multiple Features: six sets of features of handwritten digits.

    Modalities, float32: ``fac`` ``(216,)``, profile correlations; ``fou`` ``(76,)``, Fourier coefficients of the
    shape; ``kar`` ``(64,)``, Karhunen-Loève coefficients; ``mor`` ``(6,)``, morphology; ``pix`` ``(240,)``, averages
    of 2 x 3 pixels, counts from 0 to 6; ``zer`` ``(47,)``, Zernike moments. Covariate: ``label``, int64, 0 to 9.
    Licence: CC BY 4.0.

    Args:
        directory: a folder with ``multiview/mfeat.npz``, which holds these arrays and ``y``; by default
            ``PYRO_MM_DATA``.
        standardise: see the top of this module.
        seed: the seed of the split and of the order; 40 rows of each class are test rows.

    Returns:
        (train, test), 1,600 and 400 rows.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, lacks an array, or holds one of another shape.

    References:
        van Breukelen, Duin, Tax & den Hartog 1998, Kybernetika 34:381.
    """
    check_flag("standardise", standardise)
    (path,) = locate_files("mfeat", ["mfeat.npz"], "multiview", directory)
    *views, label = read_arrays(path, {name: ("rows", name) for name in MFEAT} | {"y": ("rows",)})
    rows = _stratified_split(label, 0.2, seed)
    return _build_split(dict(zip(MFEAT, views, strict=True)), rows, standardise, {"label": label})


def nutrimouse(directory: Directory = None, *, standardise: bool = True, seed: int = 0) -> Split:
    """Load nutrimouse: gene expressions and lipids of 40 mice.

    Modalities, float32: ``gene`` ``(120,)``, log expressions; ``lipid`` ``(21,)``, percentages. Covariates, int64:
    ``genotype`` and ``diet``, numbered from 0 in alphabetical order. From an R package under the GPL.

    Args:
        directory: a folder with ``multiview/nutrimouse.npz``, which holds arrays of these names; by default
            ``PYRO_MM_DATA``.
        standardise: see the top of this module.
        seed: the seed of the split and of the order; one mouse in four of each genotype and diet is a test row.

    Returns:
        (train, test), 30 and 10 rows.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, lacks an array, or holds one of another shape.

    References:
        Martin et al. 2007, Hepatology 45:767.
    """
    check_flag("standardise", standardise)
    (path,) = locate_files("nutrimouse", ["nutrimouse.npz"], "multiview", directory)
    groups = ("genotype", "diet")
    shapes: dict[str, Shape] = {"gene": ("rows", "genes"), "lipid": ("rows", "lipids")}
    gene, lipid, *groups_of = read_arrays(path, shapes | {name: ("rows",) for name in groups}, texts=groups)
    genotype, diet = (np.unique(group, return_inverse=True)[1] for group in groups_of)
    rows = _stratified_split(genotype * (diet.max() + 1) + diet, 0.25, seed)
    return _build_split({"gene": gene, "lipid": lipid}, rows, standardise, {"genotype": genotype, "diet": diet})


def mosi(directory: Directory = None, *, standardise: bool = True) -> Split:
    """Load CMU-MOSI: text, audio, video and sentiment of utterances.

    Modalities: ``text`` ``(100,)``, ``audio`` ``(73,)`` and ``video`` ``(100,)``, float32; ``label``, int64 ``()``,
    1 if the sentiment is positive, else 0. These features were fitted with the training labels, so that accuracies on
    training rows mean nothing. For research only; not shipped.

    Args:
        directory: a folder with ``mosi/mosi_utterance.npz``, which holds ``text_train``, ``text_test`` and so on,
            ``y_train`` and ``y_test``; by default ``PYRO_MM_DATA``.
        standardise: see the top of this module.

    Returns:
        (train, test), 1,447 and 752 rows.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged, lacks an array, or holds one of another shape.

    References:
        Zadeh et al. 2016 (arXiv:1606.06259).
    """
    check_flag("standardise", standardise)
    (path,) = locate_files("mosi", ["mosi_utterance.npz"], "mosi", directory)
    shapes: dict[str, Shape] = {name: (name,) for name in ("text", "audio", "video")}
    return _read_presplit(path, shapes | {"y": ()}, "test", standardise, np.int64)


def sequences(
    which: Literal["mmmo", "youtube", "pom"],
    directory: Directory = None,
    *,
    standardise: bool = True,
    held_out: Literal["test", "validation"] = "test",
) -> Split:
    """Load videos of speakers, as audio and video features at 20 aligned steps, and ratings of them.

    Modalities, float32: ``audio`` ``(20, A)``, ``video`` ``(20, V)`` and ``label``, one rating ``()`` or several
    ``(L,)``. There is no text, which the files lack for training rows. Licences are not stated; not shipped.

    ================ ======== ========== ==== == == =========================
    ``which``        training validation test A  V  ratings
    ================ ======== ========== ==== == == =========================
    ``"mmmo"``       220      40         80   74 36 1, ICT-MMMO
    ``"youtube"``    173      36         60   74 36 L = 3, YouTube
    ``"pom"``        600      100        203  43 41 L = 17, POM
    ================ ======== ========== ==== == == =========================

    Args:
        which: ``"mmmo"``, ``"youtube"`` or ``"pom"``.
        directory: a folder with ``mosi/<which>_mfn.npz``, which holds ``audio_train``, ``video_train``, ``y_train``
            and the same with ``_valid`` and ``_test``; by default ``PYRO_MM_DATA``.
        standardise: see the top of this module; statistics are taken over rows and steps. Ratings stay as they are.
        held_out: return the rows for ``"test"`` or for ``"validation"`` beside the training rows.

    Returns:
        (train, held out).

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the file is damaged or lacks an array, or ``which`` or ``held_out`` is unknown.

    References:
        Wöllmer et al. 2013 (ICT-MMMO); Morency et al. 2011 (YouTube); Park et al. 2014 (POM).
    """
    check_choice("which", which, ("mmmo", "youtube", "pom"))
    check_choice("held_out", held_out, ("test", "validation"))
    check_flag("standardise", standardise)
    (path,) = locate_files(which, [f"{which}_mfn.npz"], "mosi", directory)
    other = "test" if held_out == "test" else "valid"
    shapes: dict[str, Shape] = {name: (STEPS, name) for name in ("audio", "video")}
    ratings: Shape = () if which == "mmmo" else ("ratings",)
    return _read_presplit(path, shapes | {"y": ratings}, other, standardise, np.float32)


def _read_presplit(path: Path, shapes: dict[str, Shape], other: str, standardise: bool, label: type) -> Split:
    """Read a file whose arrays are named by modality and split, such as ``audio_train``.

    Args:
        path: the npz file.
        shapes: modality -> the shape of one row; ``y`` is the label.
        other: the split beside "train".
        standardise: standardise all modalities but the label.
        label: the NumPy type of the label.
    """
    names = [name for name in shapes if name != "y"]
    parts = ("train", other)
    wanted: dict[str, Shape] = {f"{n}_{part}": (part, *shape) for part in parts for n, shape in shapes.items()}
    arrays = dict(zip(wanted, read_arrays(path, wanted), strict=True))

    scaled = {
        name: _standardise(arrays[f"{name}_train"], [arrays[f"{name}_{part}"] for part in parts], standardise)
        for name in names
    }
    labels = [torch.from_numpy(arrays[f"y_{part}"].astype(label)) for part in parts]
    train, held_out = (Batch({name: scaled[name][i] for name in names} | {"label": labels[i]}) for i in range(2))
    return train, held_out


def _stratified_split(groups: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split rows at random with the same share of test rows in every group.

    Args:
        groups: the group of each row, ``(N,)``.
        share: the share of test rows in each group.
        seed: the seed of the split and of the order.

    Returns:
        (train, test): indices of rows.
    """
    rng = numpy_generator(seed, 0)
    members = [rng.permutation(np.flatnonzero(groups == g)) for g in np.unique(groups)]
    counts = [round(share * len(member)) for member in members]
    test = np.concatenate([member[:n] for member, n in zip(members, counts, strict=True)])
    train = np.concatenate([member[n:] for member, n in zip(members, counts, strict=True)])
    return rng.permutation(train), rng.permutation(test)


def _build_split(
    values: dict[str, np.ndarray],
    rows: tuple[np.ndarray, np.ndarray],
    standardise: bool,
    covariates: dict[str, np.ndarray],
) -> Split:
    """Build (train, test) from modalities and covariates of all rows, and the indices of either part."""
    scaled = {n: _standardise(x[rows[0]], [x[part] for part in rows], standardise) for n, x in values.items()}
    known = {name: torch.from_numpy(x.astype(np.int64)) for name, x in covariates.items()}
    train, test = (
        Batch({n: x[i] for n, x in scaled.items()}, covariates={n: x[part] for n, x in known.items()})
        for i, part in enumerate(rows)
    )
    return train, test


def _standardise(train: np.ndarray, parts: list[np.ndarray], standardise: bool) -> list[Tensor]:
    """Convert features to float32 tensors, standardised if asked for.

    Args:
        train: the training rows, ``(N, F)`` or ``(N, steps, F)``, whose statistics are used.
        parts: the arrays to convert, ``(.., F)``.
        standardise: subtract the mean and divide by the standard deviation.
    """
    if standardise:
        axes = tuple(range(train.ndim - 1))
        mean, deviation = train.mean(axes, np.float64), train.std(axes, np.float64)
        # the deviation of equal float32 numbers is a rounding error, not 0
        deviation[np.ptp(train, axes) == 0] = 1
        parts = [(part - mean) / deviation for part in parts]
    return [torch.from_numpy(part.astype(np.float32)) for part in parts]
