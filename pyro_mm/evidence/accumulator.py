"""A streaming accumulator of importance weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .evidence import ROUNDING_UNITS, Evidence
from .pareto import ROUNDING_SPREAD, pareto_k, tail_length
from .shared_draws import GroupSums


def evidence_from_weights(log_weights: Tensor, quantity: str, shared: bool = False) -> Evidence:
    """Return the evidence that independent log-weights give.

    Args:
        log_weights: ``(K, N)``, in nats.
        quantity: the name of the log-likelihood.
        shared: True if rows share draws of a global latent.
    """
    accumulator = WeightAccumulator(len(log_weights), shared=shared)
    accumulator.add(log_weights)
    return accumulator.evidence(quantity)


class WeightAccumulator:
    r"""Streaming accumulator of K importance weights per row, that come in blocks of any size.

    It keeps a few sums, in log space and double precision, and the largest weights for k-hat. Particles come in groups
    of successive ones that depend on each other. With group sums :math:`S_g` of :math:`n_g` weights, R groups and
    :math:`m = \frac1K \sum_k w_k`,

    .. math:: \mathrm{se}^2(\log m) = \frac{R}{R - 1} \sum_g \frac{(S_g - n_g m)^2}{(K m)^2}

    Args:
        num_particles: K.
        group_size: the number of particles in a group; the last group may be smaller.
        shared: True if rows share draws of a global latent, so that their errors are correlated.
    """

    def __init__(self, num_particles: int, group_size: int = 1, shared: bool = False):
        self.group_size = group_size
        self._shared = GroupSums(num_particles, group_size) if shared else None
        self.num_largest = min(num_particles, tail_length(num_particles) + 1)
        # particle counts at which the running estimate is recorded: 1, 2, 4, .., K
        self.checkpoints = {min(num_particles, 2**j) for j in range(math.ceil(math.log2(num_particles)) + 1)}
        self.count = 0  # particles so far

        self._log_sum: Any = None  # log sum_k w_k
        self._log_sum_squares: Any = None  # log sum_k w_k^2

        # sums over groups, of which the open one is not whole yet; all unused for groups of one
        self._num_groups = 0
        self._log_sum_group_squares: Any = None  # log sum_g S_g^2
        self._log_sum_group_products: Any = None  # log sum_g n_g S_g
        self._sum_squared_sizes = 0.0  # sum_g n_g^2
        self._open_size = 0
        self._log_open_sum: Any = None

        self._largest: list[Tensor] = []
        self._running: dict[int, tuple[Tensor, Tensor]] = {}

    def add(self, log_weights: Tensor) -> None:
        """Add the log-weights of the next k particles, ``(k, N)``, in nats."""
        self._dtype = log_weights.dtype
        log_weights = log_weights.double()
        self._keep_largest(log_weights)
        if self._shared is not None:
            self._shared.add(log_weights)
        while len(log_weights):
            next_checkpoint = min(point for point in self.checkpoints if point > self.count)
            step = min(next_checkpoint - self.count, len(log_weights))
            self._add_to_sums(log_weights[:step])
            log_weights = log_weights[step:]
            if self.count in self.checkpoints:
                self._running[self.count] = self._estimate()

    def evidence(self, quantity: str) -> Evidence:
        """Return the evidence that all weights so far give, under the name of its quantity."""
        log_prob, error = self._estimate()
        ess = (2 * self._log_sum - self._log_sum_squares).exp().to(self._dtype)
        largest = self._top()
        eps = torch.finfo(self._dtype).eps
        rounding = ROUNDING_UNITS * eps * largest[:, 0].abs().clamp(min=ROUNDING_UNITS)
        k_hat = pareto_k(largest, self.count, rounding.clamp(min=ROUNDING_SPREAD)).to(self._dtype)
        shared = () if self._shared is None else (self._shared.deviations().to(self._dtype),)
        return Evidence(log_prob, error, ess, k_hat, quantity, self.count, self._running, shared=shared)

    def _add_to_sums(self, log_w: Tensor) -> None:
        self.count += len(log_w)
        self._log_sum = _log_add(self._log_sum, log_w.logsumexp(0))
        self._log_sum_squares = _log_add(self._log_sum_squares, (2 * log_w).logsumexp(0))
        if self.group_size > 1:
            self._add_to_groups(log_w)

    def _add_to_groups(self, log_w: Tensor) -> None:
        size = self.group_size
        while len(log_w):
            if not self._open_size and len(log_w) >= size:
                whole = len(log_w) // size
                self._close_groups(log_w[: whole * size].unflatten(0, (whole, size)).logsumexp(1))
                log_w = log_w[whole * size :]
                continue
            step = min(size - self._open_size, len(log_w))
            self._log_open_sum = _log_add(self._log_open_sum if self._open_size else None, log_w[:step].logsumexp(0))
            self._open_size += step
            log_w = log_w[step:]
            if self._open_size == size:
                self._close_groups(self._log_open_sum[None])
                self._open_size = 0

    def _close_groups(self, log_sums: Tensor) -> None:
        """Add whole groups, by the logarithms of their sums, ``(G, N)``."""
        self._num_groups += len(log_sums)
        self._sum_squared_sizes += len(log_sums) * self.group_size**2
        self._log_sum_group_squares = _log_add(self._log_sum_group_squares, (2 * log_sums).logsumexp(0))
        log_products = log_sums.logsumexp(0) + math.log(self.group_size)
        self._log_sum_group_products = _log_add(self._log_sum_group_products, log_products)

    def _estimate(self) -> tuple[Tensor, Tensor]:
        """Return (log m, its standard error), ``(N,)`` each, from the weights so far."""
        num_groups, log_squares, log_products, squared_sizes = self._group_sums()
        k = self.count
        # sum_g (S_g - n_g m)^2 / (K m)^2, multiplied out
        spread = (
            (log_squares - 2 * self._log_sum).exp()
            - 2 * (log_products - self._log_sum).exp() / k
            + squared_sizes / k**2
        )
        correction = num_groups / (num_groups - 1) if num_groups > 1 else math.nan
        variance = spread.clamp(min=0) * correction
        return (self._log_sum - math.log(k)).to(self._dtype), variance.sqrt().to(self._dtype)

    def _group_sums(self) -> tuple[int, Tensor, Tensor, float]:
        """Return R, log sum S_g^2, log sum n_g S_g and sum n_g^2, the open group counted as one."""
        if self.group_size == 1:
            return self.count, self._log_sum_squares, self._log_sum, self.count
        if not self._open_size:
            return (
                self._num_groups, self._log_sum_group_squares, self._log_sum_group_products, self._sum_squared_sizes
            )  # fmt: skip
        return (
            self._num_groups + 1,
            _log_add(self._log_sum_group_squares, 2 * self._log_open_sum),
            _log_add(self._log_sum_group_products, self._log_open_sum + math.log(self._open_size)),
            self._sum_squared_sizes + self._open_size**2,
        )

    def _keep_largest(self, log_w: Tensor) -> None:
        self._largest.append(log_w.T)
        if sum(x.shape[-1] for x in self._largest) >= 4 * self.num_largest:
            self._largest = [self._top()]

    def _top(self) -> Tensor:
        """Return the largest log-weights so far, ``(N, L)``, in decreasing order."""
        largest = torch.cat(self._largest, -1)
        return largest.topk(min(self.num_largest, largest.shape[-1]), -1).values


def _log_add(a: Tensor | None, b: Tensor) -> Tensor:
    """Return log(exp(a) + exp(b)); b if a is None, the logarithm of nothing."""
    return b if a is None else torch.logaddexp(a, b)
