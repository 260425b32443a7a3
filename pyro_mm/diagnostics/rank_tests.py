"""Tests of the uniformity of ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..utils.global_state import preserve_process_settings

LEVEL = 0.05  # the chance that a table names anything at all where nothing is wrong


CLEAR = 2.5  # standard errors beyond which a finding's shift or width gives it its name


@dataclass(frozen=True)
class Finding:
    r"""What the ranks of one coordinate say, from ``rows`` simulations.

    Attributes:
        p_value: of uniform ranks, exact (:func:`uniformity`); ``adjusted`` is Holm's, over all coordinates together.
        shift: by how much the guide's draws lie too high, in their own standard deviations, ± ``shift_error``.
        width: their standard deviation over the one that they should have, ± ``width_error``. With the normal scores
            :math:`y = \Phi^{-1}(u)` of true values, :math:`y \sim N(-\text{shift}, \text{width}^{-2})`, fitted to the
            L + 1 classes of u by maximum likelihood; exact for normals, elsewhere a description. Large and with a large
            error where most true values lie outside all draws.
        verdict: ``"uniform"`` unless ``adjusted`` is below 0.05; else ``"too low"``, ``"too high"``, ``"too narrow"``
            (ranks in a U; the guide is surer than its errors allow, be it by its width or by a mean that is off, here
            one way and there the other), ``"too wide"`` (a hump), ``"too low and narrow"`` and the like, or
            ``"of another shape"``.
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
    r"""The p-value of N ranks being uniform, exact for ranks that are discrete.

    .. math:: \gamma = 2 \min_i \min\{P(B_i \le R_i), P(B_i \ge R_i)\}, \qquad B_i \sim \text{Bin}(N, i / (L + 1))

    with :math:`R_i` the number of ranks below i = 1..L. The p-value is the chance of a :math:`\gamma` as small: the
    smallest level at which the band of :func:`band` leaves the counts out.

    Args:
        counts: the number of rows of each rank 0..L, ``(L + 1,)``.

    Säilynoja, Bürkner & Vehtari 2022 (arXiv:2103.10522).
    """
    with preserve_process_settings():
        from scipy.stats import binom  # here, because it takes most of a second

    n, cells = int(counts.sum()), len(counts)
    below, at = counts.cumsum()[:-1], np.arange(1, cells) / cells
    gamma = 2 * min(binom.cdf(below, n, at).min(), binom.sf(below - 1, n, at).min())
    p = 1 - _inside(*_limits(gamma * (1 + 1e-9), n, cells), n)  # what equals it, but for rounding, is as small
    return float(min(1.0, (cells - 1) * gamma, max(p, gamma / 2)))  # bounds that hold where 1 - p rounds to 1


@lru_cache(maxsize=256)
def band(num_rows: int, num_draws: int, prob: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Counts between which the numbers of ranks below 1..L all lie with at least ``prob``, if ranks are uniform.

    Returns:
        (lower, upper), each ``(L,)``, bounds included: the narrowest band of equal tail probabilities at every rank.
    """
    low, high = (1 - prob) / num_draws, 1.0  # by the union bound the first one is wide enough
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        wide = _inside(*_limits(middle, num_rows, num_draws + 1), num_rows) >= prob
        low, high = (middle, high) if wide else (low, middle)
    return _limits(low, num_rows, num_draws + 1)


def _limits(gamma: float, n: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest count below each rank whose tail probabilities are above gamma / 2."""
    with preserve_process_settings():
        from scipy.stats import binom

    at = np.arange(1, cells) / cells
    lower, above = (binom.ppf(gamma / 2, n, p).clip(min=0).astype(int) for p in (at, 1 - at))  # -1 at gamma = 0
    return lower, n - above


def _inside(lower: np.ndarray, upper: np.ndarray, n: int) -> float:
    """The probability that uniform ranks have counts within limits: independent Poisson counts given their sum."""
    with preserve_process_settings():
        from scipy.stats import poisson

    if (lower > upper).any():
        return 0.0
    rate, start, paths = n / (len(lower) + 1), 0, np.ones(1)
    step = poisson.pmf(np.arange((upper - np.append(0, lower[:-1])).max() + 1), rate)
    for low, high in zip(lower, upper, strict=True):
        paths, start = np.convolve(paths, step)[low - start : high - start + 1], low
    rest = n - start - np.arange(len(paths))
    return float(paths @ poisson.pmf(rest, rate) / poisson.pmf(n, n))


def _finding(counts: np.ndarray, p_value: float, adjusted: float) -> Finding:
    """The maximum-likelihood shift and width, by the classes' probabilities under a normal; and the verdict."""
    with preserve_process_settings():
        from scipy.optimize import minimize
        from scipy.special import ndtr, ndtri

    cells = len(counts)
    edges, weights = ndtri(np.arange(1, cells) / cells), counts + 1 / cells  # one row spread out keeps it finite

    def probabilities(theta: np.ndarray) -> np.ndarray:
        below = ndtr((edges - theta[0]) * np.exp(-theta[1]))
        return np.diff(below, prepend=0.0, append=1.0).clip(min=1e-300)

    theta = minimize(lambda t: -(weights * np.log(probabilities(t))).sum() / weights.sum(), np.zeros(2)).x
    scaled = (edges - theta[0]) * np.exp(-theta[1])
    density = np.exp(-0.5 * scaled**2) / math.sqrt(2 * math.pi)
    slopes = -np.diff(np.stack([density * np.exp(-theta[1]), density * scaled]), prepend=0.0, append=0.0)
    information = weights.sum() * (slopes / probabilities(theta)) @ slopes.T
    error = np.sqrt(np.diag(np.linalg.pinv(information)))
    shift, width = -float(theta[0]), math.exp(-theta[1])
    rank = np.arange(cells) - (cells - 1) / 2
    mean = weights @ rank / weights.sum()  # which way is off shows in the ranks, even if all draws lie to one side
    words = {
        "low" if mean > 0 else "high": mean / math.sqrt(weights @ (rank - mean) ** 2) * weights.sum(),
        "wide" if width > 1 else "narrow": theta[1] / error[1],
    }
    clear = " and ".join(word for word, z in words.items() if abs(z) > CLEAR)
    verdict = "uniform" if adjusted >= LEVEL else f"too {clear}" if clear else "of another shape"
    rows, errors = int(counts.sum()), error * [1, width]
    return Finding(rows, p_value, float(adjusted), shift, float(errors[0]), width, float(errors[1]), verdict)


def p_text(p: float, digits: int = 2) -> str:
    """A p-value in words: what lies below 1e-15 is known by its bounds only."""
    return f"p = {p:.{digits}g}" if p > 1e-15 else "p < 1e-15"


def _holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's p-values: where nothing is wrong, the chance that any is below 0.05 is at most that, whatever depends."""
    p = np.asarray(p_values)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return adjusted
