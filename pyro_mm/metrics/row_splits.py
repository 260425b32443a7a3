"""Random divisions of two samples: halves for standard errors, and relabellings for values under equality."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Split = tuple[Tensor, Tensor]  # places among N + M rows of those that count as real and of those that count as fake
Measure = Callable[[Split], Mapping[str, float]]


def whole(n: int, m: int) -> Split:
    """Return the places of N real and M fake rows, the real ones first."""
    return torch.arange(n), torch.arange(n, n + m)


def half_sample_errors(measure: Measure, n: int, m: int, paired: bool, number: int) -> dict[str, float]:
    r"""Return the standard error of each number that a function has of two samples.

    .. math:: \mathrm{se}^2 = \frac1R \sum_r (\theta_r - \bar\theta)^2

    over random halves of both samples, drawn without replacement by torch's generator: the delete-d jackknife with d
    half of the rows, whose factor (n - d) / d is 1. Statistics of nearest neighbours are not smooth enough for the
    jackknife that deletes one row, nor do they bear the ties of a bootstrap.

    Args:
        measure: name -> number, of the places of real and of fake rows.
        n, m: N and M.
        paired: True to take the same half of both.
        number: R, whose error is the proportion 1 / sqrt(2 R) of the result.

    References:
        Shao & Wu 1989 (Annals of Statistics 17).
    """
    found = []
    for _ in range(number):
        real = torch.randperm(n)[: n // 2]
        fake = real if paired else torch.randperm(m)[: m // 2]
        found.append(measure((real, n + fake)))
    return {name: _numbers(found, name).std(correction=0).item() for name in found[0]}


def values_under_equality(measure: Measure, n: int, m: int, paired: bool, number: int) -> dict[str, float]:
    """Return the mean of each number over random relabellings of real and fake rows, by torch's generator.

    Args:
        measure: name -> number, of the places of real and of fake rows.
        n, m: N and M.
        paired: True to exchange rows with their partners only.
        number: the number of relabellings.
    """
    found = []
    for _ in range(number):
        if paired:
            exchanged = torch.rand(n) < 0.5
            places = torch.arange(n)
            found.append(measure((places + n * exchanged, places + n * ~exchanged)))
        else:
            order = torch.randperm(n + m)
            found.append(measure((order[:n], order[n:])))
    return {name: _numbers(found, name).mean().item() for name in found[0]}


def _numbers(found: list[Mapping[str, float]], name: str) -> Tensor:
    return torch.tensor([each[name] for each in found], dtype=torch.float64)
