"""The state of one pass over a batch: its term stack, its cache, the masks of each term, and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .masks import Presence

Cache = dict[Any, Any]  # key -> (value, whether it has a gradient, objects to keep alive)
DrawMissing = Callable[[str, Any, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class TermStack:
    """The terms of an objective, stacked to the left of a story's plates.

    Attributes:
        decodes: modality -> the numbers of the terms that decode it.
        terms: the number of terms T.
        dim: the batch dimension of the terms, negative.
    """

    decodes: Mapping[str, tuple[int, ...]]
    terms: int = 1
    dim: int = -2


class Context(NamedTuple):
    """State that an evaluation adds to the rows of a batch: immutable, and replaced as a whole.

    Attributes:
        stack: the terms that the rows are shown to; None outside an objective.
        cache: results that the terms and passes of one step share; None where nothing is cached.
        term_masks: the masks of each term alone: one may be True or False where the stacked mask is a tensor; None for
            the batch's.
        on_use: called with a modality's name when its observed values are used by a story.
        draw_missing: ``(name, distribution, plates)`` -> a draw of a missing modality for each element of the plates;
            None to sample from the distribution.
        values_only: True if ``observe`` makes no site, and runs no decoder but to draw missing values.
        latents: the latents that a guide has drawn and shows to the posteriors after them as modalities.
    """

    stack: TermStack | None = None
    cache: Cache | None = None
    term_masks: Sequence[Mapping[str, Presence]] | None = None
    on_use: Callable[[str], Any] | None = None
    draw_missing: DrawMissing | None = None
    values_only: bool = False
    latents: frozenset[str] = frozenset()

    @property
    def is_plain(self) -> bool:
        """True if no objective and no guide has added anything to the rows."""
        return self.stack is None and self.cache is None and not self.latents


PLAIN = Context()


def cached(cache: Cache, key: Hashable, compute: Callable[[], Any], *alive: object) -> Any:
    """Return the cached value for ``key``, computing it on first use.

    Args:
        cache: the cache of a step.
        key: what the value depends on, identities of objects included.
        compute: computes the value.
        alive: the objects whose identities are in the key. They are kept alive, so that no other object can get one.
    """
    if not is_cached(cache, key):
        put(cache, key, compute(), *alive)
    return cache[key][0]


def is_cached(cache: Cache, key: Hashable) -> bool:
    """Return True if there is a value for ``key``; one without gradient does not count while gradients are on."""
    return key in cache and (cache[key][1] or not torch.is_grad_enabled())


def put(cache: Cache, key: Hashable, value: Any, *alive: object) -> None:
    """Cache a value; the arguments are those of :func:`cached`."""
    cache[key] = value, torch.is_grad_enabled(), alive
