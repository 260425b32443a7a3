"""Scaling of features by statistics of training rows, and refusal of features that have no scale."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

Constant = Literal["refuse", "drop", "keep"]
CONSTANT: tuple[Constant, ...] = ("refuse", "drop", "keep")

LARGEST = 1e6  # a magnitude that no feature of speech, faces or words has
FARTHEST = 1e3  # standard deviations of the training rows between their mean and a value


class Scaling(NamedTuple):
    """The features of a modality that are used, and the statistics of training rows that scale them.

    Attributes:
        used: indices of features, ``(F,)``.
        mean: float64 ``(F,)``; zeros for features that are not scaled.
        deviation: float64 ``(F,)``, above 0; ones for features that are not scaled.
        is_fitted: True if mean and deviation are statistics, False for zeros and ones.
    """

    used: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray
    is_fitted: bool = True

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Return the used features of ``(.., features)``, scaled: float32 ``(.., F)``."""
        scaled: np.ndarray = ((values[..., self.used] - self.mean) / self.deviation).astype(np.float32)
        return scaled


def mean_and_deviation(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean and the standard deviation of features, each float64 ``(F,)``; 1 for the latter where it is 0.

    Args:
        rows: ``(.., F)``.
    """
    axes = tuple(range(rows.ndim - 1))
    mean = rows.mean(axes, np.float64)
    deviation = rows.std(axes, dtype=np.float64)
    # the deviation of equal float32 numbers is a rounding error, not 0
    deviation[np.ptp(rows, axes) == 0] = 1
    return mean, deviation


def identity_scaling(features: int) -> Scaling:
    """Return the scaling that leaves all features as they are."""
    return Scaling(np.arange(features), np.zeros(features), np.ones(features), is_fitted=False)


def fit_scaling(what: str, rows: np.ndarray, standardise: bool, constant: Constant) -> Scaling:
    """Fit a scaling to training rows.

    Args:
        what: file and modality in words, for an error.
        rows: training rows, or all valid steps of them, ``(n, F)``.
        standardise: subtract the mean and divide by the standard deviation.
        constant: for features that never vary in ``rows``: ``"refuse"`` them by an error, ``"drop"`` them, or
            ``"keep"`` them, which only centres them.

    Raises:
        ValueError: a feature never varies and ``constant`` is ``"refuse"``, or all features are dropped.
    """
    fixed = np.flatnonzero(np.ptp(rows, 0) == 0)
    if len(fixed) and constant == "refuse":
        raise ValueError(
            f"{what}: {len(fixed)} of {rows.shape[1]} features never vary in the training rows ({_some(fixed)}). No "
            "scale can be fitted to them, and a density with a learned scale has no maximum: constant='drop' leaves "
            "them out, constant='keep' keeps them"
        )
    used = np.arange(rows.shape[1])
    if constant == "drop":
        used = np.setdiff1d(used, fixed)
    if not len(used):
        raise ValueError(f"{what}: no feature varies in the training rows, so that constant='drop' leaves none")
    if not standardise:
        return Scaling(used, np.zeros(len(used)), np.ones(len(used)), is_fitted=False)
    return Scaling(used, *mean_and_deviation(rows[:, used]))


def check_held_out(what: str, scaling: Scaling, train: np.ndarray, rows: np.ndarray) -> None:
    """Raise a ValueError if the statistics of training rows do not fit held-out rows.

    Args:
        what: file, modality and part in words.
        scaling: the scaling that was fitted to the training rows.
        train: training rows, ``(n, features)``.
        rows: held-out rows, ``(k, features)``.
    """
    if not len(rows) or not scaling.is_fitted:
        return
    rows, train = rows[:, scaling.used], train[:, scaling.used]
    fixed = (np.ptp(train, 0) == 0) & (rows != train[0]).any(0)
    if fixed.any():
        raise ValueError(
            f"{what}: features that never vary in the training rows vary here ({_some(scaling.used[fixed])}), so that "
            "no scale was fitted to them: constant='drop' leaves them out"
        )
    distance = np.abs(rows - scaling.mean) / scaling.deviation
    if distance.max() > FARTHEST:
        row, feature = np.unravel_index(distance.argmax(), distance.shape)
        raise ValueError(
            f"{what}: feature {scaling.used[feature]} is {rows[row, feature]:g}, {distance[row, feature]:,.0f} "
            f"standard deviations of the training rows from their mean, {scaling.mean[feature]:g}: such a "
            "value decides any likelihood or error alone; repair it in the file, or give standardise=False"
        )


def check_magnitudes(what: str, rows: np.ndarray) -> None:
    """Raise a ValueError if a value is beyond ``LARGEST``; ``what`` names file, modality and part."""
    if rows.size and np.abs(rows).max() > LARGEST:
        index = np.unravel_index(np.abs(rows).argmax(), rows.shape)
        raise ValueError(
            f"{what}: feature {index[-1]} reaches {rows[index]:g}, beyond {LARGEST:,.0f}, which no feature of speech, "
            "faces or words has: its extraction failed; repair the file"
        )


def _some(features: np.ndarray) -> str:
    """Return numbers of features in words, eight at most."""
    shown = ", ".join(map(str, features[:8]))
    return f"feature{'s' * (len(features) > 1)} {shown}{', ..' if len(features) > 8 else ''}"
