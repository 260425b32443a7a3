"""Which rows go together: pairs made by label, and pairs taken apart again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_integer, check_number
from ..utils.seeding import normalize_seed


def generator(seed: int, part: int) -> np.random.Generator:
    """NumPy's generator under a seed, another one for each part (0 train, 1 test): alike on every device."""
    return np.random.default_rng((normalize_seed(seed), part))


def matched(
    labels: Sequence[np.ndarray], rng: np.random.Generator, repeat: bool = False
) -> tuple[list[np.ndarray], np.ndarray]:
    r"""Rows of several sets that go together because their labels are the same.

    With :math:`n_{mc}` rows of class c in set m there are :math:`\min_m n_{mc}` matches of class c, and no row of any
    set is used twice; with ``repeat`` there are :math:`\max_m n_{mc}`, and a row of set m is used for the
    (k+1)-th time only after every other row of its class in m was used k times. The matches are shuffled.

    Args:
        labels: one ``(N_m,)`` a set; a class that a set lacks has no match.
        rng: what matches and order are drawn from.
        repeat: whether the smaller sets are gone through again.

    Returns:
        (rows, label): an index ``(N,)`` into each set, and the label of each match ``(N,)``.
    """
    classes = sorted(set.intersection(*(set(np.unique(each).tolist()) for each in labels)))
    found: list[list[np.ndarray]] = [[] for _ in labels]
    for c in classes:
        members = [np.flatnonzero(each == c) for each in labels]
        n = (max if repeat else min)(map(len, members))
        for rows, member in zip(found, members, strict=True):
            laps = [rng.permutation(member) for _ in range(-(-n // len(member)))]
            rows.append(np.concatenate(laps)[:n])
    indices = [np.concatenate(rows) for rows in found]
    order = rng.permutation(len(indices[0]))
    indices = [rows[order] for rows in indices]
    return indices, labels[0][indices[0]].astype(np.int64)


def paired(batch: Batch, fraction: float, seed: int = 0) -> Batch:
    r"""The same rows, of which only a fraction keeps its modalities together: weak supervision.

    Of N rows, the nearest whole number to fraction * N keep all M modalities. Each of the rest keeps exactly one and
    lacks the other M - 1; over those rows, the numbers that keep one modality and another differ by one at most. Which
    rows they are is drawn under the seed, without regard to their values. Values, covariates, lengths and order stay;
    what was missing before stays missing, so that a row may be left with nothing, which then counts for nothing.

    A row still holds the values that it lacks: no story, guide or objective uses them.

    Args:
        batch: N rows.
        fraction: the share of rows that stay paired, from 0 to 1.
        seed: of the choice.

    Raises:
        ValueError: the fraction is not one.

    Wu & Goodman 2018 (arXiv 1802.05335) and 2019 (arXiv 1912.05075).

    >>> both = Batch({"a": torch.zeros(10), "b": torch.ones(10)})
    >>> paired(both, 0.2)
    Batch(size=10, a() present: 60%, b() present: 60%)
    """
    check_batch(batch)
    check_number("fraction", fraction, 0, 1)
    check_integer("seed", seed)
    names, size = batch.names, batch.size
    order = generator(seed, 0).permutation(size)
    kept = np.full(size, -1)  # the place of the modality that a row keeps, or -1 for all of them
    alone = order[round(fraction * size) :]
    kept[alone] = np.arange(len(alone)) % len(names)
    masks: dict[str, bool | torch.Tensor] = {}
    for m, name in enumerate(names):
        mask, before = torch.from_numpy((kept == -1) | (kept == m)).to(batch.device), batch.presence(name)
        mask = mask & before
        masks[name] = bool(mask.any()) if bool(mask.all()) or not bool(mask.any()) else mask
    return batch._copy(_masks=masks)
