"""Kernel distance between two data sets: unbiased, with a standard error and a permutation p-value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributions.sample_statistics import KERNELS, Kernel, check_bandwidth, gram_matrix
from ..utils.arguments import check_choice, check_counts, check_flags, check_function, check_seed
from ..utils.seeding import temporary_seed
from .feature_rows import Features, Rows, collect_features

POLYNOMIAL = "polynomial"
LEAST_ROWS = 3  # for which the estimate without one of them is defined
MOST_ROWS = 5000  # of each data set; the kernel matrix holds four times as many squared
PERMUTATIONS_PER_PASS = 256


@dataclass(frozen=True)
class KernelDistance:
    """Unbiased estimate of a squared kernel distance, its standard error, and its permutation p-value.

    Attributes:
        value: the estimate; 0 in the mean for equal distributions, and so negative half of the time.
        standard_error: jackknife's, over the rows of both data sets.
        p_value: probability of a value as large, or larger, under equal distributions.
        sizes: numbers of rows, (real, fake).
        kernel: the kernel in words.
        permutations: the number of random permutations behind the p-value, which is never below its inverse.

    Example:
        >>> KernelDistance(0.0126, 0.0011, 0.001, (500, 400), "polynomial kernel", 999)
        0.01260 ± 0.00110, p = 0.001 (500 real and 400 fake rows; polynomial kernel)
    """

    value: float
    standard_error: float
    p_value: float
    sizes: tuple[int, int]
    kernel: str
    permutations: int

    def __repr__(self) -> str:
        rows = f"{self.sizes[0]} real and {self.sizes[1]} fake rows"
        return f"{self.value:.5f} ± {self.standard_error:.5f}, p = {self.p_value:.3g} ({rows}; {self.kernel})"


@torch.no_grad()
def kernel_distance(
    real: Rows,
    fake: Rows,
    features: Features | None = None,
    *,
    kernel: Kernel = POLYNOMIAL,
    bandwidth: Any = None,
    paired: bool = False,
    permutations: int = 999,
    seed: int | None = None,
) -> KernelDistance:
    r"""Estimate the squared maximum mean discrepancy between the features of two data sets, without bias.

    .. math:: \frac{1}{N (N - 1)} \sum_{i \ne j} k(x_i, x_j) + \frac{1}{M (M - 1)} \sum_{i \ne j} k(y_i, y_j)
              - \frac{2}{N M} \sum_{i, j} k(x_i, y_j), \qquad k(x, y) = \Big( \frac{x^T y}{D} + 1 \Big)^3

    x and y are features of real and of fake rows. With the polynomial kernel and features of the published Inception
    network it is the kernel Inception distance, of all rows at once. Unlike the Fréchet distance it does not depend on
    the number of rows in the mean. The polynomial kernel depends on the units and the origin of the features: compare
    values as such, without a network, by ``"gaussian"``.

    The standard error is the jackknife's over the rows of both data sets; for equal distributions, where the estimate
    is degenerate, it is too large rather than too small. The p-value counts random permutations of real and fake rows,
    :math:`p = (1 + \#\{d_\pi \ge d\}) / (1 + \#\pi)`, and is exact at any number of rows: under equal distributions
    p is at most α with probability α or less.

    Args:
        real, fake: values, ``(N, *event)`` and ``(M, *event)``, or iterables of such tensors; 3 to 5000 rows each.
        features: maps ``(B, *event)`` to ``(B, D)``; further dimensions are flattened. A module is called in its
            present mode. None takes the values themselves.
        kernel: ``"polynomial"``, or one of :func:`pyro_mm.distributions.squared_mmd`.
        bandwidth: of ``"gaussian"`` and ``"imq"``, as there; None for the median of the distances of all rows.
        paired: True if row n of ``fake`` belongs to row n of ``real``, such as a sample given its label. Pairs of one
            row are then left out of the third sum, and permutations exchange x and y within rows.
        permutations: number of random permutations.
        seed: of the permutations; None uses torch's generator.

    Returns:
        The distance, in the units of the kernel, with its error.

    Raises:
        ValueError: too few or too many rows, features that are not finite or of unlike sizes, or a bandwidth for a
            kernel that has none.

    Example:
        >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
        >>> found = kernel_distance(x[:100], x[100:] + 1.0, seed=0)
        >>> found.value > 2 * found.standard_error, found.p_value
        (True, 0.001)

    References:
        Gretton et al. 2012 (JMLR 13); Bińkowski et al. 2018 (arXiv:1801.01401).
    """
    name, function, width = _check_kernel(kernel, bandwidth)
    check_flags(paired=paired)
    check_counts(permutations=permutations)
    check_seed(seed)
    x = collect_features(real, features, "real", LEAST_ROWS, MOST_ROWS)
    y = collect_features(fake, features, "fake", LEAST_ROWS, MOST_ROWS, columns=x.shape[1])
    if paired and len(x) != len(y):
        raise ValueError(f"expected as many fake as real rows, which are pairs, got {len(y)} and {len(x)}")

    pairs = _PairSums(gram_matrix(torch.cat([x, y]), function, width), len(x), paired)
    value = pairs.distance(pairs.is_real[:, None])
    with temporary_seed(seed, x.device):
        permuted = torch.cat([pairs.distance(part) for part in pairs.relabelled(permutations)])
    rounding = 1e-12 * pairs.gram.abs().max()  # values that are equal but for the order of a sum count as equal
    exceeding = int((permuted >= value - rounding).sum())
    p_value = (1 + exceeding) / (1 + permutations)
    return KernelDistance(
        value.item(), pairs.jackknife_error(), p_value, (len(x), len(y)), f"{name} kernel", permutations
    )


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return ``(x^T y / D + 1)^3`` of all pairs of rows ``(N, D)`` and ``(M, D)``, ``(N, M)``."""
    return (x @ y.mT / x.shape[-1] + 1) ** 3


def _check_kernel(kernel: Any, bandwidth: Any) -> tuple[str, Kernel, Any]:
    """Return a kernel's name, the kernel, and its bandwidth. Raises a TypeError or a ValueError for others."""
    width = check_bandwidth(bandwidth)
    if isinstance(kernel, str) and check_choice("kernel", kernel, (POLYNOMIAL, *KERNELS)) != POLYNOMIAL:
        return kernel, kernel, width
    if width is not None:
        raise ValueError(f"bandwidth: only the kernels {' and '.join(map(repr, KERNELS))} have one, leave it out")
    if isinstance(kernel, str):
        return kernel, polynomial_kernel, None
    return "user's", check_function("kernel", kernel, ("x", "y")), None


class _PairSums:
    """Sums of a kernel matrix over pairs of rows, for any division of the rows into real and fake.

    Args:
        gram: kernel of all rows, the real ones first, ``(N + M, N + M)``.
        size: N.
        paired: True if row n of the fake rows belongs to row n of the real ones.
    """

    def __init__(self, gram: Tensor, size: int, paired: bool):
        self.gram = gram.clone().fill_diagonal_(0.0)
        self.paired = paired
        self.sizes = (size, len(gram) - size)
        if paired:
            self.gram.diagonal(size).zero_()
            self.gram.diagonal(-size).zero_()
        self.is_real = (torch.arange(len(gram), device=gram.device) < size).double()
        self._by_row = self.gram.sum(1)
        self._total = self._by_row.sum()

    def distance(self, is_real: Tensor) -> Tensor:
        """Return the distances of P divisions, ``(P,)``, from 1 for real rows and 0 for fake ones, ``(N + M, P)``."""
        real = ((self.gram @ is_real) * is_real).sum(0)
        between = self._by_row @ is_real - real
        fake = self._total - real - 2 * between
        return self._combine(real, fake, between, *self.sizes)

    def relabelled(self, number: int) -> Any:
        """Yield random divisions ``(N + M, P)``, as many as asked for in all."""
        size = self.sizes[0]
        for start in range(0, number, PERMUTATIONS_PER_PASS):
            count = min(PERMUTATIONS_PER_PASS, number - start)
            if self.paired:
                keep = torch.rand(size, count, device=self.gram.device) < 0.5
                yield torch.cat([keep, ~keep]).double()
            else:
                yield self.is_real[torch.rand(len(self.gram), count, device=self.gram.device).argsort(0)]

    def jackknife_error(self) -> float:
        """Return the jackknife's standard error over real and over fake rows, or over pairs of them."""
        n, m = self.sizes
        within_x = self.gram[:n, :n].sum(1)
        within_y = self.gram[n:, n:].sum(1)
        from_x = self.gram[:n, n:].sum(1)
        from_y = self.gram[n:, :n].sum(1)
        real, fake, between = within_x.sum(), within_y.sum(), from_x.sum()
        if self.paired:
            without = self._combine(real - 2 * within_x, fake - 2 * within_y, between - from_x - from_y, n - 1, m - 1)
            return math.sqrt(_spread(without))
        without_x = self._combine(real - 2 * within_x, fake, between - from_x, n - 1, m)
        without_y = self._combine(real, fake - 2 * within_y, between - from_y, n, m - 1)
        return math.sqrt(_spread(without_x) + _spread(without_y))

    def _combine(self, real: Tensor, fake: Tensor, between: Tensor, n: int, m: int) -> Tensor:
        """Return the distance from sums over ordered pairs within real and fake rows, and between them."""
        pairs_between = n * (n - 1) if self.paired else n * m
        return real / (n * (n - 1)) + fake / (m * (m - 1)) - 2 * between / pairs_between


def _spread(without: Tensor) -> float:
    """Return the jackknife's variance from the estimates without one row each, ``(N,)``."""
    return ((len(without) - 1) * without.var(correction=0)).item()
