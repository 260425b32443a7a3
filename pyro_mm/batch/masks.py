"""Masks of rows: boolean tensors, or True or False if that is known of all rows.

Booleans of Python save computations, and waiting for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import reduce
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from ..utils.tensors import constant

Presence = bool | Tensor
MAX_MODALITIES = 16  # whose subsets are enumerated
SURROGATE = "surrogate"  # key of a site's infer: a private latent that the guide infers where its modality is missing


def subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the 2^M - 1 non-empty subsets of M modalities, small ones first.

    Raises:
        ValueError: more than ``MAX_MODALITIES`` modalities.

    Example:
        >>> subsets(["a", "b"])
        [('a',), ('b',), ('a', 'b')]
    """
    if len(names) > MAX_MODALITIES:
        raise ValueError(
            f"{len(names)} modalities have 2^{len(names)} - 1 subsets: draw some of them with "
            "objectives.subset_mean(num_subsets), or name them with MixtureOfProducts(subsets=...)"
        )
    return [each for size in range(1, len(names) + 1) for each in combinations(names, size)]


def all_of(masks: Iterable[Presence]) -> Presence:
    """Return the conjunction of masks; True if there are none."""
    tensors = []
    for mask in masks:
        if isinstance(mask, Tensor):
            tensors.append(mask)
        elif not mask:
            return False
    return reduce(Tensor.__and__, tensors) if tensors else True


def any_of(masks: Iterable[Presence]) -> Presence:
    """Return the disjunction of masks; False if there are none."""
    return invert(all_of(invert(mask) for mask in masks))


def invert(mask: Presence) -> Presence:
    """Return the negation of a mask."""
    return ~mask if isinstance(mask, Tensor) else not mask


def add_event_dims(mask: Tensor, event_dim: int) -> Tensor:
    """Return a mask ``(..)`` as ``(.., 1, .., 1)``, with ``event_dim`` dimensions of size 1 on the right."""
    return mask.reshape(mask.shape + (1,) * event_dim)


def stack_masks(masks: Sequence[Presence], size: int, device: torch.device, nesting: int) -> Presence:
    """Return the masks of T terms as one.

    Args:
        masks: the mask of each term, ``(N,)`` or True or False.
        size: the number of rows N.
        device: the device of the batch.
        nesting: the number of batch dimensions of the story's plates.

    Returns:
        The mask itself if all terms have the same one, else ``(T, 1, .., N)`` with ``nesting`` dimensions after T.
    """
    if all(m is masks[0] for m in masks):
        return masks[0]
    shape = (len(masks), *[1] * (nesting - 1), size)
    if all(isinstance(m, bool) for m in masks):
        return term_flags(masks, device, nesting).expand(shape)
    full = [m if isinstance(m, Tensor) else torch.full((size,), m, device=device) for m in masks]
    return torch.stack(full).reshape(shape)


def term_flags(values: Sequence[Any], device: torch.device, nesting: int) -> Tensor:
    """Return one boolean per term, ``(T, 1, .., 1)`` with ``nesting`` dimensions after T.

    Args:
        values: a boolean per term.
        device: the device of the batch.
        nesting: the number of batch dimensions of the story's plates.
    """
    return constant(tuple(values), torch.bool, device).reshape(-1, *[1] * nesting)
