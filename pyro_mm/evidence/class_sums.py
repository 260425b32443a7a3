"""A streaming accumulator of importance weights by class."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class ClassAccumulator:
    r"""Streaming accumulator of the shares that C classes have in the importance weights of a row.

    With the sums :math:`S_{gc}` of the weights of class c over group g of successive particles, :math:`S_g = \sum_c
    S_{gc}`, :math:`S = \sum_g S_g`, and R groups,

    .. math:: \hat p_c = \frac{\sum_g S_{gc}}{S}, \qquad
              \mathrm{se}^2(\hat p_c) = \frac{R}{R - 1} \sum_g \frac{(S_{gc} - \hat p_c S_g)^2}{S^2}

    the error of a ratio by the delta method. Squares are taken about the shares of the first block, so that equal
    shares in all particles have an error of rounding alone.

    Args:
        group_size: the number of successive particles that depend on each other; the last group may be smaller.
    """

    def __init__(self, group_size: int = 1):
        self.group_size = group_size
        self._num_groups = 0
        self._open_size = 0
        self._open: Tensor | None = None  # log-sums of the group that is not whole yet, (C, N)
        self._pivot: Tensor | None = None  # shares about which squares are taken, (C, N)
        self._log_scale: Tensor | None = None  # (N,); the sums below are in its units
        self._sums: list[Tensor] = []  # over groups g: S_gc, r_gc^2, r_gc S_g and S_g^2, with r_gc = S_gc - pivot_c S_g

    def add(self, log_weights: Tensor) -> None:
        """Add the log-weights of the next k particles, ``(C, k, N)``, in nats."""
        log_weights = log_weights.double()
        while log_weights.shape[1]:
            size = log_weights.shape[1]
            if not self._open_size and size >= self.group_size:
                whole = size // self.group_size
                groups = log_weights[:, : whole * self.group_size].unflatten(1, (whole, self.group_size))
                self._close(groups.logsumexp(2))
                log_weights = log_weights[:, whole * self.group_size :]
                continue
            step = min(self.group_size - self._open_size, size)
            part = log_weights[:, :step].logsumexp(1)
            self._open = part if self._open is None else torch.logaddexp(self._open, part)
            self._open_size += step
            log_weights = log_weights[:, step:]
            if self._open_size == self.group_size:
                self._close_open_group()

    def shares(self) -> tuple[Tensor, Tensor]:
        """Return the classes' shares and their standard errors, ``(N, C)`` each; NaN in rows without any weight."""
        if self._open_size:
            self._close_open_group()
        assert self._pivot is not None  # there is one particle at least
        sums, squares, products, totals = self._sums
        total = sums.sum(0)
        shares = sums / total

        # squares about the shares themselves, from those about the pivot
        offset = shares - self._pivot
        spread = (squares - 2 * offset * products + offset.square() * totals) / total.square()
        correction = self._num_groups / (self._num_groups - 1) if self._num_groups > 1 else math.nan
        return shares.T, (spread.clamp(min=0) * correction).sqrt().T

    def _close_open_group(self) -> None:
        assert self._open is not None
        self._close(self._open[:, None])
        self._open, self._open_size = None, 0

    def _close(self, log_sums: Tensor) -> None:
        """Add whole groups by the logarithms of their sums, ``(C, G, N)``."""
        self._num_groups += log_sums.shape[1]
        log_scale = log_sums.amax((0, 1))
        if self._log_scale is not None:
            log_scale = torch.maximum(log_scale, self._log_scale)
        log_scale = log_scale.nan_to_num(neginf=0.0)  # a row without any weight so far

        by_class = (log_sums - log_scale).exp()
        total = by_class.sum(0)
        if self._pivot is None:
            sums = by_class.sum(1)
            self._pivot = (sums / sums.sum(0)).nan_to_num(1 / len(sums))
        residual = by_class - self._pivot[:, None] * total
        new = [by_class.sum(1), residual.square().sum(1), (residual * total).sum(1), total.square().sum(0)]
        if self._log_scale is not None:
            factor = (self._log_scale - log_scale).exp()
            old = [x * factor**power for x, power in zip(self._sums, (1, 2, 2, 2), strict=True)]
            new = [x + y for x, y in zip(old, new, strict=True)]
        self._sums, self._log_scale = new, log_scale
