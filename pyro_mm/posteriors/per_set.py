"""Caches of what a posterior computes, per step and per set of present modalities."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import cached, is_cached, put
from ..batch.masks import Presence, any_of, stack_masks

Result = TypeVar("Result")


def per_set(
    batch: Batch, owner: object, function: Callable[[Batch], tuple[Tensor, ...]], search_above: int = 0
) -> tuple[Tensor, ...]:
    """Return ``function(batch)``, computed once per step for every set of modalities.

    An objective shows a batch as several sets at once, stacked to the left of the rows. The set that one term encodes
    may be the set that another term is given.

    Args:
        batch: the rows, as several terms see them.
        owner: the posterior that the function belongs to. It is the key of cached results, so pass one function per
            owner.
        function: a function of the values and masks of a batch alone, which returns tensors ``(.., N, F)``.
        search_above: number of terms up to which each is computed by itself, since a search for equal sets takes
            longer.

    Returns:
        The tensors of ``function``.
    """
    context = batch._context
    cache = context.cache
    stack = context.stack
    terms = context.term_masks
    if context.latents or cache is None or stack is None or terms is None or len(terms) <= search_above:
        return function(batch)

    nesting = -stack.dim - 1  # batch dimensions to the right of the terms
    keys = [_key(owner, masks) for masks in terms]
    new = {key: t for t, key in enumerate(keys) if not is_cached(cache, key)}
    if new:
        each = [terms[t] for t in new.values()]
        masks = {n: stack_masks([m[n] for m in each], batch.size, batch.device, nesting) for n in batch.names}
        out = function(batch.view(masks, stack, cache, term_masks=each))
        for place, (key, those) in enumerate(zip(new, each, strict=True)):
            # a tensor without the dimension of the terms does not depend on the set
            put(cache, key, tuple(x[place] if x.dim() - 1 > nesting else x for x in out), owner, those)
        if list(new) == keys:
            return out
    found = [cache[key][0] for key in keys]
    return tuple(_stack_terms(pieces, nesting) for pieces in zip(*found, strict=True))


def _stack_terms(pieces: tuple[Tensor, ...], nesting: int) -> Tensor:
    """Stack the results of terms along a new first dimension; return the result itself if all have the same one.

    Args:
        pieces: one tensor per term.
        nesting: the number of batch dimensions of each, to which it is padded on the left.
    """
    if all(piece is pieces[0] for piece in pieces):
        return pieces[0]
    return torch.stack([piece.reshape(*[1] * (nesting + 1 - piece.dim()), *piece.shape) for piece in pieces])


def per_view(batch: Batch, owner: object, function: Callable[[Batch], Result]) -> Result:
    """Return ``function(batch)``, computed once per step for the masks that a batch shows to the terms.

    Args:
        batch: the rows, as several terms see them.
        owner: the posterior that the function belongs to. Results are cached by it.
        function: a function of the values and masks of a batch alone.
    """
    cache = batch._context.cache
    terms = batch._context.term_masks
    if batch._context.latents or cache is None or terms is None:
        return function(batch)
    key = ("per view", *(_key(owner, masks) for masks in terms))
    result: Result = cached(cache, key, lambda: function(batch), owner, terms)
    return result


def rows_with_any(batch: Batch, names: Iterable[str]) -> Presence:
    """Return the rows that have any of some modalities.

    Returns:
        Booleans ``(.., N)``; True if every term sees one in every row, False if none sees one.
    """
    names = tuple(names)
    each = [any_of(masks.get(name, False) for name in names) for masks in batch.terms()]
    if all(mask is True for mask in each):
        return True
    return any_of(batch.presence(name) for name in names)


def _key(owner: object, masks: Mapping[str, Presence]) -> Hashable:
    """Return the key of an owner's result for the masks of a term, which tensors enter by identity."""
    return (id(owner), *((name, m if isinstance(m, bool) else id(m)) for name, m in masks.items()))
