"""Pairs of rows: made by matching labels, and taken apart again for weak supervision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_integer, check_number
from ..utils.seeding import normalize_seed


def numpy_generator(seed: int, part: int) -> np.random.Generator:
    """Return NumPy's generator for a seed and a part (0 train, 1 test); its draws are alike on every device."""
    return np.random.default_rng((normalize_seed(seed), part))


def match_rows(
    labels: Sequence[np.ndarray], rng: np.random.Generator, repeat: bool = False
) -> tuple[list[np.ndarray], np.ndarray]:
    r"""Match rows of several sets by their labels, at random within each class.

    With :math:`n_{mc}` rows of class c in set m there are :math:`\min_m n_{mc}` matches of class c, and no row of any
    set is used twice. With ``repeat`` there are :math:`\max_m n_{mc}`, and a row of set m is used for the
    (k+1)-th time only after every other row of its class in m was used k times. The matches are shuffled.

    Args:
        labels: the labels of each set, ``(N_m,)``; a class that a set lacks has no match.
        rng: the generator of matches and order.
        repeat: use rows of the smaller sets several times.

    Returns:
        (rows, label): an index ``(N,)`` into each set, and the label of each match, int64 ``(N,)``.
    """
    classes = sorted(set.intersection(*(set(np.unique(each).tolist()) for each in labels)))
    found: list[list[np.ndarray]] = [[] for _ in labels]
    for c in classes:
        members = [np.flatnonzero(each == c) for each in labels]
        num_matches = (max if repeat else min)(map(len, members))
        for rows, member in zip(found, members, strict=True):
            num_rounds = math.ceil(num_matches / len(member))
            rounds = [rng.permutation(member) for _ in range(num_rounds)]
            rows.append(np.concatenate(rounds)[:num_matches])

    indices = [np.concatenate(rows) for rows in found]
    order = rng.permutation(len(indices[0]))
    indices = [rows[order] for rows in indices]
    return indices, labels[0][indices[0]].astype(np.int64)


def paired(batch: Batch, fraction: float, seed: int = 0) -> Batch:
    r"""Mask modalities so that only a fraction of the rows keeps all of them: weak supervision.

    Of N rows, round(fraction * N) keep all M modalities. Every other row keeps exactly one, chosen at random and as
    often as any other modality, to within one row. Values, covariates, lengths and order are unchanged. A modality
    that was missing before stays missing, so that a row may be left without any, and then contributes nothing.

    The values of masked modalities stay in the batch, but no story, guide or objective uses them.

    Args:
        batch: N rows.
        fraction: the share of rows that stay paired, in [0, 1].
        seed: the seed of the choice of rows.

    Returns:
        A batch of the same N rows with other masks.

    Raises:
        ValueError: ``fraction`` is outside [0, 1].

    References:
        Wu & Goodman 2018 (arXiv:1802.05335) and 2019 (arXiv:1912.05075).

    >>> both = Batch({"a": torch.zeros(10), "b": torch.ones(10)})
    >>> paired(both, 0.2)
    Batch(size=10, a() present: 60%, b() present: 60%)
    """
    check_batch(batch)
    check_number("fraction", fraction, 0, 1)
    check_integer("seed", seed)
    names = batch.names
    order = numpy_generator(seed, 0).permutation(batch.size)
    unpaired = order[round(fraction * batch.size) :]
    only = np.full(batch.size, -1)  # the index of a row's one modality, or -1 for all of them
    only[unpaired] = np.arange(len(unpaired)) % len(names)

    masks: dict[str, bool | torch.Tensor] = {}
    for m, name in enumerate(names):
        stays = torch.from_numpy((only == -1) | (only == m)).to(batch.device)
        mask = stays & batch.presence(name)
        masks[name] = bool(mask.any()) if bool(mask.all()) or not bool(mask.any()) else mask
    return batch._copy(_masks=masks)
