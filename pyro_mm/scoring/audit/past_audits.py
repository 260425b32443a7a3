"""Outcomes of audits already done, per pair and kind of batch."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ...batch.batch import Batch
from ...distributions.support import has_fractions
from ...utils.reachable import Fingerprint
from .sites import Sites

MOST_AUDITS = 64  # kinds of batches remembered for one pair


@dataclass
class PastAudit:
    """Outcome of the audit of a pair on one kind of batch."""

    fingerprint: Fingerprint
    sites: Sites
    stacks: str | None = None  # why particles cannot be stacked; empty if they can be, None if that is not known


_past: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class _Absent:
    """In the place of a model or a guide that is not run."""


ABSENT = _Absent()


def likelihood_notes(model: Any, guide: Any, batch: Batch, seen: Batch | None = None) -> tuple[str, ...]:
    """Return what is to be said of a likelihood of these rows, where the pair was audited on their kind."""
    known = past_audits(model, guide).get(kind_of_batch(batch, seen, False))
    if known is None:
        return ()
    grey = [
        name
        for name, support in known.sites.supports.items()
        if support.bits and name in batch and batch.holds(name) and has_fractions(batch[name], batch.presence(name))
    ]
    left = [n for n in known.sites.unobserved if batch.presence(n) is not False and n not in known.sites.read]
    return (
        *(f"{name} is in these rows, and the story does not observe it" for name in left),
        *(f"{name} has values between 0 and 1: under a Bernoulli this is no likelihood of bits" for name in grey),
    )


def modalities_read(model: Any, guide: Any, batch: Batch, seen: Batch | None = None) -> frozenset[str]:
    """Return the modalities whose values the story looks at, where the pair was audited on their kind."""
    known = past_audits(model, guide).get(kind_of_batch(batch, seen, False))
    return frozenset() if known is None else known.sites.read


def past_audits(model: Any, guide: Any) -> dict[Hashable, PastAudit]:
    keys = [ABSENT if f is None else getattr(f, "__func__", f) for f in (model, guide)]
    owners = tuple(id(getattr(f, "__self__", None)) for f in (model, guide))
    try:
        of_guide = _past.setdefault(keys[0], weakref.WeakKeyDictionary()).setdefault(keys[1], {})
        if len(of_guide) >= MOST_AUDITS and owners not in of_guide:
            of_guide.clear()  # methods of as many objects, most of which are gone
        return of_guide.setdefault(owners, {})
    except TypeError:  # a callable that cannot be referred to weakly
        return {}


def kind_of_batch(batch: Batch, seen: Batch | None, hides: bool) -> Hashable:
    """All that the outcome of an audit depends on of a batch, but the values."""

    def presence(name: str) -> Any:
        mask = batch.presence(name)
        return mask if isinstance(mask, bool) else None

    held = tuple(
        (n, presence(n), (batch[n].shape[1:], batch[n].dtype) if batch.holds(n) else None) for n in batch.names
    )
    more = tuple((n, x.shape[1:], x.dtype) for n, x in batch.covariates.items())
    shown = None if seen is None or seen is batch else kind_of_batch(seen, None, hides)
    return (held, more, tuple(batch._lengths), hides, shown)
