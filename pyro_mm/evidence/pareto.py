"""The Pareto k-hat diagnostic of importance weights, for many rows at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDING_SPREAD = 1e-8  # nats: a spread of log-weights that rounding explains, in double precision
MIN_TAIL_LENGTH = 5  # draws that a tail is fitted to


def tail_length(num_draws: int) -> int:
    """How many of the largest of K weights the diagnostic looks at: ``min(K / 5, 3 sqrt(K))``, rounded up."""
    return math.ceil(min(num_draws / 5, 3 * math.sqrt(num_draws)))


def pareto_k(largest: Tensor, num_draws: int, flat: float | Tensor = ROUNDING_SPREAD) -> Tensor:
    r"""The shape of a generalised Pareto distribution fitted to the largest importance weights of every row.

    Below 0.7 the estimate and its standard error can be trusted; above, the variance of the weights is too large,
    or infinite. Zero where the log-weights spread by less than ``flat``, NaN where the tail has fewer than five draws.

    Args:
        largest: the ``tail_length(K) + 1`` largest log-weights of every row, in any order, ``(.., L)``.
        num_draws: K, the number of draws they are the largest of.
        flat: a spread of log-weights that is nothing but rounding, in nats; a number or one for every row.

    The fit is the weighted mean over a grid of Zhang & Stephens 2009 (Technometrics 51:316) with the prior of
    Vehtari et al. 2024 (JMLR 25:72), whose smoothing of the weights is not done here.
    """
    count = tail_length(num_draws)
    if count < MIN_TAIL_LENGTH:
        return torch.full(largest.shape[:-1], math.nan, dtype=largest.dtype, device=largest.device)
    log_w = largest.double().sort(-1).values[..., -count - 1 :]
    even = log_w[..., -1] - log_w[..., 0] < flat
    weights = (log_w - log_w[..., -1:]).exp()
    tail = (weights[..., 1:] - weights[..., :1]).clamp(min=torch.finfo(torch.float64).tiny)
    quartile, top = tail[..., int(count / 4 + 0.5) - 1], tail[..., -1]
    size = 30 + int(math.sqrt(count))
    grid = torch.arange(1, size + 1, dtype=tail.dtype, device=tail.device) - 0.5
    b = (1 - (size / grid).sqrt()) / (3 * quartile[..., None]) + 1 / top[..., None]
    k = torch.stack([torch.log1p(-b_i[..., None] * tail).mean(-1) for b_i in b.unbind(-1)], -1)
    profile = count * ((-b / k).log() - k - 1)
    b_mean = (b * profile.softmax(-1)).sum(-1)
    k_mean = torch.log1p(-b_mean[..., None] * tail).mean(-1)
    k_hat = (count * k_mean + 10 * 0.5) / (count + 10)
    return torch.where(even, 0.0, k_hat).to(largest.dtype)
