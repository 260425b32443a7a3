"""Masks that are True or False where that is known of all rows at once, which spares work and device syncs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..utils.tensors import constant

Presence = bool | Tensor
MOST = 16  # modalities whose subsets are taken one by one


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """All 2^M - 1 that are not empty, small ones first. Raises a ValueError where they are too many to go through."""
    if len(names) > MOST:
        raise ValueError(
            f"{len(names)} modalities have 2^{len(names)} - 1 subsets: draw some of them with "
            "objectives.subset_mean(num_subsets), or name them with MixtureOfProducts(subsets=...)"
        )
    return [each for size in range(1, len(names) + 1) for each in combinations(names, size)]


def all_of(masks: Iterable[Presence]) -> Presence:
    """Where every mask holds; True of none."""
    tensors = []
    for mask in masks:
        if isinstance(mask, Tensor):
            tensors.append(mask)
        elif not mask:
            return False
    return reduce(Tensor.__and__, tensors) if tensors else True


def any_of(masks: Iterable[Presence]) -> Presence:
    """Where any mask holds; False of none."""
    return negated(all_of(negated(mask) for mask in masks))


def negated(mask: Presence) -> Presence:
    """Where the mask does not hold."""
    return ~mask if isinstance(mask, Tensor) else not mask


def over_events(mask: Tensor, event_dim: int) -> Tensor:
    """The mask with event dimensions of size 1 to its right."""
    return mask.reshape(mask.shape + (1,) * event_dim)


def stacked(masks: Sequence[Presence], size: int, device: torch.device, nesting: int) -> Presence:
    """The masks of T terms as one: that of all where they are one, else ``(T, 1, .., size)``, ``nesting`` after T."""
    if all(m is masks[0] for m in masks):
        return masks[0]
    shape = (len(masks), *[1] * (nesting - 1), size)
    if all(isinstance(m, bool) for m in masks):
        return flags(masks, device, nesting).expand(shape)
    full = [m if isinstance(m, Tensor) else torch.full((size,), m, device=device) for m in masks]
    return torch.stack(full).reshape(shape)


def flags(values: Sequence[Any], device: torch.device, nesting: int) -> Tensor:
    """One boolean for each term, ``(T, 1, .., 1)``."""
    return constant(tuple(values), torch.bool, device).reshape(-1, *[1] * nesting)
