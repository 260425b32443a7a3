"""Sequences without their padding: all-zero steps are removed, wherever they are, and lengths count the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np


class Steps(NamedTuple):
    """A modality of N rows as sequences whose valid steps come first.

    Attributes:
        values: ``(N, T, F)``; zeros behind the last valid step.
        valid: the steps that were measured, boolean ``(N, T)``.
        lengths: numbers of steps, int64 ``(N,)``; 0 where the modality is missing.
    """

    values: np.ndarray
    valid: np.ndarray
    lengths: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """The rows that have the modality, boolean ``(N,)``."""
        return np.asarray(self.valid.any(1))


def remove_padding(arrays: Mapping[str, np.ndarray], aligned: bool) -> dict[str, Steps]:
    """Remove the padding of sequences, before, between and behind their steps.

    A step in which all features of a modality are 0 was not measured. A modality without any other step is missing.

    Args:
        arrays: modality -> ``(N, T, F)``; T differs between modalities only if they are not aligned.
        aligned: False to remove the steps of each modality by itself, so that step t of one no longer belongs to step t
            of another. True to remove only those before the first and behind the last step of any modality: all have
            one length then, and a step that one of them lacks stays, as zeros.

    Returns:
        modality -> its steps.
    """
    measured = {name: (x != 0).any(2) for name, x in arrays.items()}
    if not aligned:
        return {name: _close_gaps(x, measured[name]) for name, x in arrays.items()}

    any_measured = np.logical_or.reduce(list(measured.values()))
    steps = any_measured.shape[1]
    first = np.where(any_measured.any(1), any_measured.argmax(1), 0)
    last = np.where(any_measured.any(1), steps - any_measured[:, ::-1].argmax(1), 0)
    # what is before the first step wraps around to the end; it is zero in all modalities
    order = (np.arange(steps) + first[:, None]) % steps
    found = {}
    for name, x in arrays.items():
        valid = np.take_along_axis(measured[name], order, 1)
        lengths = np.where(valid.any(1), last - first, 0).astype(np.int64)
        found[name] = Steps(np.take_along_axis(x, order[..., None], 1), valid, lengths)
    return found


def _close_gaps(x: np.ndarray, measured: np.ndarray) -> Steps:
    """Move the measured steps ``(N, T)`` of values ``(N, T, F)`` to the front, in their order."""
    order = np.argsort(~measured, axis=1, kind="stable")
    valid = np.take_along_axis(measured, order, 1)
    return Steps(np.take_along_axis(x, order[..., None], 1), valid, measured.sum(1).astype(np.int64))


def expected_lengths(steps: Mapping[str, Steps]) -> dict[str, np.ndarray]:
    """Return the lengths of all modalities, also where they are missing.

    A missing modality has the length of the longest other one of its row, which was recorded beside it; in a row
    without any, that of all its steps.

    Args:
        steps: modality -> its steps; the numbers of rows are equal.

    Returns:
        modality -> int64 ``(N,)``.
    """
    longest = np.maximum.reduce([s.lengths for s in steps.values()])
    found = {}
    for name, s in steps.items():
        whole = s.values.shape[1]
        other = np.where(longest > 0, np.minimum(longest, whole), whole)
        found[name] = np.where(s.lengths > 0, s.lengths, other)
    return found
