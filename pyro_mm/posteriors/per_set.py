"""What a posterior computes of a set of modalities, computed once a step for all terms that encode or are given it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import cached, is_cached, put
from ..batch.masks import Presence, any_of, stack_masks


def per_set(batch: Batch, owner: object, f: Callable[[Batch], tuple[Tensor, ...]], few: int = 0) -> tuple[Tensor, ...]:
    """``f(batch)``, of which every set of modalities is computed once a step.

    An objective shows a batch as several sets at once, stacked to the left of the rows, and the same set may be what
    one term encodes and another one is given.

    Args:
        owner: whose function it is; one for each owner.
        f: a function of the values and masks of a batch alone, to tensors ``(.., N, F)``.
        few: with so many terms it is computed for each, where looking for equal sets would take longer.
    """
    cache, stack, terms = batch._context.cache, batch._context.stack, batch._context.term_masks
    if batch._context.latents or cache is None or stack is None or terms is None or len(terms) <= few:
        return f(batch)

    nesting = -stack.dim - 1
    keys = [_key(owner, masks) for masks in terms]
    new = {key: t for t, key in enumerate(keys) if not is_cached(cache, key)}
    if new:
        each = [terms[t] for t in new.values()]
        masks = {n: stack_masks([m[n] for m in each], batch.size, batch.device, nesting) for n in batch.names}
        out = f(batch.view(masks, stack, cache, term_masks=each))
        for place, (key, those) in enumerate(zip(new, each, strict=True)):
            # a tensor without the stack's dimension does not depend on the set
            put(cache, key, tuple(x[place] if x.dim() - 1 > nesting else x for x in out), owner, those)
        if list(new) == keys:
            return out
    found = [cache[key][0] for key in keys]
    return tuple(_stack_terms(pieces, nesting) for pieces in zip(*found, strict=True))


def _stack_terms(pieces: tuple[Tensor, ...], nesting: int) -> Tensor:
    if all(piece is pieces[0] for piece in pieces):
        return pieces[0]
    return torch.stack([piece.reshape(*[1] * (nesting + 1 - piece.dim()), *piece.shape) for piece in pieces])


def per_view(batch: Batch, owner: object, f: Callable[[Batch], Any]) -> Any:
    """``f(batch)``, run once a step for what the batch shows."""
    cache, terms = batch._context.cache, batch._context.term_masks
    if batch._context.latents or cache is None or terms is None:
        return f(batch)
    key = ("once", *(_key(owner, masks) for masks in terms))
    return cached(cache, key, lambda: f(batch), owner, terms)


def rows_with_any(batch: Batch, names: Iterable[str]) -> Presence:
    """Which rows have any of these modalities: True where every term shows every row one."""
    names = tuple(names)
    each = [any_of(masks.get(n, False) for n in names) for masks in batch.terms()]
    return True if all(m is True for m in each) else any_of(batch.presence(n) for n in names)


def _key(owner: object, masks: Any) -> Hashable:
    return (id(owner), *((n, m if isinstance(m, bool) else id(m)) for n, m in masks.items()))
