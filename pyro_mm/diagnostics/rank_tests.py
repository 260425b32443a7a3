"""Tests of the uniformity of ranks, and estimates of the shift and the width that make them non-uniform."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..utils.global_state import preserve_process_settings

LEVEL = 0.05  # family-wise error rate of a table of rank tests
VERDICT_Z = 2.5  # z-score above which a shift or a width is reported


@dataclass(frozen=True)
class RankTest:
    r"""Test of the uniformity of the ranks of one coordinate.

    Shift and width are those of a normal model, fitted by maximum likelihood to the counts of the L + 1 ranks: the
    normal scores :math:`y = \Phi^{-1}(u)` of the true values among the guide's draws are
    :math:`N(-\text{shift}, \text{width}^{-2})`. The model is exact for normal posteriors and a description of others.
    Both estimates and their errors are large where most true values lie outside all draws.

    Attributes:
        rows: number of simulations.
        p_value: exact p-value of uniform ranks (:func:`uniformity`).
        adjusted: p-value after Holm's adjustment over all coordinates.
        shift: excess of the guide's draws over the truth, in standard deviations of the draws.
        shift_error: standard error of ``shift``.
        width: standard deviation of the guide's draws relative to the right one.
        width_error: standard error of ``width``.
        verdict: ``"uniform"`` unless ``adjusted`` is below 0.05; else the direction of the error of the guide's draws:
            ``"too low"``, ``"too high"``, ``"too narrow"`` (ranks in the form of a U: a variance that is too small, or
            a mean that is wrong in different directions in different rows), ``"too wide"`` (ranks in the form of a
            hump), two of them (``"too low and narrow"``), or ``"of another shape"``.
    """

    rows: int
    p_value: float
    adjusted: float
    shift: float
    shift_error: float
    width: float
    width_error: float
    verdict: str


def uniformity(counts: np.ndarray) -> float:
    r"""Compute the exact p-value of the hypothesis that discrete ranks are uniform.

    .. math:: \gamma = 2 \min_i \min\{P(B_i \le R_i), P(B_i \ge R_i)\}, \qquad B_i \sim \text{Bin}(N, i / (L + 1))

    :math:`R_i` is the number of ranks below i = 1..L. The p-value is the probability of a :math:`\gamma` at least as
    small: the smallest level at which the band of :func:`band` does not contain the counts.

    Args:
        counts: number of rows of each rank 0..L, ``(L + 1,)``.

    Returns:
        p-value in [0, 1].

    References:
        Säilynoja, Bürkner & Vehtari 2022 (arXiv:2103.10522).

    >>> uniformity(np.array([10, 10, 10, 10])), round(uniformity(np.array([30, 5, 3, 2])), 6)
    (1.0, 0.0)
    """
    with preserve_process_settings():
        from scipy.stats import binom  # imported here because it takes most of a second

    n = int(counts.sum())
    cells = len(counts)
    below = counts.cumsum()[:-1]
    probability = np.arange(1, cells) / cells
    lower_tail = binom.cdf(below, n, probability).min()
    upper_tail = binom.sf(below - 1, n, probability).min()
    gamma = 2 * min(lower_tail, upper_tail)

    # a gamma that is equal but for rounding counts as being as small
    p = 1 - _probability_inside(*_count_limits(gamma * (1 + 1e-9), n, cells), n)
    # gamma / 2 and the union bound hold where 1 - p has rounded to 1
    return float(min(1.0, (cells - 1) * gamma, max(p, gamma / 2)))


@lru_cache(maxsize=256)
def band(num_rows: int, num_draws: int, prob: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Compute a simultaneous band for the cumulative counts of uniform ranks.

    Args:
        num_rows: N.
        num_draws: L.
        prob: least probability that the number of ranks below i lies in the band for all i = 1..L.

    Returns:
        (lower, upper), each ``(L,)``, bounds included: the narrowest band of equal tail probabilities at every rank.
    """
    low = (1 - prob) / num_draws  # wide enough, by the union bound
    high = 1.0
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        if _probability_inside(*_count_limits(middle, num_rows, num_draws + 1), num_rows) >= prob:
            low = middle
        else:
            high = middle
    return _count_limits(low, num_rows, num_draws + 1)


def _count_limits(gamma: float, n: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest and the largest count below each rank whose tail probabilities exceed gamma / 2."""
    with preserve_process_settings():
        from scipy.stats import binom

    probability = np.arange(1, cells) / cells
    lower, above = (binom.ppf(gamma / 2, n, p).clip(min=0).astype(int) for p in (probability, 1 - probability))
    return lower, n - above


def _probability_inside(lower: np.ndarray, upper: np.ndarray, n: int) -> float:
    """Compute the probability that the cumulative counts of uniform ranks lie within limits.

    A convolution over ranks of independent Poisson counts, conditioned on their sum n.
    """
    with preserve_process_settings():
        from scipy.stats import poisson

    if (lower > upper).any():
        return 0.0
    rate = n / (len(lower) + 1)
    largest_step = (upper - np.append(0, lower[:-1])).max()
    step = poisson.pmf(np.arange(largest_step + 1), rate)

    start = 0  # the count that paths[0] is the probability of
    paths = np.ones(1)
    for low, high in zip(lower, upper, strict=True):
        paths = np.convolve(paths, step)[low - start : high - start + 1]
        start = low
    rest = n - start - np.arange(len(paths))
    return float(paths @ poisson.pmf(rest, rate) / poisson.pmf(n, n))


def rank_test(counts: np.ndarray, p_value: float, adjusted: float) -> RankTest:
    """Fit shift and width to the counts of ranks, and give a verdict.

    Args:
        counts: number of rows of each rank 0..L, ``(L + 1,)``.
        p_value: of :func:`uniformity`.
        adjusted: the p-value after adjustment for the other coordinates.
    """
    shift, width, shift_error, log_width_error = _shift_and_width(counts)
    cells = len(counts)
    weights = counts + 1 / cells
    rank = np.arange(cells) - (cells - 1) / 2

    # the mean rank has a z-score even where all draws lie on one side of the truth and the fitted shift has none
    mean = weights @ rank / weights.sum()
    deviation = math.sqrt(weights @ (rank - mean) ** 2)
    z_scores = {
        "low" if mean > 0 else "high": mean / deviation * weights.sum(),
        "wide" if width > 1 else "narrow": math.log(width) / log_width_error,
    }
    directions = " and ".join(word for word, z in z_scores.items() if abs(z) > VERDICT_Z)
    error = f"too {directions}" if directions else "of another shape"
    return RankTest(
        rows=int(counts.sum()),
        p_value=p_value,
        adjusted=float(adjusted),
        shift=shift,
        shift_error=shift_error,
        width=width,
        width_error=log_width_error * width,
        verdict="uniform" if adjusted >= LEVEL else error,
    )


def _shift_and_width(counts: np.ndarray) -> tuple[float, float, float, float]:
    """Fit the normal model of :class:`RankTest` by maximum likelihood.

    Returns:
        (shift, width, standard error of the shift, standard error of the logarithm of the width).
    """
    with preserve_process_settings():
        from scipy.optimize import minimize
        from scipy.special import ndtr, ndtri

    cells = len(counts)
    edges = ndtri(np.arange(1, cells) / cells)
    weights = counts + 1 / cells  # one more row, spread over all ranks, keeps the estimate finite

    def probabilities(theta: np.ndarray) -> np.ndarray:
        below = ndtr((edges - theta[0]) * np.exp(-theta[1]))
        by_rank: np.ndarray = np.diff(below, prepend=0.0, append=1.0).clip(min=1e-300)
        return by_rank

    def loss(theta: np.ndarray) -> float:
        mean_log_loss: float = -(weights * np.log(probabilities(theta))).sum() / weights.sum()
        return mean_log_loss

    theta = minimize(loss, np.zeros(2)).x

    # Fisher information of the multinomial, from the derivatives of the ranks' probabilities
    scaled = (edges - theta[0]) * np.exp(-theta[1])
    density = np.exp(-0.5 * scaled**2) / math.sqrt(2 * math.pi)
    slopes = -np.diff(np.stack([density * np.exp(-theta[1]), density * scaled]), prepend=0.0, append=0.0)
    information = weights.sum() * (slopes / probabilities(theta)) @ slopes.T
    error = np.sqrt(np.diag(np.linalg.pinv(information)))
    return -float(theta[0]), math.exp(-theta[1]), float(error[0]), float(error[1])


def p_text(p: float, digits: int = 2) -> str:
    """Format a p-value; one below 1e-15 is known by its bounds only.

    >>> p_text(0.0312), p_text(1e-20)
    ('p = 0.031', 'p < 1e-15')
    """
    return f"p = {p:.{digits}g}" if p > 1e-15 else "p < 1e-15"


def adjust_p_values(p_values: Sequence[float]) -> np.ndarray:
    """Adjust p-values by Holm's method, which bounds the family-wise error rate under any dependence.

    >>> adjust_p_values([0.01, 0.04, 0.03]).tolist()
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return adjusted
