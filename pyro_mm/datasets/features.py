"""Data sets of feature vectors: of handwritten digits, and of mice.

With ``standardise`` the mean of the training rows is subtracted from every feature, which is then divided by their
standard deviation; a feature that is constant in them is only centred. Test rows use the training rows' statistics.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.arguments import check_flag
from .files import Directory, Shape, locate_files, read_arrays
from .images import Split
from .pairing import numpy_generator
from .scaling import mean_and_deviation

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
        train: the training rows, ``(N, F)``, whose statistics are used.
        parts: the arrays to convert, ``(.., F)``.
        standardise: subtract the mean and divide by the standard deviation.
    """
    if standardise:
        mean, deviation = mean_and_deviation(train)
        parts = [(part - mean) / deviation for part in parts]
    return [torch.from_numpy(part.astype(np.float32)) for part in parts]
