"""Precision, recall, density and coverage of generated data, by balls around nearest neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..utils.arguments import check_counts, check_flags, check_seed
from ..utils.seeding import temporary_seed
from ..utils.text import align_columns, plus_minus
from .feature_rows import Features, Rows, collect_features
from .row_splits import Split, half_sample_errors, whole

MOST_ROWS = 5000  # of each data set, whose distances are all in memory
HALVES = 50  # random halves of the rows behind the standard errors
MEASURES = ("precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class PRDC:
    """Precision, recall, density and coverage, with standard errors.

    Attributes:
        precision: proportion of fake rows among the real ones.
        recall: proportion of real rows among the fake ones.
        density: mean number of real balls that a fake row is in, divided by k; 1 in the mean for equal distributions.
        coverage: proportion of real balls with a fake row in them.
        errors: measure -> standard error, over the rows of both data sets.
        sizes: numbers of rows, (real, fake).
        neighbours: k.

    Example:
        >>> PRDC(0.9, 0.8, 1.0, 0.7, dict.fromkeys(("precision", "recall", "density", "coverage"), 0.1), (50, 60), 5)
        k = 5, 50 real and 60 fake rows
          precision                      0.900 ± 0.100
          recall                         0.800 ± 0.100
          density                        1.000 ± 0.100
          coverage                       0.700 ± 0.100
    """

    precision: float
    recall: float
    density: float
    coverage: float
    errors: Mapping[str, float]
    sizes: tuple[int, int]
    neighbours: int

    def table(self) -> str:
        """Return the measures with their errors, one per line."""
        title = f"k = {self.neighbours}, {self.sizes[0]} real and {self.sizes[1]} fake rows"
        return align_columns([title, ""], [[n, plus_minus(getattr(self, n), self.errors[n])] for n in MEASURES])

    def __repr__(self) -> str:
        return self.table()


@torch.no_grad()
def precision_recall(
    real: Rows,
    fake: Rows,
    features: Features | None = None,
    *,
    neighbours: int = 5,
    paired: bool = False,
    seed: int | None = None,
) -> PRDC:
    r"""Compute precision, recall, density and coverage of fake rows in the space of features.

    With the ball :math:`B(x_i)` around a real row whose radius is the distance to its k-th nearest other real row, and
    :math:`B(y_j)` alike around a fake row,

    .. math::

        \text{precision} &= \frac1M \sum_j 1\Big[y_j \in \bigcup_i B(x_i)\Big], &
        \text{recall} &= \frac1N \sum_i 1\Big[x_i \in \bigcup_j B(y_j)\Big], \\
        \text{density} &= \frac{1}{k M} \sum_{i, j} 1[y_j \in B(x_i)], &
        \text{coverage} &= \frac1N \sum_i 1[\exists j: y_j \in B(x_i)].

    Precision and density fall with fake rows that are unlike any real one, recall and coverage with kinds of real rows
    that are never generated. For equal distributions density is 1 in the mean, and coverage
    :math:`1 - \binom{M + N - 1 - k}{M} / \binom{M + N - 1}{M}`. Values depend on the numbers of rows and on k: compare
    them at the same ones.

    The standard errors are those of 50 random halves of both data sets, radii computed anew (the jackknife that deletes
    half of the rows); near 0 and 1 they are too large rather than too small.

    Args:
        real, fake: values, ``(N, *event)`` and ``(M, *event)``, or iterables of such tensors; 5000 rows of each at most
            and 2 k + 2 at least.
        features: maps ``(B, *event)`` to ``(B, D)``; further dimensions are flattened. A module is called in its
            present mode. None takes the values themselves.
        neighbours: k.
        paired: True if row n of ``fake`` belongs to row n of ``real``; halves are then the same of both.
        seed: of the halves; None uses torch's generator.

    Returns:
        The four measures and their errors.

    Raises:
        ValueError: too few or too many rows, or features that are not finite or of unlike sizes.

    Example:
        >>> x = torch.arange(12.0)[:, None]
        >>> found = precision_recall(x, x[:6] + 0.1, neighbours=1)
        >>> found.precision, round(found.recall, 3), round(found.coverage, 3)
        (1.0, 0.583, 0.583)

    References:
        Kynkäänniemi et al. 2019 (arXiv:1904.06991); Naeem et al. 2020 (arXiv:2002.09797).
    """
    check_counts(neighbours=neighbours)
    check_flags(paired=paired)
    check_seed(seed)
    least = 2 * neighbours + 2  # a half has k other rows
    x = collect_features(real, features, "real", least, MOST_ROWS)
    y = collect_features(fake, features, "fake", least, MOST_ROWS, columns=x.shape[1])
    if paired and len(x) != len(y):
        raise ValueError(f"expected as many fake as real rows, which are pairs, got {len(y)} and {len(x)}")

    distances = distances_of(x, y)

    def measure(rows: Split) -> dict[str, float]:
        return prdc_of(distances, rows, neighbours)

    with temporary_seed(seed, x.device):
        errors = half_sample_errors(measure, len(x), len(y), paired, HALVES)
    values = measure(whole(len(x), len(y)))
    return PRDC(**values, errors=errors, sizes=(len(x), len(y)), neighbours=neighbours)


def distances_of(x: Tensor, y: Tensor) -> Tensor:
    """Return the Euclidean distances of all rows, the real ones first, ``(N + M, N + M)``."""
    rows = torch.cat([x, y])
    # without the expansion into products, which does not give equal rows the distance 0
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")


def prdc_of(distances: Tensor, rows: Split, neighbours: int) -> dict[str, float]:
    """Return the four measures.

    Args:
        distances: of all rows, ``(N + M, N + M)``.
        rows: places of the real rows and of the fake ones.
        neighbours: k.
    """
    real, fake = rows
    between = distances[real][:, fake]
    in_real = between < _radii(distances[real][:, real], neighbours)[:, None]
    in_fake = between < _radii(distances[fake][:, fake], neighbours)
    found = {
        "precision": in_real.any(0).double().mean(),
        "recall": in_fake.any(1).double().mean(),
        "density": in_real.double().sum() / (neighbours * in_real.shape[1]),
        "coverage": in_real.any(1).double().mean(),
    }
    return {name: value.item() for name, value in found.items()}


def _radii(within: Tensor, neighbours: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row, ``(N,)``, from distances ``(N, N)``."""
    others = within.clone().fill_diagonal_(torch.inf)
    return others.topk(neighbours, largest=False).values[:, -1]
