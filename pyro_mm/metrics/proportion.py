"""A share of rows, and how far it is to be trusted."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Share(NamedTuple):
    r"""A mean of numbers from 0 to 1, one a row, with its standard error.

    .. math:: a = \frac1N \sum_n a_n, \qquad \mathrm{se} = \sqrt{\frac{1}{N (N - 1)} \sum_n (a_n - a)^2}

    where :math:`a_n` is 0 or 1, or the share of the draws of a row: draws of one row are not independent, rows are.
    The error is over rows, as a sample of what they were drawn from; the model is taken as it is.

    >>> print(Share(0.8125, 0.0039, 10_000))
    81.2% ± 0.4% of 10000
    """

    value: float
    standard_error: float  # NaN of a single row
    size: int  # N

    def __str__(self) -> str:
        return f"{self.value:.1%} ± {self.standard_error:.1%} of {self.size}"

    @staticmethod
    def of(right: Tensor) -> Share:
        """The share of what is right, boolean ``(N,)`` or shares ``(N,)``."""
        right = right.cpu().double()
        error = right.std(correction=1) / len(right) ** 0.5 if len(right) > 1 else torch.tensor(torch.nan)
        return Share(right.mean().item(), error.item(), len(right))
