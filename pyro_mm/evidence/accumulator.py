"""A streaming accumulator of importance weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .evidence import ROUNDING_UNITS, Evidence
from .pareto import ROUNDING_SPREAD, pareto_k, tail_length


def evidence_from_weights(log_w: Tensor, quantity: str) -> Evidence:
    """The evidence that independent log-weights ``(K, N)`` give."""
    sums = WeightAccumulator(len(log_w))
    sums.add(log_w)
    return sums.evidence(quantity)


class WeightAccumulator:
    r"""What is kept of the log-weights of K particles that come in blocks: a few sums, and the largest weights.

    Particles come in groups of ``group`` successive ones that depend on each other, the last one maybe smaller. With
    group sums :math:`S_g` of :math:`n_g` weights, R groups and :math:`m = \frac1K \sum_k w_k`,

    .. math:: \mathrm{se}^2(\log m) = \frac{R}{R - 1} \sum_g (S_g - n_g m)^2 / (K m)^2
    """

    def __init__(self, num_particles: int, group: int = 1):
        self.group, self.keep = group, min(num_particles, tail_length(num_particles) + 1)
        self.points = {min(num_particles, 2**j) for j in range(math.ceil(math.log2(num_particles)) + 1)}
        self.count = 0  # particles
        self.groups = 0  # whole groups
        self.open = 0  # particles of the group that is not whole
        self.one: Any = None
        self.two: Any = None
        self.pending: Any = None
        self.squares: Any = None
        self.cross: Any = None
        self.sizes = 0.0  # the sum of n_g^2
        self.largest: list[Tensor] = []
        self.running: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, log_w: Tensor) -> None:
        """Takes the log-weights of the next k particles, ``(k, N)``."""
        self.dtype, log_w = log_w.dtype, log_w.double()
        self._keep_largest(log_w)
        while len(log_w):
            step = min(min(p for p in self.points if p > self.count) - self.count, len(log_w))
            self._add(log_w[:step])
            log_w = log_w[step:]
            if self.count in self.points:
                self.running[self.count] = self._estimate()

    def evidence(self, quantity: str) -> Evidence:
        """The estimate from all that was added."""
        log_prob, error = self._estimate()
        ess = (2 * self.one - self.two).exp().to(self.dtype)
        top = self._top()
        rounding = ROUNDING_UNITS * torch.finfo(self.dtype).eps * top[:, 0].abs().clamp(min=ROUNDING_UNITS)
        k_hat = pareto_k(top, self.count, rounding.clamp(min=ROUNDING_SPREAD)).to(self.dtype)
        return Evidence(log_prob, error, ess, k_hat, quantity, self.count, self.running)

    def _add(self, log_w: Tensor) -> None:
        self.count += len(log_w)
        self.one = _log_add(self.one, log_w.logsumexp(0))
        self.two = _log_add(self.two, (2 * log_w).logsumexp(0))
        while len(log_w) and self.group > 1:
            if not self.open and len(log_w) >= self.group:
                whole = len(log_w) // self.group
                self._close(log_w[: whole * self.group].unflatten(0, (whole, self.group)).logsumexp(1), self.group)
                log_w = log_w[whole * self.group :]
                continue
            step = min(self.group - self.open, len(log_w))
            self.pending = _log_add(self.pending if self.open else None, log_w[:step].logsumexp(0))
            self.open += step
            log_w = log_w[step:]
            if self.open == self.group:
                self._close(self.pending[None], self.group)
                self.open = 0

    def _close(self, sums: Tensor, size: int) -> None:
        self.groups += len(sums)
        self.sizes += len(sums) * size**2
        self.squares = _log_add(self.squares, (2 * sums).logsumexp(0))
        self.cross = _log_add(self.cross, sums.logsumexp(0) + math.log(size))

    def _estimate(self) -> tuple[Tensor, Tensor]:
        k, r = self.count, self.groups
        squares, cross, sizes = self.squares, self.cross, self.sizes
        if self.group == 1:
            r, squares, cross, sizes = k, self.two, self.one, k
        elif self.open:
            r, sizes = r + 1, sizes + self.open**2
            squares = _log_add(squares, 2 * self.pending)
            cross = _log_add(cross, self.pending + math.log(self.open))
        spread = (squares - 2 * self.one).exp() - 2 * (cross - self.one).exp() / k + sizes / k**2
        variance = spread.clamp(min=0) * (r / (r - 1) if r > 1 else math.nan)
        return (self.one - math.log(k)).to(self.dtype), variance.sqrt().to(self.dtype)

    def _keep_largest(self, log_w: Tensor) -> None:
        self.largest.append(log_w.T)
        if sum(x.shape[-1] for x in self.largest) >= 4 * self.keep:
            self.largest = [self._top()]

    def _top(self) -> Tensor:
        top = torch.cat(self.largest, -1)
        return top.topk(min(self.keep, top.shape[-1]), -1).values


def _log_add(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else torch.logaddexp(a, b)
