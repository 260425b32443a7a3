"""Steps of sequences: those before the end, what stands behind it, and likelihoods that count the former alone."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from .masks import Presence, add_event_dims


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """Return the steps before the end, boolean ``(.., steps)``, of sequences of ``lengths`` ``(..)``."""
    return torch.arange(steps, device=lengths.device) < lengths[..., None]


def fill_padding(values: Tensor, lengths: Tensor, complete: Tensor) -> Tensor:
    """Return sequences with copies of the last valid step behind the end, so that all steps lie in one support.

    Args:
        values: ``(N, T, *event)``; anything may stand behind the end, and in rows that are not complete.
        lengths: numbers of valid steps, ``(N,)``. A sequence of length 0 gets the first step of another row that is
            complete, and zeros if there is none.
        complete: the rows whose valid steps are numbers to go by, boolean ``(N,)``.
    """
    steps = values.shape[1]
    if not bool((lengths < steps).any()):
        return values
    last = (lengths - 1).clamp(min=0)[:, None]
    source = torch.minimum(torch.arange(steps, device=values.device), last)
    filled = values[torch.arange(len(values), device=values.device)[:, None], source]
    empty = lengths == 0
    if not bool(empty.any()):
        return filled
    known = complete & ~empty
    step = values[known][0, 0] if bool(known.any()) else values.new_zeros(())
    return torch.where(add_event_dims(empty, values.dim() - 1), step, filled)


def lengths_of_missing(lengths: Tensor, mask: Presence, steps: int) -> Tensor:
    """Return lengths with all T steps in the place of 0 where the modality is missing.

    A row that lacks a sequence has no length to speak of; one that is given is that of the sequence to be generated.

    Args:
        lengths: ``(N,)``.
        mask: the rows that have the modality, boolean ``(N,)``, or True or False for all.
        steps: T.
    """
    if mask is True:
        return lengths
    missing = ~mask if isinstance(mask, Tensor) else torch.ones_like(lengths, dtype=torch.bool)
    return torch.where(missing.to(lengths.device) & (lengths == 0), steps, lengths)


def count_valid_steps(name: str, d: Any, lengths: Tensor, knows_lengths: bool) -> Any:
    r"""Return the distribution of a sequence whose log-density is that of the steps before the end.

    .. math:: \log p(x_{1:n}) = \sum_{t \le n} \log p_t(x_t)

    Args:
        name: the modality.
        d: a distribution of event shape ``(T, ..)`` whose steps are independent of each other; anything else is left
            as it is, if the function that made it knows the lengths.
        lengths: n, ``(N,)``.
        knows_lengths: True if the function that made the distribution was given the lengths.

    Raises:
        ValueError: a distribution of whole sequences, from a function that does not know the lengths.
    """
    if isinstance(d, dist.MaskedDistribution):
        return dist.MaskedDistribution(count_valid_steps(name, d.base_dist, lengths, knows_lengths), d._mask)
    dims = getattr(d, "reinterpreted_batch_ndims", 0) if isinstance(d, torch.distributions.Independent) else 0
    if dims and d.batch_shape[-1:] not in (lengths.shape, (1,), ()):
        return d  # too few of its dimensions are those of a row, which another check puts into words
    if dims:
        valid = add_event_dims(valid_steps(lengths, d.event_shape[0]), dims - 1)
        return dist.Independent(d.base_dist.mask(valid), dims, validate_args=False)
    if not isinstance(d, torch.distributions.Distribution) or knows_lengths or not d.event_shape:
        return d  # another audit speaks of what is no distribution, and of values of another shape
    raise ValueError(
        f"modality {name!r}: the batch has lengths of it, and {type(d).__name__} is a distribution of all "
        f"{d.event_shape[0]} steps as a whole, from which no steps can be left out: take one of independent steps, "
        ".to_event(..), or a function with a parameter lengths that gives the distribution of the valid ones"
    )
