"""Proportions of rows with their standard errors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Share(NamedTuple):
    r"""Proportion: the mean of one number in [0, 1] per row, with its standard error over rows.

    .. math:: a = \frac1N \sum_n a_n, \qquad \mathrm{se} = \sqrt{\frac{1}{N (N - 1)} \sum_n (a_n - a)^2}

    :math:`a_n` is 0 or 1, or the proportion of the draws of row n: rows are independent, the draws of one row are not.
    The error is due to the choice of rows, with the model held fixed.

    Attributes:
        value: proportion a, in [0, 1].
        standard_error: se; NaN for a single row.
        size: number N of rows.

    >>> print(Share(0.8125, 0.0039, 10_000))
    81.2% ± 0.4% of 10000
    """

    value: float
    standard_error: float
    size: int

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.standard_error:.1%} of {self.size}"

    @staticmethod
    def of(right: Tensor) -> Share:
        """Compute the proportion of correct rows.

        Args:
            right: ``(N,)``, True for a correct row; or the proportion of each row's correct draws.

        >>> Share.of(torch.tensor([True, True, False, True])).value
        0.75
        """
        right = right.cpu().double()
        error = right.std(correction=1) / len(right) ** 0.5 if len(right) > 1 else torch.tensor(torch.nan)
        return Share(right.mean().item(), error.item(), len(right))
