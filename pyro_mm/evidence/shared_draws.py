"""Sums of importance weights over groups of draws that all rows share, for the covariances of rows' errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_GROUPS = 50


class GroupSums:
    r"""Sums of the weights of each row over R groups of successive particles, R at most 50.

    With the sum :math:`S_{gn}` of :math:`K_g` weights and their mean :math:`m_n` over all K particles, the relative
    deviations are

    .. math:: d_{gn} = R \, \frac{S_{gn} - K_g m_n}{K m_n}, \qquad
              \mathrm{cov}(\log m_n, \log m_l) \approx \frac{1}{R (R - 1)} \sum_g d_{gn} d_{gl}

    Args:
        num_particles: K.
        group_size: the number of successive particles that depend on each other, which a group holds whole.
    """

    def __init__(self, num_particles: int, group_size: int = 1):
        self._size = group_size * max(1, math.ceil(num_particles / (MOST_GROUPS * group_size)))
        self._log_sums: list[Tensor] = []
        self._sizes: list[int] = []

    def add(self, log_weights: Tensor) -> None:
        """Add the log-weights of the next k particles, ``(k, N)``, in nats."""
        while len(log_weights):
            if not self._sizes or self._sizes[-1] == self._size:
                self._sizes.append(0)
                self._log_sums.append(torch.full_like(log_weights[0], -math.inf))
            step = min(self._size - self._sizes[-1], len(log_weights))
            self._log_sums[-1] = torch.logaddexp(self._log_sums[-1], log_weights[:step].logsumexp(0))
            self._sizes[-1] += step
            log_weights = log_weights[step:]

    def deviations(self) -> Tensor:
        """Return the relative deviations of the groups, ``(R, N)``; 0 in rows without any weight."""
        log_sums = torch.stack(self._log_sums)
        shares = (log_sums - log_sums.logsumexp(0)).exp()
        sizes = shares.new_tensor(self._sizes)
        return (len(sizes) * (shares - (sizes / sizes.sum())[:, None])).nan_to_num(0.0)
