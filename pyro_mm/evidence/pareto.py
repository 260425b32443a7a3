"""The Pareto k-hat diagnostic of importance weights, for many rows at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDING_SPREAD = 1e-8  # nats: a spread of log-weights that rounding explains, in double precision
MIN_TAIL_LENGTH = 5  # weights that a tail is fitted to, at least
PRIOR_SHAPE = 0.5  # a weak prior of the shape, worth PRIOR_WEIGHTS weights
PRIOR_WEIGHTS = 10


def tail_length(num_draws: int) -> int:
    """Return the number of largest weights, of K, that the diagnostic uses: min(K / 5, 3 sqrt(K)), rounded up."""
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def pareto_k(largest: Tensor, num_draws: int, rounding_spread: float | Tensor = ROUNDING_SPREAD) -> Tensor:
    r"""Estimate the shape k of the tail of importance weights, per row.

    A generalised Pareto distribution, which has 1/k finite moments, is fitted to the largest weights minus the largest
    one below them. Below k = 0.5 the variance of the weights is finite; up to about 0.7 estimates and their standard
    errors are still reliable at practical K; above, they are not, and above 1 the mean itself need not exist.

    Args:
        largest: the ``tail_length(K) + 1`` largest log-weights of each row in any order, ``(.., L)``, in nats.
        num_draws: K, the number of weights that they are the largest of.
        rounding_spread: a spread of log-weights that is nothing but rounding, in nats; a number or ``(..)``.

    Returns:
        k-hat, ``(..)``: 0 for log-weights that spread by less than ``rounding_spread``, NaN for a tail of fewer than
        five weights (K below 21).

    References:
        The fit is the weighted mean over a grid of Zhang & Stephens 2009, "A new and efficient estimation method for
        the generalized Pareto distribution", Technometrics 51:316, with the prior of Vehtari et al. 2024, "Pareto
        smoothed importance sampling", JMLR 25:72, whose smoothing of the weights is not done here.
    """
    length = tail_length(num_draws)
    if length < MIN_TAIL_LENGTH:
        return torch.full(largest.shape[:-1], math.nan, dtype=largest.dtype, device=largest.device)

    log_w = largest.double().sort(-1).values[..., -length - 1 :]
    equal = log_w[..., -1] - log_w[..., 0] < rounding_spread
    weights = (log_w - log_w[..., -1:]).exp()
    tail = (weights[..., 1:] - weights[..., :1]).clamp(min=torch.finfo(torch.float64).tiny)

    # a grid of b = -k / scale, at each of which k has a closed form
    first_quartile = tail[..., int(length / 4 + 0.5) - 1]
    grid_size = 30 + int(math.sqrt(length))
    grid = torch.arange(1, grid_size + 1, dtype=tail.dtype, device=tail.device) - 0.5
    b = (1 - (grid_size / grid).sqrt()) / (3 * first_quartile[..., None]) + 1 / tail[..., -1][..., None]
    k = torch.stack([torch.log1p(-b_i[..., None] * tail).mean(-1) for b_i in b.unbind(-1)], -1)
    profile_log_likelihood = length * ((-b / k).log() - k - 1)

    b_mean = (b * profile_log_likelihood.softmax(-1)).sum(-1)
    k_mean = torch.log1p(-b_mean[..., None] * tail).mean(-1)
    k_hat = (length * k_mean + PRIOR_WEIGHTS * PRIOR_SHAPE) / (length + PRIOR_WEIGHTS)
    return torch.where(equal, 0.0, k_hat).to(largest.dtype)
